"""What is committed of one addition: from its sealed tables, or from the receipts of a running build.

Nothing is read that is not needed: a cache may have a million shards, and a batch touches a few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.addition import Addition, Totals
from teacher_cache.errors import CorruptionError
from teacher_cache.receipts import Receipt, add_up, committed_shards, read_receipt, receipt_path
from teacher_cache.storage import FileRecord, Store, open_store
from teacher_cache.storage.parquet_tables import Strings
from teacher_cache.storage.root import Root
from teacher_cache.tables import OTHER, read_arrays

_COLUMNS = {"view": "int64", "shard": "int64", "path": "string", "size": "int64", "digest": "string"}
_VIEWS_KEPT, _RECEIPTS_KEPT = 16, 1024
"""Tables and receipts that stay in memory."""


class _Table(NamedTuple):
    """The files of one view, shard after shard in the order of the plan."""

    paths: Strings
    sizes: NDArray[np.int64]
    digests: Strings


class Index:
    """The committed shards of one addition, and what is known of their files."""

    def __init__(self, root: Root, addition: Addition) -> None:
        self.addition = addition
        self._root = root
        self._store = open_store(addition.store.kind, addition.grid)
        self._planned: Callable[[int], int] = lru_cache(_VIEWS_KEPT)(self._files_of_a_shard)
        self._table: Callable[[int], _Table] = lru_cache(_VIEWS_KEPT)(self._read_table)
        self.receipt: Callable[[int, int], Receipt] = lru_cache(_RECEIPTS_KEPT)(self._read_receipt)
        """Of an addition that is being built: the receipt of a committed (view, shard)."""
        self._shards: dict[int, NDArray[np.bool_]] = {}

    @property
    def views(self) -> range:
        """The views of the addition."""
        return self.addition.view_numbers

    @property
    def sealed(self) -> bool:
        """Whether all is there."""
        return self.addition.state == "sealed"

    def shards(self, view: int) -> NDArray[np.bool_]:
        """Which shards of a view are committed, [shards]; as they were when they were first asked for."""
        if view not in self._shards:
            everything = np.ones(self.addition.grid.shards, np.bool_)
            self._shards[view] = everything if self.sealed else committed_shards(self._root, self.addition, view)
        return self._shards[view]

    def committed(self, view: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows are in a committed shard of a view, [rows]."""
        inside = self.addition.extent.holds(rows)
        found: NDArray[np.bool_] = inside & self.shards(view)[np.where(inside, self.addition.shards_of(rows), 0)]
        return found

    def totals(self) -> Totals:
        """What the build met; of the shards that are committed, while it runs."""
        if self.addition.totals is not None:
            return self.addition.totals
        return add_up(self.addition, (self.receipt(view, shard) for view, shard in self.places()))

    def places(self) -> Iterator[tuple[int, int]]:
        """Every (view, shard) that is committed, in order."""
        for view in self.addition.view_numbers:
            for shard in np.flatnonzero(self.shards(view)).tolist():
                yield view, shard

    def files(self, view: int, shard: int) -> Mapping[str, FileRecord]:
        """What is known of the files of a committed shard, by path.

        Raises:
            CorruptionError: the table or the receipt that says it is not what was written.
        """
        if not self.sealed:
            return {record.path: record for record in self.receipt(view, shard).files}
        table, each = self._table(view), self._planned(view)
        span = slice(shard * each, (shard + 1) * each)
        records = zip(table.paths[span], table.sizes[span].tolist(), table.digests[span], strict=True)
        return {path: FileRecord(path, size, digest) for path, size, digest in records}

    def planned(self, view: int, shard: int) -> list[str]:
        """The files that a shard of a view has, whatever its receipt says."""
        return planned_files(self.addition, self._store, view, shard)

    def _files_of_a_shard(self, view: int) -> int:
        return len(self.planned(view, 0))

    def _read_receipt(self, view: int, shard: int) -> Receipt:
        return read_receipt(self._root, receipt_path(view, shard), self.addition)

    def _read_table(self, view: int) -> _Table:
        reference = self.addition.receipts[view - self.addition.view_numbers.start]
        columns = read_arrays(self._root, reference, _COLUMNS)
        each, shards, named = self._planned(view), self.addition.grid.shards, np.asarray(columns["shard"])
        if not np.array_equal(named, np.repeat(np.arange(shards), each)) or (np.asarray(columns["view"]) != view).any():
            rule = f"must name {each} files of view {view} for each of {shards} shards"
            raise CorruptionError(reference.path, rule, f"{len(named)} files", OTHER)
        paths, digests = columns["path"], columns["digest"]
        assert isinstance(paths, Strings)
        assert isinstance(digests, Strings)
        return _Table(paths, np.asarray(columns["size"]), digests)


def planned_files(addition: Addition, store: Store, view: int, shard: int) -> list[str]:
    """The files that a shard of a view has, in the order in which they are written."""
    return [path for group in addition.groups(view) for path in store.paths(group, shard)]
