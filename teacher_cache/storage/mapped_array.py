"""One Zarr array of a cache, read at memory speed: all its shard files in one region, gathered in one call."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.storage.files import RESTORE, UNREADABLE, FileRecord
from teacher_cache.storage.region import Region
from teacher_cache.storage.zarr_files import Layout, framed_chunks, require_chunk

_LONG_ROWS = 256
"""Bytes from which torch's row-by-row copy is faster than NumPy's fancy index, and needs no second copy."""


class MappedArray:
    """Rows (of ragged parts: elements) of all shards of one array. Not thread-safe.

    A file is mapped when its rows are first asked for: its size, its index and the digest that binds it to its place
    are checked then, and each chunk's checksum when the chunk is first touched.
    """

    def __init__(self, root: Path, layout: Layout, shards: int, record_of: Callable[[int], FileRecord]) -> None:
        """Maps nothing yet.

        Args:
            root: the cache's folder.
            layout: of one shard file.
            shards: how many there are.
            record_of: a committed shard's number to what its receipt says of the file.
        """
        self._root, self._layout, self._record_of = root, layout, record_of
        self._region = Region(shards, layout.file_bytes)
        self._present = np.full(shards, -1, np.int64)
        # Chunks of all shards are numbered through.
        self._verified = np.zeros(shards * layout.chunks, np.bool_)
        each = layout.chunk_shape[1:]
        self._unit_bytes = np.dtype(layout.part.dtype).itemsize * math.prod(each)
        self._grain = math.gcd(layout.stride, self._unit_bytes, self._region.slot_bytes)
        slots = np.arange(shards)[:, None] * self._region.slot_bytes
        self._starts = ((slots + np.arange(layout.chunks) * layout.stride) // self._grain).reshape(-1)
        windows = (self._region.bytes.size - self._unit_bytes) // self._grain + 1
        # Every place where a row may begin, as overlapping windows: one index picks a row from any file.
        self._windows: NDArray[np.uint8] = np.ndarray(
            (windows, self._unit_bytes), np.uint8, self._region.bytes, strides=(self._grain, 1)
        )

    @property
    def placed(self) -> int:
        """How many files are mapped."""
        return int((self._present >= 0).sum())

    def clear(self) -> None:
        """Unmaps all; what is asked for next is mapped and checked anew."""
        self._region.clear()
        self._present[:] = -1
        self._verified[:] = False

    @property
    def room(self) -> int:
        """Rows or elements that a shard has room for: those of shard s begin at s · room."""
        return self._layout.shard_shape[0]

    def lengths(self, shards_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows or elements that the files of some shards hold, with those that fill up the last chunk, [N]."""
        self._place(shards_N)
        found: NDArray[np.int64] = self._present[shards_N] * self._layout.chunk_shape[0]
        return found

    def take(self, places_N: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Copies rows or elements out of the map.

        Args:
            places_N: the row of each; of ragged parts shard · room + the element's place, below `lengths` of its shard.
            out: [N, ...] of the array's type, C-contiguous, to be filled; a new array where not given.

        Raises:
            CorruptionError: a byte that was asked for, or its chunk's neighbour, is not what was committed.
        """
        layout = self._layout
        if out is None:
            out = np.empty((len(places_N), *layout.chunk_shape[1:]), layout.part.dtype)
        if len(places_N) == 0:
            return out
        raw = out.reshape(len(places_N), -1).view(np.uint8)
        if places_N[-1] - places_N[0] == len(places_N) - 1 and (np.diff(places_N) == 1).all():
            self._copy_run(int(places_N[0]), raw)
            return out
        chunks_N, inside_N = np.divmod(places_N, layout.chunk_shape[0])
        self._require_verified(chunks_N)
        index_N = self._starts[chunks_N] + inside_N * (self._unit_bytes // self._grain)
        if self._unit_bytes < _LONG_ROWS:
            raw[...] = self._windows[index_N]
        else:
            torch.index_select(torch.from_numpy(self._windows), 0, torch.from_numpy(index_N), out=torch.from_numpy(raw))
        return out

    def _copy_run(self, first: int, raw_NU: NDArray[np.uint8]) -> None:
        """Rows that follow one another: chunk by chunk, at the speed of a copy."""
        each = self._layout.chunk_shape[0]
        chunks = np.arange(first // each, (first + len(raw_NU) - 1) // each + 1)
        self._require_verified(chunks)
        for chunk, start in zip(chunks.tolist(), (self._starts[chunks] * self._grain).tolist(), strict=True):
            begin, stop = max(first, chunk * each), min(first + len(raw_NU), (chunk + 1) * each)
            at = start + (begin - chunk * each) * self._unit_bytes
            size = (stop - begin) * self._unit_bytes
            raw_NU[begin - first : stop - first] = self._region.bytes[at : at + size].reshape(-1, self._unit_bytes)

    def _require_verified(self, chunks_N: NDArray[np.int64]) -> None:
        if self._verified[chunks_N].all():
            return
        touched = np.unique(chunks_N[~self._verified[chunks_N]])
        shards = touched // self._layout.chunks
        self._place(shards)
        stride = self._layout.stride
        for shard, chunk in zip(shards.tolist(), touched.tolist(), strict=True):
            start = int(self._starts[chunk]) * self._grain
            number = chunk - shard * self._layout.chunks
            require_chunk(self._region.bytes[start : start + stride], number, self._record_of(shard).path)
            self._verified[chunk] = True

    def verify(self, shard: int) -> None:
        """Reads every chunk of a shard's file; raises `CorruptionError`."""
        self._place(np.array([shard]))
        self._require_verified(shard * self._layout.chunks + np.arange(self._present[shard]))

    def _place(self, shards_N: NDArray[np.int64]) -> None:
        if (self._present[shards_N] >= 0).all():
            return
        for shard in np.unique(shards_N[self._present[shards_N] < 0]).tolist():
            record = self._record_of(shard)
            raw = self._mapped(shard, record)
            self._present[shard] = len(framed_chunks(raw, self._layout, record))

    def _mapped(self, shard: int, record: FileRecord) -> NDArray[np.uint8]:
        try:
            handle = os.open(self._root / record.path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptionError(record.path, "must be there: it was committed", error, RESTORE) from error
        except OSError as error:
            raise CacheError(record.path, "cannot be read", error, UNREADABLE) from error
        try:
            size = os.fstat(handle).st_size
            if size != record.size or self._layout.present(size) is None:
                raise CorruptionError(record.path, f"must have {record.size} bytes", size, RESTORE)
            return self._region.place(shard, handle, size)
        except OSError as error:
            raise CacheError(record.path, "cannot be mapped", error, UNREADABLE) from error
        finally:
            os.close(handle)
