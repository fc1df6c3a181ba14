"""One shard file of one Zarr array: chunks with their checksums, then the index of where they are.

A shard file is `chunk₀ crc₀ chunk₁ crc₁ … index crc`, where the index holds (offset, length) of each chunk as
little-endian uint64 (Zarr v3 `sharding_indexed`, index at the end). All chunks have one size, so a place in the file
is arithmetic, and a memory map of it is an array with one odd stride. A chunk that is left out has 2⁶⁴ − 1 twice;
only those at the end of a ragged part's file are, so the index follows from how many chunks are there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Part
from teacher_cache.errors import CorruptionError
from teacher_cache.storage.base import Grid
from teacher_cache.storage.files import RESTORE, FileRecord, crc32c

_CRC = 4
_ENTRY = 16
_LEFT_OUT = 2**64 - 1
_MOST_ELEMENTS = 4096
"""Of one chunk of a ragged part: a row is read without its neighbours' checksums, as far as that is cheap."""


@dataclass(frozen=True)
class Layout:
    """Where things are in a shard file of one array."""

    part: Part
    chunk_shape: tuple[int, ...]
    """Of one chunk: rows first, or of a ragged part elements and nothing else."""
    chunks: int
    """How many chunks a shard has; of a ragged part, how many it has room for."""

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Of one shard, as `chunk_shape`."""
        return (self.chunks * self.chunk_shape[0], *self.chunk_shape[1:])

    @cached_property
    def chunk_bytes(self) -> int:
        """Of one chunk without its checksum."""
        return np.dtype(self.part.dtype).itemsize * math.prod(self.chunk_shape)

    @cached_property
    def stride(self) -> int:
        """Bytes from one chunk to the next."""
        return self.chunk_bytes + _CRC

    @property
    def file_bytes(self) -> int:
        """Of a file with all its chunks, the largest there is."""
        return self.chunks * (self.stride + _ENTRY) + _CRC

    def needed(self, length: int) -> int:
        """How many chunks are written for that many rows, or elements of a ragged part."""
        return -(-length // self.chunk_shape[0]) if self.part.ragged else self.chunks

    def index(self, present: int) -> bytes:
        """The index with its checksum: the same in every shard with so many chunks."""
        return _index(self.chunks, present, self.stride)

    def present(self, size: int) -> int | None:
        """How many chunks a file of so many bytes holds; None where no shard of this array has that size."""
        present, odd = divmod(size - self.chunks * _ENTRY - _CRC, self.stride)
        least = 0 if self.part.ragged else self.chunks
        return None if odd or not least <= present <= self.chunks else present

    def pack(self, path: str, values: NDArray[Any]) -> tuple[FileRecord, bytes]:
        """Rows, or elements of a ragged part, to a file; the last chunks are filled up with the fill value."""
        chunks = list(self._filled(values))
        crcs = np.array([crc32c(chunk) for chunk in chunks], "<u4")
        # Joined from where the rows are: the one copy that is made of them.
        framed = [piece for chunk, crc in zip(chunks, crcs, strict=True) for piece in (chunk.data, crc.tobytes())]
        file = b"".join([*framed, self.index(len(chunks))])
        return FileRecord(path, len(file), _digest(path, crcs)), file

    def _filled(self, values: NDArray[Any]) -> Iterator[NDArray[np.uint8]]:
        """The bytes of each chunk, where they are if they can be used like that."""
        each = self.chunk_shape[0]
        for number in range(self.needed(len(values))):
            rows = np.ascontiguousarray(values[number * each : (number + 1) * each], self.part.dtype)
            if len(rows) < each:
                filling = np.full((each - len(rows), *self.chunk_shape[1:]), self.part.fill, self.part.dtype)
                rows = np.concatenate([rows, filling])
            yield rows.reshape(-1).view(np.uint8)


def layout_of(part: Part, grid: Grid) -> Layout:
    """The layout of a part's array; of a ragged part its flat one."""
    if not part.ragged:
        return Layout(part, (grid.chunk_rows, *part.shape), grid.shard_rows // grid.chunk_rows)
    elements = min(grid.chunk_rows * part.shape[0], _MOST_ELEMENTS)
    return Layout(part, (elements,), -(-grid.shard_rows * part.shape[0] // elements))


@lru_cache(maxsize=1024)
def _index(chunks: int, present: int, stride: int) -> bytes:
    entries = np.full((chunks, 2), _LEFT_OUT, "<u8")
    entries[:present, 0] = np.arange(present) * stride
    entries[:present, 1] = stride
    index = entries.tobytes()
    return index + crc32c(index).to_bytes(_CRC, "little")


def _digest(path: str, crcs: NDArray[np.uint32]) -> str:
    """Of the path and the checksums of the chunks that are there: so of their number too."""
    return hashlib.blake2b(path.encode() + b"\0" + crcs.tobytes(), digest_size=16).hexdigest()


def framed_chunks(raw: NDArray[np.uint8], layout: Layout, record: FileRecord) -> NDArray[np.uint8]:
    """The chunks of a file with their checksums, [chunks, stride], as a view of its bytes.

    Raises:
        CorruptionError: the file has another size or index, or holds other chunks than its receipt says.
    """
    present = layout.present(raw.size)
    if present is None or raw.size != record.size:
        raise CorruptionError(record.path, f"must have {record.size} bytes", raw.size, RESTORE)
    framed = np.asarray(raw[: present * layout.stride]).reshape(present, layout.stride)
    if raw[present * layout.stride :].tobytes() != layout.index(present):
        raise CorruptionError(record.path, "has another index than a shard of this array", present, RESTORE)
    found = _digest(record.path, np.ascontiguousarray(framed[:, layout.chunk_bytes :]).view("<u4")[:, 0])
    if found != record.digest:
        rule = "holds other chunks than its receipt says (altered, or another shard's file)"
        raise CorruptionError(record.path, rule, found, RESTORE)
    return framed


def require_chunks(framed: NDArray[np.uint8], numbers: NDArray[np.int64], path: str) -> None:
    """Raises `CorruptionError` unless chunks of a file have the checksums that follow them.

    Args:
        framed: all chunks of the file, as `framed_chunks` gives them.
        numbers: which of them are looked at.
        path: the file's, below the root.
    """
    stored = framed[numbers, -_CRC:].view("<u4")[:, 0].tolist()
    for number, expected in zip(numbers.tolist(), stored, strict=True):
        found = crc32c(framed[number, :-_CRC])
        if found != expected:
            raise CorruptionError(path, f"chunk {number} must have crc32c {expected:08x}", f"{found:08x}", RESTORE)
