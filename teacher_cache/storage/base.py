"""What every store offers: arrays of one shard to files, and files back to rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Columns, Part
from teacher_cache.errors import CorruptionError
from teacher_cache.storage.files import FileRecord


@dataclass(frozen=True)
class Group:
    """Arrays that are written together, shard by shard: one field of one teacher in one view, or a view's proof."""

    path: str
    """Below `data/`: `teachers/<teacher>/<field>/v0003` or `views/v0003`."""
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Grid:
    """How rows are cut into shards and chunks."""

    rows: int
    shard_rows: int
    chunk_rows: int

    @property
    def shards(self) -> int:
        """How many shards cover the rows; the last may be ragged."""
        return -(-self.rows // self.shard_rows)

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard and the row after its last."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.rows)


class ShardReader(Protocol):
    """Rows of one group in one shard. Safe to use from one thread; cheap to open in every process."""

    def gather(self, part: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows (counted from the shard's first) of one part, verified; raises `CorruptionError`."""


class Store(Protocol):
    """Step 5's file format. Pure: packing the same arrays gives the same bytes."""

    def metadata(self, groups: Sequence[Group]) -> Mapping[str, bytes]:
        """Files that belong to no shard, by path below the root."""

    def paths(self, group: Group, shard: int) -> list[str]:
        """The files that `pack` makes."""

    def pack(self, group: Group, shard: int, columns: Columns) -> list[tuple[FileRecord, bytes]]:
        """The arrays [rows, ...] of one shard of one group to files."""

    def damage(
        self, root: Path, group: Group, shard: int, records: Mapping[str, FileRecord]
    ) -> Iterator[CorruptionError]:
        """Reads every byte of what `pack` made, and gives one error for each file that is not what it was."""

    def open_shard(self, root: Path, group: Group, shard: int, records: Mapping[str, FileRecord]) -> ShardReader:
        """Opens what `pack` made; `records` maps paths to what the receipt says of them."""


def field_path(field: str) -> str:
    """A field's name as a folder: `feature:layer3` becomes `feature=layer3` (a colon is not portable)."""
    return field.replace(":", "=")
