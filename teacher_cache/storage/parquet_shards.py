"""Parquet: one file and one row group for each shard of a group, one FIXED_SIZE_BINARY column for each part.

No compression, no dictionary, page checksums written and verified; dtype and shape of a row are in the field's
metadata, the shard's place in the schema's. Readable by plain pyarrow, pandas and DuckDB: `numpy.frombuffer`
of a value with that dtype is the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from teacher_cache.encodings import Columns, Part
from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.storage.base import Grid, Group
from teacher_cache.storage.files import UNREADABLE, FileRecord, crc32c

_HINT = "Run `teacher-cache verify` to see the extent; restore the file, or remove the cache and build again."


@dataclass(frozen=True)
class ParquetStore:
    """One file for each shard of each group."""

    grid: Grid

    def metadata(self, groups: Sequence[Group]) -> Mapping[str, bytes]:
        """None: a Parquet file describes itself."""
        return {}

    def paths(self, group: Group, shard: int) -> list[str]:
        """One file."""
        return [shard_path(group, shard)]

    def pack(self, group: Group, shard: int, columns: Columns) -> list[tuple[FileRecord, bytes]]:
        """One file; a ragged last shard has fewer rows."""
        path = shard_path(group, shard)
        fields = [_field(part) for part in group.parts]
        arrays = [_column(part, columns[part.name]) for part in group.parts]
        schema = pa.schema(fields, metadata={"place": path})
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=schema),
            sink,
            row_group_size=self.grid.shard_rows,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        data = sink.getvalue().to_pybytes()
        return [(FileRecord(path, len(data), _digest(path, data)), data)]

    def damage(
        self, root: Path, group: Group, shard: int, records: Mapping[str, FileRecord]
    ) -> Iterator[CorruptionError]:
        """The file, whole."""
        try:
            self.open_shard(root, group, shard, records).gather(group.parts[0].name, np.arange(0))
        except CorruptionError as error:
            yield error

    def open_shard(self, root: Path, group: Group, shard: int, records: Mapping[str, FileRecord]) -> LoadedShard:
        """Reads the file whole when its rows are first asked for."""
        return LoadedShard(root, group, records[shard_path(group, shard)])


def _digest(path: str, data: bytes) -> str:
    return f"{crc32c(path.encode() + data):08x}"


def shard_path(group: Group, shard: int) -> str:
    """Where a shard's file is, below the root."""
    return f"data/{group.path}/{shard:06d}.parquet"


def _field(part: Part) -> pa.Field:
    described = {"dtype": part.dtype, "shape": json.dumps(list(part.shape))}
    return pa.field(part.name, pa.binary(part.row_bytes), nullable=False, metadata=described)


def _column(part: Part, values: NDArray[Any]) -> pa.Array:
    contiguous = np.ascontiguousarray(values, np.dtype(part.dtype).newbyteorder("<"))
    buffers = [None, pa.py_buffer(contiguous.tobytes())]
    return pa.Array.from_buffers(pa.binary(part.row_bytes), len(values), buffers)


class LoadedShard:
    """Rows of one shard, read whole, checked against the receipt, then kept as arrays."""

    def __init__(self, root: Path, group: Group, record: FileRecord) -> None:
        self._root, self._group, self._record = root, group, record
        self._columns: dict[str, NDArray[Any]] | None = None

    def gather(self, part: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Copies rows out of the loaded columns."""
        if self._columns is None:
            self._columns = self._load()
        gathered: NDArray[Any] = self._columns[part][rows]
        return gathered

    def _load(self) -> dict[str, NDArray[Any]]:
        path, record = self._record.path, self._record
        try:
            data = (self._root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptionError(path, "must be there: it was committed", error, _HINT) from error
        except OSError as error:
            raise CacheError(path, "cannot be read", error, UNREADABLE) from error
        if len(data) != record.size:
            raise CorruptionError(path, f"must have {record.size} bytes", len(data), _HINT)
        if _digest(path, data) != record.digest:
            raise CorruptionError(path, f"must have digest {record.digest} here", _digest(path, data), _HINT)
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        return {part.name: _values(part, table[part.name].combine_chunks()) for part in self._group.parts}


def _values(part: Part, column: pa.Array) -> NDArray[Any]:
    array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    flat = np.frombuffer(array.buffers()[1], np.uint8, len(array) * part.row_bytes, array.offset * part.row_bytes)
    return flat.view(part.dtype).reshape(len(array), *part.shape)
