"""Step 5, shard commit: one (view, range of samples) written whole, checksummed, then made visible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from teacher_cache.storage.base import Grid, Group, GroupReader, Store, field_path
from teacher_cache.storage.files import FileRecord, crc32c, write_atomic, write_together
from teacher_cache.storage.local_root import absolute
from teacher_cache.storage.root import Root

__all__ = [
    "absolute",
    "FileRecord",
    "Grid",
    "Group",
    "GroupReader",
    "Store",
    "crc32c",
    "field_path",
    "open_maps",
    "open_store",
    "write_atomic",
    "write_together",
]


def open_store(kind: Literal["zarr", "parquet"], grid: Grid) -> Store:
    """The store of a kind; its library is imported here and nowhere else."""
    if kind == "zarr":
        from teacher_cache.storage.zarr_shards import ZarrStore

        return ZarrStore(grid)
    from teacher_cache.storage.parquet_shards import ParquetStore

    return ParquetStore(grid)


def open_maps(
    root: Root, maps: Path, group: Group, grid: Grid, records_of: Callable[[int], Mapping[str, FileRecord]]
) -> GroupReader:
    """Rows of a group of a Parquet cache, from maps that are made in a folder when they are first asked for."""
    from teacher_cache.storage.parquet_maps import MapOfParquet

    return MapOfParquet(root, maps, group, grid, open_store("zarr", grid), records_of)
