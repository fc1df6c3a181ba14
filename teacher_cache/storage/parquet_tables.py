"""Small tables of the manifest as Parquet bytes: the sample table and the sealed receipts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def table_bytes(columns: Mapping[str, Any]) -> bytes:
    """Columns (lists or arrays of one length) to the bytes of a Parquet file with page checksums."""
    sink = pa.BufferOutputStream()
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def read_table(data: bytes) -> dict[str, list[Any]]:
    """The columns of such a file, as Python lists."""
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    return {name: table[name].to_pylist() for name in table.column_names}
