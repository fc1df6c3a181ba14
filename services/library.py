"""What a served teacher knows without being asked: its data set by key, the views of it, and the cache's answers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.held import Held, held_by
from services.pixel_index import PixelIndex, Place
from services.rendered import Rendered, render
from services.schemas import DatasetCard
from teacher_cache.errors import CacheNotFoundError, MismatchError
from teacher_cache.fingerprint import fingerprint, key_digests
from teacher_cache.loader import KnownItems, ViewLoader
from teacher_cache.manifest import Manifest, read_manifest
from teacher_cache.plan import Opened
from teacher_cache.reader import Cache
from teacher_cache.sources import source_fingerprint
from teacher_cache.spec import StoreSpec
from teacher_cache.storage import Grid

_LOOK_SECONDS = 5.0
"""Between two looks at whether the cache has grown."""


class MicroBatch(NamedTuple):
    """Rows that a build asks its teacher about together."""

    view: int
    start: int
    stop: int


class Library:
    """Used in one thread at a time; what it reads may block."""

    def __init__(self, opened: Opened, *, cached: bool) -> None:
        """Opens the cache that the configuration names, where it is there.

        Args:
            opened: the parts of the configuration.
            cached: whether answers may come from the cache at all.

        Raises:
            CacheError: it cannot be trusted, or holds other views or other samples than the configuration's.
        """
        self._opened, self._cached = opened, cached
        self._order = np.argsort(opened.digests)
        self._sorted = opened.digests[self._order]
        self._cache: Cache | None = None
        self._seen: Manifest | None = None
        """That of the cache when it was opened."""
        self._index: PixelIndex | None = None
        self.held: Held = {}
        """The fields of which the cache has this teacher's answers."""
        self._take(None)
        self._looked = -math.inf
        self.refresh()

    @property
    def dataset(self) -> str:
        """What policies call it."""
        source = self._opened.spec.source
        return source.dataset if source.kind == "torchvision" else source.kind

    def card(self) -> DatasetCard:
        """What may be named, and what is there now."""
        self.refresh()
        return DatasetCard(
            name=self.dataset,
            samples=self.samples,
            recipe=self.recipe,
            cached_views=self.views,
            encodings={field: ways[0].encoding.name for field, ways in self.held.items()},
        )

    @property
    def samples(self) -> int:
        """How many samples may be named."""
        return len(self._opened.source)

    @property
    def views(self) -> int:
        """How many views of some sample the cache holds or is to hold."""
        return 0 if self._cache is None else self._cache.views

    @property
    def planned_views(self) -> int:
        """How many the configuration asks for, or the cache has."""
        return max(self.views, self._opened.spec.views.count)

    @property
    def recipe(self) -> str:
        """Fingerprint of the views."""
        return self._opened.recipe.view_fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """Names the samples and their views."""
        spec, opened = self._opened.spec.source.model_dump(mode="json"), self._opened
        # Its place, too: data sets with the same names and sizes may hold other images.
        return fingerprint(
            "library", 1, {"source": source_fingerprint(opened.source), "spec": spec, "recipe": self.recipe}
        )

    def refresh(self) -> None:
        """Takes in what was built since; looks at most every few seconds.

        Raises:
            CacheError: as when it was opened first.
        """
        now = time.monotonic()
        if not self._cached or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        cache, seen = self._cache, self._seen
        # A cache that was sealed meanwhile takes that in by itself, and what is made of it here has to follow.
        if cache is None or seen is None or seen.state != "sealed" or read_manifest(cache.root) != seen:
            self.reopen()

    def reopen(self) -> None:
        """Opens the cache anew, whatever is known of it: files that were mended are read again. Raises `CacheError`."""
        if not self._cached:
            return
        try:
            self._take(self._fitting(Cache(self._opened.spec.cache)))
        except CacheNotFoundError:
            self._take(None)

    def _take(self, cache: Cache | None) -> None:
        opened, seen = self._opened, self._seen
        self._cache, self._seen = cache, None if cache is None else cache.manifest
        if cache is None:
            self._loader, self._stops, self.held = opened.loader, [self.samples], {}
        else:
            self._stops = sorted({*cache.manifest.stops, self.samples})
            item = KnownItems(opened.source, cache.samples)
            self._loader = ViewLoader(opened.recipe, opened.digests, item, self._stops)
            self.held = held_by(cache, opened)
        # While a build runs, only what is there when it seals is looked for by its pixels.
        if self._seen is None or self._seen != seen:
            self._index = None

    def _fitting(self, cache: Cache) -> Cache:
        hint = "Point the configuration at another cache, or serve without one: --set service.from_cache=false."
        theirs, ours = cache.manifest.first.identity.view, self.recipe
        if theirs != ours:
            raise MismatchError("cache", f"must hold the configuration's views, {ours}", theirs, hint)
        if len(cache) > self.samples or not np.array_equal(cache.key_digests, self._opened.digests[: len(cache)]):
            rule = "must be built over the first samples of the configuration's source"
            raise MismatchError("cache", rule, f"{len(cache)} others", hint)
        return cache

    def rows_of(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Row numbers, [len(keys)]; −1 for a key that the data set has not."""
        digests = key_digests(list(keys))
        places = np.searchsorted(self._sorted, digests).clip(max=len(self._sorted) - 1)
        rows = self._order[places].astype(np.int64)
        names = self._opened.source.keys
        # Two different keys may share a digest, about once in 2⁶⁴ pairs.
        same = [names[int(row)] == key for row, key in zip(rows, keys, strict=True)]
        return np.where(same, rows, -1)

    def digests(self, view: int, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Of the pixels that the teacher saw, of rows that the cache holds."""
        assert self._cache is not None, "it holds them"
        return self._cache.digests(view, rows)

    @property
    def cache(self) -> Cache:
        """The cache; only where something is `held`."""
        assert self._cache is not None, "it holds something"
        return self._cache

    def broken(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows a build has found to have no image, [rows]."""
        reasons = [] if self._cache is None else list(self._cache.samples.reasons)
        return np.isin(rows, reasons)

    def micro_batch_of(self, view: int, row: int) -> MicroBatch:
        """The rows among which a build has computed, or will compute, a row of a view."""
        stops = self._stops
        segment = int(np.searchsorted(stops, row, side="right"))
        first = stops[segment - 1] if segment else 0
        store = self._store_of(first, view)
        grid = Grid(stops[segment] - first, store.shard_rows, store.chunk_rows)
        start, stop = grid.span((row - first) // store.shard_rows)
        start, stop, size = first + start, first + stop, self._opened.spec.teacher.micro_batch
        begin = start + (row - start) // size * size
        return MicroBatch(view, begin, min(begin + size, stop))

    def _store_of(self, first_row: int, view: int) -> StoreSpec:
        """How the cache cuts the rows of a segment in a view; or, where it has none of them, how a build will."""
        if self._cache is not None:
            for item in self._cache.manifest.additions:
                mine = item.identity.teacher == self._opened.teacher.fingerprint
                if mine and item.extent.first_row == first_row and view in item.view_numbers:
                    return item.store
        return self._opened.spec.store

    def has_view(self, view: int) -> bool:
        """Whether there is such a view: of a recipe that draws nothing there is but one."""
        return view == 0 or self._opened.recipe.random

    def render(self, view: int, rows: Sequence[int], shape: tuple[int, int, int]) -> Rendered:
        """Views of rows, uint8 [rows, *shape]; the cache need not hold them. Raises as `rendered.render` does."""
        return render(self._cache, self._loader, self._stops, view, rows, shape)

    def find(self, images_BCHW: Tensor) -> list[Place | None]:
        """Where the cache has images, uint8 [B, C, H, W], compared pixel by pixel."""
        if self._cache is None:
            return [None] * len(images_BCHW)
        if self._index is None:
            self._index = PixelIndex(self._cache)
        found = self._index.find(images_BCHW)
        for view in {place.view for place in found if place is not None}:
            here = [number for number, place in enumerate(found) if place is not None and place.view == view]
            rows = [place.row for place in (found[number] for number in here) if place is not None]
            same = self._cache.render_views(view, rows).pixels_BCHW.eq(images_BCHW[here]).flatten(1).all(1)
            for number, equal in zip(here, same.tolist(), strict=True):
                found[number] = found[number] if equal else None
        return found
