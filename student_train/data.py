"""Where a stream's rows come from: a cache, or labelled views of a source when there is no teacher to read."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Target
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.fingerprint import fingerprint, key_digests
from teacher_cache.loader import Decoded, ViewLoader
from teacher_cache.sources import open_source, source_fingerprint
from teacher_cache.spec import NormalizeSpec, SourceSpec, ViewSpec
from teacher_cache.views import Views, open_recipe


@dataclass(frozen=True)
class Rendered:
    """One view of some decoded rows."""

    view: int
    """Its number."""
    views: Views
    partner_rows: NDArray[np.int64] | None
    """With which rows they are mixed, where the recipe mixes."""


class Rows(Protocol):
    """What a stream needs of its data: `CachedRows`, `OwnViews` and `LabelledRows` offer it.

    A stream counts the views that it shows of each row: 0, 1, 2, …; which view of the recipe, and which cached
    answer, belongs to a number is the data's affair. Deterministic and picklable; a cache is opened again in every
    worker process, a source travels there.
    """

    alive: NDArray[np.int64]
    """The row numbers that have data."""

    @property
    def key_digests(self) -> NDArray[np.uint64]:
        """Of the samples' stable keys, by row number."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers by row number, or None."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """What the class numbers mean, in their order, where that is known."""

    @property
    def classes(self) -> int | None:
        """How many classes there are, where that is known."""

    @property
    def views(self) -> int | None:
        """How many different views of each row there are; None when any number can be rendered."""

    @property
    def provable(self) -> bool:
        """Whether the views are the teacher's, so that they can be compared with what it saw."""

    @property
    def mixes(self) -> bool:
        """Whether a row's view shows other rows, too."""

    @property
    def fingerprint(self) -> str:
        """Names what a batch is made of: a run goes on only over the same data.

        Of a source without a cache it costs no pass over the data, so it is made of keys and sizes: pixels that were
        changed in place are not noticed.
        """

    @property
    def normalize(self) -> NormalizeSpec | None:
        """What the recipe says of normalisation."""

    def shape_of(self, field: str) -> tuple[int, ...]:
        """One row of a cached field, before encoding."""

    def require(self, fields: Sequence[str]) -> None:
        """Raises `MismatchError` naming the first of these fields that cannot be read beside every view."""

    def decode(self, rows: NDArray[np.int64]) -> Decoded:
        """Decodes rows, once for any number of their views."""

    def render(self, decoded: Decoded, number: int, check: NDArray[np.int64]) -> Rendered:
        """One view of decoded rows; those at the places `check` are compared with what the teacher saw."""

    def read(self, field: str, number: int, rows: NDArray[np.int64]) -> Target:
        """The cached answers for some rows."""


R = TypeVar("R", bound=Rows)


def only(data: R, rows: NDArray[np.int64]) -> R:
    """The same data without all other rows; what is left is read and rendered as before."""
    narrowed = copy(data)
    narrowed.alive = rows
    return narrowed


class LabelledRows:
    """Seeded views of a labelled source, without a cache: to train a teacher, or to evaluate anything.

    Any view number can be rendered, so each epoch can have a fresh view.
    """

    provable = False

    def __init__(self, source: SourceSpec, views: ViewSpec) -> None:
        opened, recipe = open_source(source), open_recipe(views)
        self._keys = opened.keys
        self.key_digests: NDArray[np.uint64] = key_digests(opened.keys)
        self._loader = ViewLoader(recipe, self.key_digests, opened.item)
        self.alive: NDArray[np.int64] = np.arange(len(opened))
        self.labels = opened.labels
        self.class_names = opened.class_names
        self.classes = len(opened.class_names) if opened.class_names else None
        self.views = None if recipe.random else 1
        self.mixes = recipe.mixing is not None
        self.normalize = recipe.normalize
        identity = {"source": source_fingerprint(opened), "view": recipe.fingerprint}
        self.fingerprint = fingerprint("labelled-rows", 1, identity)

    def shape_of(self, field: str) -> tuple[int, ...]:
        """Always refused: there is no cache."""
        hint = "Give the stream a cache that holds it."
        raise MismatchError("field", "has no shape without a cache", field, hint)

    def require(self, fields: Sequence[str]) -> None:
        """Refuses any: there is no cache."""
        for field in fields:
            self.read(field, 0, self.alive[:0])

    def decode(self, rows: NDArray[np.int64]) -> Decoded:
        """Every row must be decodable: without a cache there are no tombstones."""
        decoded = self._loader.decode(rows)
        for row, reason in decoded.broken:
            hint = "Remove it from the source: without a cache there are no tombstones."
            raise SpecError(self._keys[row], "must be decodable", reason, hint)
        return decoded

    def render(self, decoded: Decoded, number: int, check: NDArray[np.int64]) -> Rendered:
        """Renders; the stream asks for no check, as there is no teacher."""
        assert not len(check), "the stream knows that these views are not provable"
        view = 0 if self.views == 1 else number
        views = self._loader.views(decoded, view)
        return Rendered(view, views, self._loader.partner_rows(views))

    def read(self, field: str, number: int, rows: NDArray[np.int64]) -> Target:
        """Always refused: there is no cache."""
        hint = "Give the stream a cache that holds it."
        raise MismatchError("field", "cannot be read without a cache", field, hint)
