"""Zarr v3: sharded, uncompressed, every chunk under its crc32c; written and mapped by us, readable by any Zarr.

A shard file is `chunk₀ crc₀ chunk₁ crc₁ … index crc`, where the index holds (offset, length) of each chunk as
little-endian uint64 (Zarr v3 `sharding_indexed`, index at the end). All chunks have one size, so a row's place
is arithmetic, and a memory map of the file is an array with one odd stride.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.abc.codec import ArrayBytesCodec, BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from teacher_cache.encodings import Columns, Part
from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.storage.base import Grid, Group
from teacher_cache.storage.files import UNREADABLE, FileRecord, crc32c

_CRC = 4
_HINT = "Run `teacher-cache verify` to see the extent; restore the file, or remove the cache and build again."


@dataclass(frozen=True)
class ZarrStore:
    """One array for each part of each group, one file for each shard."""

    grid: Grid

    def metadata(self, groups: Sequence[Group]) -> Mapping[str, bytes]:
        """Every `zarr.json`, made by zarr itself."""
        files: dict[str, Buffer] = {}
        memory = MemoryStore(files)
        folders = {
            "/".join(group.path.split("/")[:depth]) for group in groups for depth in range(group.path.count("/") + 2)
        }
        for folder in sorted(folders):
            zarr.create_group(memory, path=folder)
        for group in groups:
            for part in group.parts:
                self._create(memory, f"{group.path}/{part.name}", part)
        return {f"data/{key}": value.to_bytes() for key, value in sorted(files.items())}

    def _create(self, memory: MemoryStore, name: str, part: Part) -> None:
        inner: list[ArrayBytesCodec | BytesBytesCodec] = [BytesCodec(endian="little"), Crc32cCodec()]
        sharding = ShardingCodec(
            chunk_shape=(self.grid.chunk_rows, *part.shape),
            codecs=inner,
            index_codecs=inner,
            index_location="end",
        )
        zarr.create(
            store=memory,
            path=name,
            shape=(self.grid.rows, *part.shape),
            chunks=(self.grid.shard_rows, *part.shape),
            dtype=part.dtype,
            codecs=[sharding],
            fill_value=part.fill,
            zarr_format=3,
            config={"write_empty_chunks": True},
        )

    def paths(self, group: Group, shard: int) -> list[str]:
        """One file for each part."""
        return [shard_path(group, part, shard) for part in group.parts]

    def pack(self, group: Group, shard: int, columns: Columns) -> list[tuple[FileRecord, bytes]]:
        """One file for each part; a ragged last shard is padded with the fill value, as Zarr asks."""
        return [self._pack_part(group, part, shard, columns[part.name]) for part in group.parts]

    def _pack_part(self, group: Group, part: Part, shard: int, values: NDArray[Any]) -> tuple[FileRecord, bytes]:
        layout = _layout(part.dtype, part.shape, self.grid)
        padded = np.full((self.grid.shard_rows, *part.shape), part.fill, part.dtype)
        padded[: len(values)] = values
        chunks = padded.reshape(layout.chunks, -1).view(np.uint8)
        crcs = np.array([crc32c(chunk.tobytes()) for chunk in chunks], "<u4")
        framed = np.concatenate([chunks, crcs.view(np.uint8).reshape(-1, _CRC)], axis=1)
        data = framed.tobytes() + layout.index
        path = shard_path(group, part, shard)
        return FileRecord(path, len(data), _digest(path, crcs)), data

    def damage(
        self, root: Path, group: Group, shard: int, records: Mapping[str, FileRecord]
    ) -> Iterator[CorruptionError]:
        """Every chunk of every part."""
        reader = self.open_shard(root, group, shard, records)
        for part in group.parts:
            try:
                reader.gather(part.name, np.arange(0, self.grid.shard_rows, self.grid.chunk_rows))
            except CorruptionError as error:
                yield error

    def open_shard(self, root: Path, group: Group, shard: int, records: Mapping[str, FileRecord]) -> MappedShard:
        """Maps the shard's files when their rows are first asked for."""
        return MappedShard(root, group, shard, self.grid, records)


@dataclass(frozen=True)
class _Layout:
    """Where things are in a shard file of one part."""

    chunks: int
    chunk_bytes: int
    index: bytes
    """The index with its checksum: the same in every shard of the part."""

    @property
    def size(self) -> int:
        return self.chunks * (self.chunk_bytes + _CRC) + len(self.index)


