"""Tables of the manifest as Parquet bytes: samples, receipts, tombstones, references, constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Columns = Mapping[str, "NDArray[Any] | Strings | None"]
"""Arrays and columns of strings by name; None where every row is null."""


class Strings(Sequence[str]):
    """A column of strings that stays as it was read; a string is made when it is asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, place: Any) -> Any:
        found = self._column[place]
        return found.to_pylist() if isinstance(place, slice) else found.as_py()


def table_bytes(columns: Mapping[str, Any]) -> bytes:
    """Columns (lists or arrays of one length) to the bytes of a Parquet file with page checksums."""
    sink = pa.BufferOutputStream()
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def lists_of(data: bytes) -> dict[str, list[Any]]:
    """The columns of such a file, as Python lists."""
    table = _read(data)
    return {name: table[name].to_pylist() for name in table.column_names}


def columns_of(data: bytes, wanted: Mapping[str, str]) -> Columns:
    """The columns of such a file as arrays, each of the type that is wanted.

    Args:
        data: the file.
        wanted: each column's type as NumPy names it, or `string`; with `?` behind it where every row may be null.

    Raises:
        ValueError: there are others, or they hold something else.
    """
    table = _read(data)
    if set(table.column_names) != set(wanted):
        raise ValueError(f"has the columns {sorted(table.column_names)}")
    return {name: _column(name, table[name], kind) for name, kind in wanted.items()}


def _read(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data), page_checksum_verification=True)


def _column(name: str, column: pa.ChunkedArray, kind: str) -> NDArray[Any] | Strings | None:
    kind, optional = kind.removesuffix("?"), kind.endswith("?")
    if optional and column.null_count == len(column):
        return None
    if column.null_count:
        raise ValueError(f"has {column.null_count} nulls in its column `{name}`")
    if kind == "string":
        if column.type not in (pa.string(), pa.large_string()):
            raise ValueError(f"has {column.type} in its column `{name}`")
        return Strings(column)
    if column.type != pa.from_numpy_dtype(np.dtype(kind)):
        raise ValueError(f"has {column.type} in its column `{name}`")
    found: NDArray[Any] = column.to_numpy()
    return found
