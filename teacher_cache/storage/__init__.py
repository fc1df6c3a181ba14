"""Step 5, shard commit: one (view, range of samples) written whole, checksummed, then made visible."""

from __future__ import annotations

from typing import Literal

from teacher_cache.storage.base import Grid, Group, ShardReader, Store, field_path
from teacher_cache.storage.files import FileRecord, crc32c, remove_temporary, write_atomic

__all__ = [
    "FileRecord",
    "Grid",
    "Group",
    "ShardReader",
    "Store",
    "crc32c",
    "field_path",
    "open_store",
    "remove_temporary",
    "write_atomic",
]


def open_store(kind: Literal["zarr", "parquet"], grid: Grid) -> Store:
    """The store of a kind; its library is imported here and nowhere else."""
    if kind == "zarr":
        from teacher_cache.storage.zarr_shards import ZarrStore

        return ZarrStore(grid)
    from teacher_cache.storage.parquet_shards import ParquetStore

    return ParquetStore(grid)