@lru_cache(maxsize=256)
def _layout(dtype: str, shape: tuple[int, ...], grid: Grid) -> _Layout:
    chunks = grid.shard_rows // grid.chunk_rows
    chunk_bytes = grid.chunk_rows * Part("", dtype, shape).row_bytes
    entries = np.empty((chunks, 2), "<u8")
    entries[:, 0] = np.arange(chunks) * (chunk_bytes + _CRC)
    entries[:, 1] = chunk_bytes + _CRC
    index = entries.tobytes()
    return _Layout(chunks, chunk_bytes, index + crc32c(index).to_bytes(_CRC, "little"))


def shard_path(group: Group, part: Part, shard: int) -> str:
    """Zarr's default chunk key: sharded along rows only, so every other coordinate is 0."""
    return "/".join(["data", group.path, part.name, "c", str(shard), *("0" for _ in part.shape)])


def _digest(path: str, crcs: NDArray[np.uint32]) -> str:
    return hashlib.blake2b(path.encode() + b"\0" + crcs.tobytes(), digest_size=16).hexdigest()


class MappedShard:
    """Rows of one shard through memory maps; each chunk is verified when it is first touched."""

    def __init__(self, root: Path, group: Group, shard: int, grid: Grid, records: Mapping[str, FileRecord]) -> None:
        self._root, self._group, self._shard, self._grid, self._records = root, group, shard, grid, records
        self._parts = {part.name: part for part in group.parts}
        self._maps: dict[str, tuple[NDArray[Any], NDArray[np.uint8], NDArray[np.bool_]]] = {}

    def gather(self, part: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Copies rows out of the map."""
        if part not in self._maps:
            self._maps[part] = self._map(self._parts[part])
        values, framed, verified = self._maps[part]
        chunk, inside = np.divmod(rows, self._grid.chunk_rows)
        if not verified[chunk].all():
            for number in np.unique(chunk[~verified[chunk]]):
                self._verify(part, framed[number], int(number))
                verified[number] = True
        gathered: NDArray[Any] = values[chunk, inside]
        return gathered

    def _map(self, part: Part) -> tuple[NDArray[Any], NDArray[np.uint8], NDArray[np.bool_]]:
        layout = _layout(part.dtype, part.shape, self._grid)
        path = shard_path(self._group, part, self._shard)
        try:
            raw = np.memmap(self._root / path, np.uint8, "r")
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            # ValueError: an empty file cannot be mapped.
            raise CorruptionError(path, "must be there, and not empty: it was committed", error, _HINT) from error
        except OSError as error:
            raise CacheError(path, "cannot be read", error, UNREADABLE) from error
        if raw.size != layout.size:
            raise CorruptionError(path, f"must have {layout.size} bytes", raw.size, _HINT)
        stride = layout.chunk_bytes + _CRC
        framed = np.asarray(raw[: layout.chunks * stride]).reshape(layout.chunks, stride)
        crcs = np.ascontiguousarray(framed[:, layout.chunk_bytes :]).view("<u4")[:, 0]
        if raw[layout.chunks * stride :].tobytes() != layout.index:
            raise CorruptionError(path, "has another index than a shard of this array", self._shard, _HINT)
        if _digest(path, crcs) != self._records[path].digest:
            rule = "holds other chunks than its receipt says (altered, or another shard's file)"
            raise CorruptionError(path, rule, _digest(path, crcs), _HINT)
        dtype = np.dtype(part.dtype)
        shape = (layout.chunks, self._grid.chunk_rows, *part.shape)
        inner = np.empty(shape[1:], dtype).strides
        values = np.ndarray(shape, dtype, framed, strides=(stride, *inner))
        return values, framed, np.zeros(layout.chunks, np.bool_)

    def _verify(self, part: str, framed: NDArray[np.uint8], chunk: int) -> None:
        stored = int(framed[-_CRC:].copy().view("<u4")[0])
        found = crc32c(framed[:-_CRC].tobytes())
        if found != stored:
            path = shard_path(self._group, self._parts[part], self._shard)
            raise CorruptionError(path, f"chunk {chunk} must have crc32c {stored:08x}", f"{found:08x}", _HINT)
