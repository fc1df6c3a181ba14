"""A cache as a stream's data: views and answers joined by row and view number, never by order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_train.data import Rendered
from teacher_cache import Cache, Target
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.fingerprint import fingerprint
from teacher_cache.loader import Decoded, ViewLoader
from teacher_cache.proof import Tolerance
from teacher_cache.spec import NormalizeSpec, ViewSpec
from teacher_cache.views import Views, open_recipe
from teacher_cache.views.student_size import at_size


class _Cached:
    """What all kinds of cached rows share: number n reads the cached view n mod K."""

    def __init__(self, cache: Cache, first_views: int | None = None) -> None:
        if first_views is not None and not 1 <= first_views <= cache.views:
            hint = "Choose fewer, or build more views."
            raise SpecError("first_views", f"must be in 1..{cache.views}, the cached views", first_views, hint)
        self.cache = cache
        self.cached_views = first_views or cache.views
        """K: how many of the cached views are read."""
        self.alive: NDArray[np.int64] = np.flatnonzero(cache.alive)
        self.labels = cache.labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In the order of the labels, and of the teacher's head."""
        return self.cache.manifest.class_names

    @property
    def classes(self) -> int | None:
        """From the class names, or from the cached logits."""
        if self.class_names:
            return len(self.class_names)
        return self.cache.shape_of("logits")[-1] if "logits" in self.cache.fields else None

    @property
    def key_digests(self) -> NDArray[np.uint64]:
        """Of the samples' stable keys, by row number."""
        return self.cache.key_digests

    def shape_of(self, field: str) -> tuple[int, ...]:
        """One row of a cached field, before encoding."""
        return self.cache.shape_of(field)

    def require(self, fields: Sequence[str]) -> None:
        """Of a cache that has grown, a field may have fewer views than another: a stream would stop at the first."""
        for field in fields:
            found = self.cache.views_of(field)
            if found < self.cached_views:
                hint = "Build the rest: raise `views.count` in its teacher's configuration, and build again."
                raise MismatchError(field, f"must have the {self.cached_views} views that are read", found, hint)

    def decode(self, rows: NDArray[np.int64]) -> Decoded:
        """Decodes, and raises `MismatchError` where a sample's bytes have changed since the teacher saw it."""
        return self.cache.decode(rows)

    def read(self, field: str, number: int, rows: NDArray[np.int64]) -> Target:
        """Verified rows from the cache."""
        return self.cache.read(field, number % self.cached_views, rows)

    def _named(self, kind: str, **besides: Any) -> str:
        """The cache's identity with what is done to it; what earlier releases could not do is left out where unused."""
        fewer = {} if self.cached_views == self.cache.views else {"first_views": self.cached_views}
        return fingerprint(kind, 1, {"cache": self.cache.manifest.whole, **besides, **fewer})


