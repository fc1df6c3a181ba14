"""Parquet served at memory speed: each shard is decoded once, verified, and kept as files that can be mapped.

A Parquet page has to be decoded before its rows are an array; to do so for every batch would cost a hundred times the
gather. So the first reader of a shard writes its rows, in the form of a Zarr shard, into a folder that the user names;
all readers of this machine gather from there. All in it is derived, and may be removed at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import BuildError, CacheError, CorruptionError
from teacher_cache.signed import checked, signed
from teacher_cache.storage.base import Grid, Group, GroupReader, Store
from teacher_cache.storage.files import FileRecord, write_atomic
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.parquet_groups import LoadedShard, shard_path
from teacher_cache.storage.root import Root


class MapOfParquet:
    """Rows of a group of a Parquet cache, through maps that are made shard by shard when they are first asked for."""

    def __init__(
        self,
        root: Root,
        maps: Path,
        group: Group,
        grid: Grid,
        mapped: Store,
        records_of: Callable[[int], Mapping[str, FileRecord]],
    ) -> None:
        """Makes nothing yet.

        Args:
            root: the cache's folder.
            maps: where its maps are.
            group: whose rows.
            grid: how rows are cut.
            mapped: the store of the maps' form.
            records_of: what a shard's receipt says of its Parquet file.
        """
        self._root, self._maps, self._group, self._grid, self._store = root, maps, group, grid, mapped
        self._records_of = records_of
        self._made: dict[int, dict[str, FileRecord]] = {}
        self._reader: GroupReader = mapped.open_group(LocalRoot(maps), group, lambda shard: self._made[shard])

    @property
    def load(self) -> float:
        """The share of the maps that a process may have."""
        return self._reader.load

    def clear(self) -> None:
        """Unmaps all; the files stay."""
        self._reader.clear()

    def gather(self, part: str, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Copies rows out of the maps, into `out` where it is given."""
        for shard in np.unique(rows // self._grid.shard_rows).tolist():
            if shard not in self._made:
                self._made[shard] = self._known(shard) or self._make(shard)
        try:
            return self._reader.gather(part, rows, out)
        except CorruptionError as error:
            hint = f"It is a copy of what the cache holds: remove {self._maps}, and it is made again."
            raise CorruptionError(str(self._maps / error.field), error.rule, error.value, hint) from error

    def _place(self, shard: int) -> str:
        return f"{shard_path(self._group, shard)}.json"

    def _known(self, shard: int) -> dict[str, FileRecord] | None:
        """The files of a shard's map, where it was made of the file that the receipt tells of."""
        try:
            body = checked((self._maps / self._place(shard)).read_bytes(), self._place(shard))
        except (FileNotFoundError, NotADirectoryError, CorruptionError):
            # A map that cannot be trusted is as good as none: it is made again.
            return None
        if body["of"] != self._records_of(shard)[shard_path(self._group, shard)].digest:
            return None
        return {path: FileRecord(path, size, digest) for path, size, digest in body["files"]}

    def _make(self, shard: int) -> dict[str, FileRecord]:
        source = self._records_of(shard)[shard_path(self._group, shard)]
        loaded = LoadedShard(self._root, self._group, self._grid, shard, source)
        start, stop = self._grid.span(shard)
        columns = {part.name: loaded.gather(part.name, np.arange(stop - start)) for part in self._group.parts}
        made = {}
        try:
            for record, data in self._store.pack(self._group, shard, columns):
                write_atomic(self._maps, record.path, data)
                made[record.path] = record
            files = [[record.path, record.size, record.digest] for record in made.values()]
            write_atomic(self._maps, self._place(shard), signed({"of": source.digest, "files": files}))
        except BuildError as error:
            hint = "Free space, or name another folder: teacher_cache.open(PATH, maps=FOLDER)."
            raise CacheError(str(self._maps), error.rule, error.value, hint) from error
        return made
