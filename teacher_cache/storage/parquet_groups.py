"""Rows of one group of a Parquet cache: shards are read whole, checked, and kept as arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from teacher_cache.encodings import Part
from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.storage.base import COUNT, Grid, Group
from teacher_cache.storage.files import RESTORE, UNREADABLE, FileRecord, crc32c
from teacher_cache.storage.ragged import pad, places_of
from teacher_cache.storage.root import Root

_MOST_BYTES = 2**30
"""Of the shards of one group that stay loaded."""


def digest_of(path: str, data: bytes) -> str:
    """Of a whole file, bound to its place: the CRC-32C of the path followed by the bytes."""
    return f"{crc32c(path.encode() + data):08x}"


def shard_path(group: Group, shard: int) -> str:
    """Where a shard's file is, below the root."""
    return f"data/{group.path}/{shard:06d}.parquet"


def stored_parts(group: Group) -> tuple[Part, ...]:
    """The parts that have a column: all but the `count` of ragged ones."""
    return tuple(part for part in group.parts if not (group.ragged and part.name == COUNT))


class LoadedGroup:
    """Rows of all shards of a group; the shards that were used last are kept."""

    def __init__(
        self, root: Root, group: Group, grid: Grid, records_of: Callable[[int], Mapping[str, FileRecord]]
    ) -> None:
        self._root, self._group, self._grid, self._records_of = root, group, grid, records_of
        self._parts = {part.name: part for part in group.parts}
        self._shards: OrderedDict[int, LoadedShard] = OrderedDict()
        self._shard_bytes = sum(part.row_bytes for part in group.parts) * grid.shard_rows

    @property
    def load(self) -> float:
        """The share of the memory that loaded shards may take."""
        return len(self._shards) * self._shard_bytes / _MOST_BYTES

    def clear(self) -> None:
        """Lets go of all shards."""
        self._shards.clear()

    def gather(self, part: str, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Copies rows out of the loaded columns, into `out` where it is given."""
        described = self._parts[part]
        if out is None:
            out = np.empty((len(rows), *described.shape), described.dtype)
        shards, inside = np.divmod(rows, self._grid.shard_rows)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            out[places] = self._shard(shard).gather(part, inside[places])
        return out

    def _shard(self, shard: int) -> LoadedShard:
        if shard not in self._shards:
            record = self._records_of(shard)[shard_path(self._group, shard)]
            self._shards[shard] = LoadedShard(self._root, self._group, self._grid, shard, record)
        self._shards.move_to_end(shard)
        while len(self._shards) > 1 and self.load > 1:
            self._shards.popitem(last=False)
        return self._shards[shard]


class LoadedShard:
    """Rows of one shard, read whole, checked against the receipt, then kept as arrays."""

    def __init__(self, root: Root, group: Group, grid: Grid, shard: int, record: FileRecord) -> None:
        start, stop = grid.span(shard)
        self._root, self._group, self._record, self._rows = root, group, record, stop - start
        self._parts = {part.name: part for part in group.parts}
        self._columns: dict[str, NDArray[Any]] | None = None
        """Of a ragged part the elements of all rows, one row after the other."""

    def gather(self, part: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Copies rows (counted from the shard's first) out of the loaded columns."""
        columns = self.load()
        described, column = self._parts[part], columns[part]
        if not described.ragged:
            gathered: NDArray[Any] = column[rows]
            return gathered
        count = columns[COUNT].astype(np.int64)
        starts, lengths = (np.cumsum(count) - count)[rows], count[rows]
        return pad(column[places_of(starts, lengths)], lengths, described)

    def load(self) -> dict[str, NDArray[Any]]:
        """The columns, read and checked when they are first asked for."""
        if self._columns is None:
            record = self._record
            try:
                self._columns = self._load()
            except CorruptionError:
                if not self._root.forget(record.path, record.size, record.digest):
                    raise
                self._columns = self._load()
        return self._columns

    def _load(self) -> dict[str, NDArray[Any]]:
        path, record = self._record.path, self._record
        try:
            data = self._root.local(path, record.size, record.digest).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptionError(path, "must be there: it was committed", error, RESTORE) from error
        except OSError as error:
            raise CacheError(path, "cannot be read", error, UNREADABLE) from error
        if len(data) != record.size:
            raise CorruptionError(path, f"must have {record.size} bytes", len(data), RESTORE)
        if digest_of(path, data) != record.digest:
            raise CorruptionError(path, f"must have digest {record.digest} here", digest_of(path, data), RESTORE)
        try:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            if table.num_rows != self._rows:
                raise ValueError(f"has {table.num_rows} rows of {self._rows}")
            count = {COUNT: self._count(table)} if self._group.ragged else {}
            return count | {part.name: _values(part, _whole(part, table)) for part in stored_parts(self._group)}
        except (ValueError, LookupError, NotImplementedError, OSError) as error:
            # The digest is right: it was written like this.
            raise CorruptionError(path, "must hold the parts of its group", error, RESTORE) from error

    def _count(self, table: pa.Table) -> NDArray[np.uint32]:
        """How many elements each row has, which all ragged columns must agree about."""
        counts = []
        for part in self._group.ragged:
            item, sizes = np.dtype(part.dtype).itemsize, np.diff(_ends(_whole(part, table)))
            wrong = (sizes % item != 0) | (sizes > part.row_bytes)
            if wrong.any():
                rule = f"{part.name} must have up to {self._group.cap} elements of {item} bytes in a row"
                raise CorruptionError(self._record.path, rule, f"{sizes[wrong][0]} bytes", RESTORE)
            counts.append(sizes // item)
        differ = np.flatnonzero((np.array(counts) != counts[0]).any(axis=0))
        if len(differ):
            rule = f"{', '.join(part.name for part in self._group.ragged)} must have as many elements in a row"
            found = [int(count[differ[0]]) for count in counts]
            raise CorruptionError(self._record.path, rule, f"{found} in row {differ[0]}", RESTORE)
        return counts[0].astype(np.uint32)


def _whole(part: Part, table: pa.Table) -> pa.Array:
    column = table[part.name]
    # Arrow's two variable binary types are one in Parquet.
    combined = (column.cast(pa.large_binary()) if part.ragged else column).combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _values(part: Part, column: pa.Array) -> NDArray[Any]:
    """Rows of a part; of a ragged one the elements of all rows, one row after the other."""
    if part.ragged:
        ends = _ends(column)
        return np.frombuffer(column.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]].view(part.dtype)
    if column.type != pa.binary(part.row_bytes):
        raise ValueError(f"{part.name} must be values of {part.row_bytes} bytes, found {column.type}")
    flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * part.row_bytes, column.offset * part.row_bytes)
    return flat.view(part.dtype).reshape(len(column), *part.shape)


def _ends(column: pa.Array) -> NDArray[np.int64]:
    """Where the bytes of each row of a ragged part begin, and where the last row's end."""
    return np.frombuffer(column.buffers()[1], np.int64, len(column) + 1, column.offset * 8)