class CachedRows(_Cached):
    """The views that the teacher saw, proven. Tombstones are left out, and only they."""

    provable = True

    def __init__(
        self,
        cache: Cache,
        *,
        size: int | tuple[int, int] | None = None,
        tolerance: Tolerance = "exact",
        first_views: int | None = None,
    ) -> None:
        """Joins nothing yet.

        Args:
            cache: an open cache.
            size: the student's own input size, where the recipe allows one; the teacher's if not given.
            tolerance: `exact`, or `rounding` to go on where another library or processor rounds otherwise.
            first_views: use only so many of the cached views; 1 freezes what the student sees.

        Raises:
            SpecError: the recipe does not allow another size, or there are not so many views.
        """
        super().__init__(cache, first_views)
        self.views: int = self.cached_views
        self._tolerance, self._size = tolerance, size
        self._resized = None if size is None else at_size(cache.recipe, size)
        self._digests: dict[int, NDArray[np.uint64]] = {}

    @property
    def fingerprint(self) -> str:
        """The cache's identity, and the student's size where it has its own."""
        if self._resized is not None:
            return self._named("cached-rows", size=self._resized.after)
        return self.cache.manifest.whole if self.views == self.cache.views else self._named("cached-rows")

    @property
    def mixes(self) -> bool:
        """As the recipe says."""
        return self.cache.recipe.mixing is not None

    @property
    def normalize(self) -> NormalizeSpec | None:
        """What the recipe says; the teacher's own normalisation is the teacher's."""
        return self.cache.recipe.normalize

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_digests": {}}

    def render(self, decoded: Decoded, number: int, check: NDArray[np.int64]) -> Rendered:
        """Renders, and raises `ViewMismatch` when a checked view is not what the teacher saw."""
        view = number % self.views
        rendered = self.cache.render_views(view, decoded, self._resized)
        if len(check):
            self._check(view, decoded, rendered, check)
        return Rendered(view, rendered, self.cache.loader.partner_rows(rendered))

    def _check(self, view: int, decoded: Decoded, rendered: Views, places: NDArray[np.int64]) -> None:
        if self._resized is None:
            proven = Views(rendered.pixels_BCHW[places], rendered.params_BP[places])
        else:
            # At another size pixels cannot be compared: the checked rows are rendered once more, at the teacher's.
            proven = self.cache.render_views(view, decoded.at(places))
        rows = decoded.rows[places]
        if (proven.digests() != self._known(view)[rows]).any():
            self.cache.check_views(view, rows, proven, self._tolerance)

    def _known(self, view: int) -> NDArray[np.uint64]:
        """The digests of one view by row number, read at once: a batch's own few would cost more than their proof."""
        if view not in self._digests:
            known = np.zeros(len(self.cache), np.uint64)
            known[self.alive] = self.cache.digests(view, self.alive)
            self._digests[view] = known
            while len(self._digests) > max(_KEPT, _KEPT_BYTES // known.nbytes):
                del self._digests[next(iter(self._digests))]
        return self._digests[view]


_KEPT, _KEPT_BYTES = 8, 2**27
"""Views whose digests are kept at hand, 8 bytes a row each: so many, or as many as take so many bytes."""


class OwnViews(_Cached):
    """Answers from a cache, views from the student's own recipe: the fixed and the independent teacher.

    Number n shows view n of the student's recipe beside the cached view n mod K: with K = 1 the teacher is fixed,
    with more it is independent of the student (Beyer et al., "Knowledge distillation: a good teacher is patient and
    consistent", 2022, section 3.1). There is nothing to prove: these are not the views that the teacher saw.
    """

    provable = False
    mixes = False

    def __init__(self, cache: Cache, views: ViewSpec, *, first_views: int | None = None) -> None:
        super().__init__(cache, first_views)
        recipe = open_recipe(views)
        if recipe.mixing is not None:
            hint = "Mix in the cache's own recipe, where the teacher sees the mixed views."
            raise SpecError("views", "must not mix: the cached answers are for samples alone", recipe.describe(), hint)
        self.views: int | None = None if recipe.random else self.cached_views
        self.normalize = recipe.normalize
        self._loader = ViewLoader(recipe, cache.key_digests, cache.item)
        self.fingerprint = self._named("own-views", view=recipe.fingerprint)

    def render(self, decoded: Decoded, number: int, check: NDArray[np.int64]) -> Rendered:
        """Renders the student's own view."""
        assert not len(check), "the stream knows that these views are not provable"
        return Rendered(number, self._loader.views(decoded, number), None)


class WithoutAnswers(OwnViews):
    """A cache's samples as a recipe without randomness shows them: to measure on rows that nothing is trained on."""

    def __init__(self, cache: Cache, views: ViewSpec) -> None:
        super().__init__(cache, views)
        # The recipe gives one view; that the cache has more answers beside it does not matter here.
        self.views = self.views and 1

    def require(self, fields: Sequence[str]) -> None:
        """Refuses any field: the answers are for other views."""
        for field in fields:
            raise MismatchError(field, "must be of the views that are shown", "another recipe", "Read no field.")
