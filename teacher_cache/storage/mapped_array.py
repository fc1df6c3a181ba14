"""One Zarr array of a cache, read at memory speed: all its shard files in one region, gathered in one call."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.storage.files import RESTORE, UNREADABLE, FileRecord
from teacher_cache.storage.region import Region
from teacher_cache.storage.root import Root
from teacher_cache.storage.runs import copy_bytes, runs_of
from teacher_cache.storage.zarr_files import Layout, framed_chunks, require_chunks

_LONG_ROWS = 256
"""Bytes from which torch's row-by-row copy is faster than NumPy's fancy index, and needs no second copy."""


class MappedArray:
    """Rows (of ragged parts: elements) of all shards of one array. Not thread-safe.

    A file is mapped when its rows are first asked for: its size, its index and the digest that binds it to its place
    are checked then, and each chunk's checksum when the chunk is first touched.
    """

    def __init__(self, root: Root, layout: Layout, shards: int, record_of: Callable[[int], FileRecord]) -> None:
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
        self._each, self._room = layout.chunk_shape[0], layout.shard_shape[0]
        self._unit_bytes = np.dtype(layout.part.dtype).itemsize * math.prod(layout.chunk_shape[1:])
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
        return self._room

    def lengths(self, shards_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows or elements that the files of some shards hold, with those that fill up the last chunk, [N]."""
        self._place(shards_N)
        found: NDArray[np.int64] = self._present[shards_N] * self._each
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
        runs = runs_of(places_N)
        if runs is None:
            self._gather(places_N, raw)
            return out
        for begin, stop in pairwise(runs):
            self._copy_run(int(places_N[begin]), raw[begin:stop])
        return out

    def _gather(self, places_N: NDArray[np.int64], raw_NU: NDArray[np.uint8]) -> None:
        """Single rows, from anywhere, by one index."""
        chunks_N, inside_N = np.divmod(places_N, self._each)
        self._require_verified(chunks_N)
        index_N = self._starts[chunks_N] + inside_N * (self._unit_bytes // self._grain)
        if self._unit_bytes < _LONG_ROWS:
            raw_NU[...] = self._windows[index_N]
            return
        windows, index, out = (torch.from_numpy(array) for array in (self._windows, index_N, raw_NU))
        torch.index_select(windows, 0, index, out=out)

    def _copy_run(self, first: int, raw_NU: NDArray[np.uint8]) -> None:
        """Rows that follow one another: the shards and chunks that are whole by one copy, what is beside them apart."""
        each, stop = self._each, first + len(raw_NU)
        chunks = slice(first // each, (stop - 1) // each + 1)
        if np.count_nonzero(self._verified[chunks]) < chunks.stop - chunks.start:
            self._require_verified(np.arange(chunks.start, chunks.stop))
        strides, begin = (self._region.slot_bytes, self._layout.stride, 1), first
        while begin < stop:
            shards, whole, rows = self._block(begin, stop)
            at = int(self._starts[begin // each]) * self._grain + begin % each * self._unit_bytes
            shape = shards, whole, rows * self._unit_bytes
            block: NDArray[np.uint8] = np.ndarray(shape, np.uint8, self._region.bytes, at, strides)
            end = begin + shards * whole * rows
            copy_bytes(raw_NU[begin - first : end - first].reshape(shape), block)
            begin = end

    def _block(self, begin: int, stop: int) -> tuple[int, int, int]:
        """The most rows from one on that are alike in each chunk: how many shards, chunks of each, rows of each."""
        each, room, left = self._each, self._room, stop - begin
        if begin % each or left < each:
            return 1, 1, min(each - begin % each, left)
        if begin % room or left < room:
            return 1, min(room - begin % room, left) // each, each
        return left // room, room // each, each

    def _require_verified(self, chunks_N: NDArray[np.int64]) -> None:
        verified_N = self._verified[chunks_N]
        if verified_N.all():
            return
        touched = np.unique(chunks_N[~verified_N])
        shards = touched // self._layout.chunks
        self._place(shards)
        for shard in np.unique(shards).tolist():
            first, record = shard * self._layout.chunks, self._record_of(shard)
            chunks = touched[shards == shard] - first
            try:
                require_chunks(self._framed(shard), chunks, record.path)
            except CorruptionError:
                if not self._root.forget(record.path, record.size, record.digest):
                    raise
                # Of the new copy, what was looked at in the old one too.
                chunks = np.union1d(chunks, np.flatnonzero(self._verified[first : first + self._layout.chunks]))
                self._place_anew(shard, record)
                require_chunks(self._framed(shard), chunks, record.path)
            self._verified[first + chunks] = True

    def _framed(self, shard: int) -> NDArray[np.uint8]:
        """The chunks of a file that is mapped, each with its checksum."""
        start, shape = shard * self._region.slot_bytes, (int(self._present[shard]), self._layout.stride)
        return self._region.bytes[start : start + math.prod(shape)].reshape(shape)

    def verify(self, shard: int) -> None:
        """Reads every chunk of a shard's file; raises `CorruptionError`."""
        self._place(np.array([shard]))
        self._require_verified(shard * self._layout.chunks + np.arange(self._present[shard]))

    def _place(self, shards_N: NDArray[np.int64]) -> None:
        if (self._present[shards_N] >= 0).all():
            return
        for shard in np.unique(shards_N[self._present[shards_N] < 0]).tolist():
            record = self._record_of(shard)
            try:
                self._place_anew(shard, record)
            except CorruptionError:
                if not self._root.forget(record.path, record.size, record.digest):
                    raise
                self._place_anew(shard, record)

    def _place_anew(self, shard: int, record: FileRecord) -> None:
        raw = self._mapped(shard, record)
        self._present[shard] = len(framed_chunks(raw, self._layout, record))

    def _mapped(self, shard: int, record: FileRecord) -> NDArray[np.uint8]:
        try:
            handle = os.open(self._root.local(record.path, record.size, record.digest), os.O_RDONLY)
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
