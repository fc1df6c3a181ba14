"""The views of a cache: decoded from the source again and rendered from their stored parameters."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from teacher_cache.errors import MismatchError
from teacher_cache.loader import Decoded, KnownItems, ViewLoader
from teacher_cache.sources import Item, Source, open_source, source_fingerprints
from teacher_cache.spec import BuildSpec
from teacher_cache.views import Recipe, Views, open_recipe
from teacher_cache.views.operations import Params
from teacher_cache.views.student_size import Resized

if TYPE_CHECKING:
    from teacher_cache.reader import Cache


class CachedViews:
    """Opens source and recipe when they are first needed, and refuses others than the cache's."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    @cached_property
    def source(self) -> Source:
        """The data set that the cache was built over.

        Raises:
            MismatchError: the data set that is there now is another one.
        """
        spec: BuildSpec = self._cache.spec
        source, manifest = open_source(spec.source), self._cache.manifest
        hint = "Restore the data set, or open the cache with source=… where it is."
        rule = f"must begin with the {manifest.rows} samples that the cache was built over"
        if len(source) < manifest.rows:
            raise MismatchError("source", rule, f"{len(source)} samples", hint)
        # It may have grown at its end since.
        if source_fingerprints(source, [manifest.rows])[0] != manifest.segments[-1].source:
            raise MismatchError("source", rule, spec.source, hint)
        return source

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of the views.

        Raises:
            MismatchError: the libraries that `seeded-global` views depend on have changed.
        """
        manifest = self._cache.manifest
        recipe = open_recipe(self._cache.spec.views)
        if recipe.view_fingerprint != manifest.first.identity.view:
            hint = f"The cache was built with {manifest.first.versions}; use those, or native operations."
            raise MismatchError("recipe", "must give the cache's views", recipe.describe(), hint)
        return recipe

    @cached_property
    def loader(self) -> ViewLoader:
        """Decodes rows, each compared with the content digest of what the teacher saw."""
        return ViewLoader(self.recipe, self._cache.key_digests, self.item, self._cache.manifest.stops)

    @cached_property
    def _items(self) -> KnownItems:
        return KnownItems(self.source, self._cache.samples)

    def item(self, row: int) -> Item:
        """One row, decoded and compared; raises `BrokenSample` for a tombstone."""
        return self._items(row)

    def render(self, view: int, decoded: Decoded, size: Resized | None = None) -> Views:
        """One view of decoded rows, from its stored parameters; at a student's size if one is given."""
        if not decoded.images:
            manifest = self._cache.manifest
            nothing = torch.empty((0, *manifest.view_shape), dtype=torch.uint8)
            return Views(nothing, np.empty((0, len(manifest.param_names)), np.int32))
        return self.loader.views_again(decoded, self._cache.params(view, decoded.rows), size)

    def draw(self, view: int, decoded: Decoded) -> Params:
        """The parameters as they are drawn today, without looking at the stored ones."""
        return self.loader.draw(decoded, view)
