"""Where a stream's rows come from: a cache, or labelled views of a source when there is no teacher to read."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Target
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.fingerprint import fingerprint, key_digests
from teacher_cache.sources import BrokenSample, open_source, source_fingerprint
from teacher_cache.spec import NormalizeSpec, SourceSpec, ViewSpec
from teacher_cache.views import Views, open_recipe, render_views


class Rows(Protocol):
    """What a stream needs of its data; `teacher_cache.Cache` (through `CachedRows`) and `LabelledRows` offer it.

    Deterministic and picklable; a cache is opened again in every worker process, a source travels there.
    """

    @property
    def alive(self) -> NDArray[np.int64]:
        """The row numbers that have data."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers by row number, or None."""

    @property
    def classes(self) -> int | None:
        """How many classes there are, where that is known."""

    @property
    def views(self) -> int | None:
        """How many views of each row there are; None when any view number can be rendered."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that `read` knows."""

    @property
    def fingerprint(self) -> str:
        """Names everything that a batch is made of: a run goes on only over the same data."""

    @property
    def normalize(self) -> NormalizeSpec | None:
        """What the recipe says of normalisation."""

    def render(self, view: int, rows: NDArray[np.int64], check: int) -> Views:
        """The views of some rows; the first `check` of them are compared with what the teacher saw."""

    def read(self, field: str, view: int, rows: NDArray[np.int64]) -> Target:
        """The cached answers for some rows."""


class LabelledRows:
    """Seeded views of a labelled source, without a cache: to train a teacher, or to evaluate anything.

    Any view number can be rendered, so each epoch can have a fresh view.
    """

    def __init__(self, source: SourceSpec, views: ViewSpec) -> None:
        self._source, self._recipe = open_source(source), open_recipe(views)
        self._digests = key_digests(self._source.keys)
        self.alive: NDArray[np.int64] = np.arange(len(self._source))
        self.labels = self._source.labels
        self.classes = len(self._source.class_names) if self._source.class_names else None
        self.views = None if self._recipe.random else 1
        self.fields: tuple[str, ...] = ()
        self.normalize = self._recipe.normalize
        identity = {"source": source_fingerprint(self._source), "view": self._recipe.view_fingerprint}
        self.fingerprint = fingerprint("labelled-rows", 1, identity)

    def render(self, view: int, rows: NDArray[np.int64], check: int) -> Views:
        """Decodes and renders; there is no teacher whose views `check` could compare with."""
        images = []
        for row in rows.tolist():
            try:
                images.append(self._source.item(row).image_CHW)
            except BrokenSample as broken:
                hint = "Remove it from the source: without a cache there are no tombstones."
                raise SpecError(self._source.keys[row], "must be decodable", broken, hint) from broken
        return render_views(self._recipe, images, self._digests[rows], view)

    def read(self, field: str, view: int, rows: NDArray[np.int64]) -> Target:
        """Always refused: there is no cache."""
        hint = "Give the stream a cache that holds it."
        raise MismatchError("field", "cannot be read without a cache", field, hint)
