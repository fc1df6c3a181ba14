"""Parquet: one file and one row group for each shard of a group, one FIXED_SIZE_BINARY column for each part.

A ragged part is a BINARY column: a value has the elements that its row has. Their number is `count`, which has no
column of its own.

No compression, no dictionary, page checksums written and verified; dtype and shape of a row are in the field's
metadata, the shard's place in the schema's. Readable by plain pyarrow, pandas and DuckDB: `numpy.frombuffer`
of a value with that dtype is the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from teacher_cache.encodings import Columns, Part
from teacher_cache.errors import CorruptionError
from teacher_cache.storage.base import Grid, Group
from teacher_cache.storage.files import FileRecord
from teacher_cache.storage.parquet_groups import LoadedGroup, LoadedShard, digest_of, shard_path, stored_parts
from teacher_cache.storage.ragged import flatten, lengths_of, require_room
from teacher_cache.storage.root import Root


@dataclass(frozen=True)
class ParquetStore:
    """One file for each shard of each group."""

    grid: Grid

    def metadata(self, groups: Sequence[Group]) -> Mapping[str, bytes]:
        """None: a Parquet file describes itself."""
        for group in groups:
            require_room(group, self.grid)
        return {}

    def paths(self, group: Group, shard: int) -> list[str]:
        """One file."""
        return [shard_path(group, shard)]

    def pack(self, group: Group, shard: int, columns: Columns) -> list[tuple[FileRecord, bytes]]:
        """One file; a ragged last shard has fewer rows."""
        require_room(group, self.grid)
        path = shard_path(group, shard)
        lengths = lengths_of(group, columns) if group.ragged else None
        fields = [_field(part) for part in stored_parts(group)]
        arrays = [_column(part, columns[part.name], lengths) for part in stored_parts(group)]
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
        return [(FileRecord(path, len(data), digest_of(path, data)), data)]

    def damage(
        self, root: Root, group: Group, shard: int, records: Mapping[str, FileRecord]
    ) -> Iterator[CorruptionError]:
        """The file, whole."""
        try:
            LoadedShard(root, group, self.grid, shard, records[shard_path(group, shard)]).load()
        except CorruptionError as error:
            yield error

    def open_group(
        self, root: Root, group: Group, records_of: Callable[[int], Mapping[str, FileRecord]]
    ) -> LoadedGroup:
        """Reads a file whole when its rows are first asked for."""
        return LoadedGroup(root, group, self.grid, records_of)


def _field(part: Part) -> pa.Field:
    described = {"dtype": part.dtype, "shape": json.dumps(list(part.shape))}
    if part.ragged:
        return pa.field(part.name, pa.large_binary(), nullable=False, metadata={**described, "ragged": "true"})
    return pa.field(part.name, pa.binary(part.row_bytes), nullable=False, metadata=described)


def _column(part: Part, values: NDArray[Any], lengths: NDArray[np.int64] | None) -> pa.Array:
    contiguous = np.ascontiguousarray(values, np.dtype(part.dtype).newbyteorder("<"))
    if not part.ragged or lengths is None:
        buffers = [None, pa.py_buffer(contiguous.tobytes())]
        return pa.Array.from_buffers(pa.binary(part.row_bytes), len(values), buffers)
    ends = np.cumsum([0, *lengths]) * contiguous.itemsize
    # Large: its offsets have 64 bits. In the file it is a BINARY column like any other.
    buffers = [None, pa.py_buffer(ends.astype("<i8").tobytes()), pa.py_buffer(flatten(contiguous, lengths).tobytes())]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)
