"""What every store offers: arrays of one shard to files, and files back to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Columns, Part
from teacher_cache.errors import CorruptionError
from teacher_cache.storage.files import FileRecord
from teacher_cache.storage.root import Root

COUNT = "count"
"""The part that says how many places of each row are filled, in a group with ragged parts."""
OFFSETS = "offsets"
"""The array that stands on disk for it, in Zarr."""


@dataclass(frozen=True)
class Group:
    """Arrays that are written together, shard by shard: one field of one teacher in one view, or a view's proof."""

    path: str
    """Below `data/`: `teachers/<teacher>/<field>/v0003` or `views/v0003`."""
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.ragged:
            return
        counts = [part for part in self.parts if part.name == COUNT]
        if counts != [Part(COUNT, "uint32", ())]:
            raise ValueError(f"ragged parts need one part `{COUNT}`, uint32 and of shape (), {self.path=}, {counts=}")
        if any(part.name == OFFSETS for part in self.parts):
            raise ValueError(f"`{OFFSETS}` is taken in a group with ragged parts, {self.path=}")
        if len({part.shape for part in self.ragged}) > 1:
            raise ValueError(f"ragged parts of a group must have one shape, {self.path=}, {self.ragged=}")

    @property
    def ragged(self) -> tuple[Part, ...]:
        """The parts whose rows differ in length."""
        return tuple(part for part in self.parts if part.ragged)

    @property
    def cap(self) -> int:
        """How many places a ragged row has; 0 where no part is ragged."""
        return self.ragged[0].shape[0] if self.ragged else 0


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


class GroupReader(Protocol):
    """Rows of one group. Safe to use from one thread, and after a fork; cheap to open in every process."""

    @property
    def load(self) -> float:
        """The share that it takes of what a process may keep open."""

    def clear(self) -> None:
        """Lets go of everything; what is asked for next is opened and checked anew."""

    def gather(self, part: str, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows of one part, verified, in the order asked for, repeats too.

        Args:
            part: one of the group's.
            rows: row numbers of committed shards.
            out: C-contiguous [rows, ...] of the part's type to be filled; a new array where not given.

        Raises:
            CorruptionError: what was committed is not there, or not what it was.
        """


class Store(Protocol):
    """Step 5's file format. Pure: packing the same arrays gives the same bytes."""

    def metadata(self, groups: Sequence[Group]) -> Mapping[str, bytes]:
        """Files that belong to no shard, by path below the root."""

    def paths(self, group: Group, shard: int) -> list[str]:
        """The files that `pack` makes."""

    def pack(self, group: Group, shard: int, columns: Columns) -> list[tuple[FileRecord, bytes]]:
        """The arrays [rows, ...] of one shard of one group to files."""

    def damage(
        self, root: Root, group: Group, shard: int, records: Mapping[str, FileRecord]
    ) -> Iterator[CorruptionError]:
        """Reads every byte of what `pack` made, and gives one error for each file that is not what it was."""

    def open_group(
        self, root: Root, group: Group, records_of: Callable[[int], Mapping[str, FileRecord]]
    ) -> GroupReader:
        """Opens what `pack` made of all shards; `records_of` gives what a receipt says of a shard's files, by path."""


def field_path(field: str) -> str:
    """A field's name as a folder: `feature:layer3` becomes `feature=layer3` (a colon is not portable)."""
    return field.replace(":", "=")
