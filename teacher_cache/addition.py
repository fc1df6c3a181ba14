"""One addition to a cache: some views of a stretch of rows, answered for some fields of one teacher.

A cache begins with one addition and grows by further ones; nothing that an earlier one wrote is touched. Each says all
that decides its bytes, and its rows are cut into shards of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Encoding, Part, Shared, open_encoding
from teacher_cache.encodings.calibration import Calibration
from teacher_cache.fingerprint import fingerprint
from teacher_cache.spec import FieldSpec, StoreSpec, Strict
from teacher_cache.storage import Grid, Group, field_path

FORMAT_VERSION = 2


class Identity(Strict):
    """Fingerprints of everything that decides a byte of an addition."""

    source: str
    """Of all rows up to the addition's last: a mixed view's partner may be any of them."""
    recipe: str
    view: str
    teacher: str
    encoding: str
    store: str
    numerics: str
    extent: str
    """Which rows, views and fields, and whether the views' proof is written with them."""

    @property
    def whole(self) -> str:
        """One fingerprint over all of them and the format's version: every receipt carries it."""
        return fingerprint("addition", FORMAT_VERSION, self.model_dump())


class TableRef(Strict):
    """A table beside the manifest, by name and digest."""

    path: str
    digest: str


class Totals(Strict):
    """What an addition's build met, added up from the receipts when sealing."""

    bytes: int
    tombstones: int
    labelled: int
    correct: int
    fidelity: dict[str, dict[str, float]]


class Extent(Strict):
    """A block of answers: views × rows × fields."""

    first_row: int
    rows: int
    first_view: int
    views: int
    teacher: str
    fields: tuple[str, ...]
    """Sorted."""
    proof: bool
    """Whether the views' digests and parameters are part of it: not where an earlier addition made the same views."""

    @property
    def stop_row(self) -> int:
        """The row after the last."""
        return self.first_row + self.rows

    def holds(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows are in it."""
        found: NDArray[np.bool_] = (rows >= self.first_row) & (rows < self.stop_row)
        return found

    @property
    def view_numbers(self) -> range:
        """The views, by their numbers in the recipe."""
        return range(self.first_view, self.first_view + self.views)

    @property
    def fingerprint(self) -> str:
        """Names the block."""
        return fingerprint("extent", 1, self.model_dump(mode="json"))


class Addition(Strict):
    """What one addition is. Derived things (groups, encodings, grid) are properties."""

    state: Literal["building", "sealed"]
    identity: Identity
    extent: Extent
    view_shape: tuple[int, int, int]
    param_names: tuple[str, ...]
    promise: str
    recipe: Any
    fields: dict[str, FieldSpec]
    field_shapes: dict[str, tuple[int, ...]]
    micro_batch_asked: int | None = None
    """What the configuration said, where planning had to make `spec.teacher.micro_batch` smaller (`on_oom: halve`)."""
    calibration: Calibration | None = None
    constants: TableRef | None = None
    class_names: tuple[str, ...] | None
    store: StoreSpec
    spec: dict[str, Any]
    versions: dict[str, str]
    receipts: tuple[TableRef, ...] = ()
    """Of a sealed addition one for each view."""
    totals: Totals | None = None

    @property
    def rows(self) -> int:
        """How many."""
        return self.extent.rows

    @property
    def teacher(self) -> str:
        """Its name in paths."""
        return self.extent.teacher

    @property
    def view_numbers(self) -> range:
        """The views, by their numbers in the recipe."""
        return self.extent.view_numbers

    @property
    def grid(self) -> Grid:
        """How its rows are cut; the grid counts them from 0."""
        return Grid(self.extent.rows, self.store.shard_rows, self.store.chunk_rows)

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard and the row after its last, as the cache numbers rows."""
        start, stop = self.grid.span(shard)
        return self.extent.first_row + start, self.extent.first_row + stop

    def shard_of(self, row: int) -> int:
        """The shard that a row of the cache is in."""
        return (row - self.extent.first_row) // self.store.shard_rows

    def shards_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shards that rows of the cache are in; those of rows that it does not hold are no shards."""
        found: NDArray[np.int64] = (rows - self.extent.first_row) // self.store.shard_rows
        return found

    @cached_property
    def encodings(self) -> dict[str, Encoding]:
        """The encoding of each field, as far as its name and its parts."""
        return self.open_encodings({})

    def open_encodings(self, constants: Mapping[str, Shared]) -> dict[str, Encoding]:
        """The encoding of each field; `constants` are what the rows of a field share, by field."""
        return {
            name: open_encoding(field.fixed, self.field_shapes[name], name, constants.get(name))
            for name, field in self.fields.items()
        }

    def proof_group(self, view: int) -> Group:
        """The pixel digests and resolved parameters of one view."""
        parts = [Part("digest", "uint64", ())]
        if self.param_names:
            parts.append(Part("params", "int32", (len(self.param_names),)))
        return Group(f"views/{self._place(view)}", tuple(parts))

    def field_group(self, field: str, view: int) -> Group:
        """The arrays of one field in one view."""
        path = f"teachers/{self.teacher}/{field_path(field)}/{self._place(view)}"
        return Group(path, self.encodings[field].parts)

    def _place(self, view: int) -> str:
        first = self.extent.first_row
        return f"v{view:04d}-r{first:09d}" if first else f"v{view:04d}"

    def groups(self, view: int) -> list[Group]:
        """Everything that one shard of a view writes."""
        proof = [self.proof_group(view)] if self.extent.proof else []
        return [*proof, *(self.field_group(field, view) for field in self.fields)]

    @property
    def all_groups(self) -> list[Group]:
        """Those of all its views."""
        return [group for view in self.view_numbers for group in self.groups(view)]
