"""A cache as a stream's data: views and answers joined by row and view number, never by order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teacher_cache import Cache, Target
from teacher_cache.spec import NormalizeSpec
from teacher_cache.views import Views


class CachedRows:
    """Tombstones are left out, and only they; everything else about the cache must be sound."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.alive: NDArray[np.int64] = np.flatnonzero(cache.alive)
        self.labels = cache.labels
        self.views = cache.views
        self.fields = cache.fields
        self.fingerprint = cache.manifest.identity.whole

    @property
    def classes(self) -> int | None:
        """From the class names, or from the cached logits."""
        manifest = self.cache.manifest
        if manifest.class_names:
            return len(manifest.class_names)
        return manifest.field_shapes["logits"][0] if "logits" in manifest.field_shapes else None

    @property
    def normalize(self) -> NormalizeSpec | None:
        """What the recipe says; the teacher's own normalisation is the teacher's."""
        return self.cache.recipe.normalize

    def render(self, view: int, rows: NDArray[np.int64], check: int) -> Views:
        """Renders, and raises `ViewMismatch` when one of the first `check` views is not what the teacher saw."""
        rendered = self.cache.render_views(view, rows)
        if check:
            head = Views(rendered.pixels_BCHW[:check], rendered.params_BP[:check])
            self.cache.check_views(view, rows[:check], head)
        return rendered

    def read(self, field: str, view: int, rows: NDArray[np.int64]) -> Target:
        """Verified rows from the cache."""
        return self.cache.read(field, view, rows)
