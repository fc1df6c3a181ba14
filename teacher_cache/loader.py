"""Decoding rows and rendering their views: what the build, the reader and the student share.

A row is decoded once and any number of its views are made from it (the trick of FKD, Shen and Xing 2022): views
take the decoded rows, not row numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.errors import CorruptionError, MismatchError
from teacher_cache.samples import Samples
from teacher_cache.sources import BrokenSample, Item, Source
from teacher_cache.views import How, Pool, Recipe, Views, render_again, render_views
from teacher_cache.views.drawing import image_sizes
from teacher_cache.views.operations import Params
from teacher_cache.views.rendering import FASTEST
from teacher_cache.views.student_size import Resized


@dataclass(frozen=True)
class Decoded:
    """Some rows of a source, decoded."""

    rows: NDArray[np.int64]
    """Those that could be decoded, in the order asked for."""
    images: list[Tensor]
    """uint8 [C, H, W] of each, sizes may differ."""
    content: NDArray[np.uint64]
    """Digest of the stored bytes of each."""
    broken: list[tuple[int, str]]
    """(row, reason) of those that could not."""

    def at(self, places: NDArray[np.int64]) -> Decoded:
        """Some of those that could be decoded."""
        return Decoded(self.rows[places], [self.images[place] for place in places], self.content[places], [])


class KnownItems:
    """The items of a source, each compared with what a cache knows of it. As safe to share as the source is."""

    def __init__(self, source: Source, samples: Samples) -> None:
        self._source, self._samples = source, samples

    def __call__(self, row: int) -> Item:
        """One decoded row.

        Raises:
            BrokenSample: it is a tombstone.
            MismatchError: its bytes are not those that the teacher saw.
        """
        samples = self._samples
        if row >= len(samples):
            return self._source.item(row)
        if row in samples.reasons:
            # A partner that could not be decoded then is none now, even if the file has been mended.
            raise BrokenSample(samples.reasons[row])
        try:
            item = self._source.item(row)
        except BrokenSample as broken:
            hint = "It could be decoded when the cache was built: restore the data set."
            raise CorruptionError(samples.key(row), str(broken), "broken now", hint) from broken
        known = int(samples.content[row])
        if known and item.content != known:
            rule, hint = "must have the bytes that the teacher saw", "Restore the data set."
            raise MismatchError(samples.key(row), rule, f"{item.content:016x}", hint)
        return item


class ViewLoader:
    """Rows of one data set to views of one recipe. As picklable and as thread-safe as `item` is."""

    def __init__(
        self,
        recipe: Recipe,
        digests_N: NDArray[np.uint64],
        item: Callable[[int], Item],
        stops: Sequence[int] | None = None,
    ) -> None:
        """Opens nothing.

        Args:
            recipe: how views are made.
            digests_N: key digests by row number: the plan, from which a recipe that mixes takes partners.
            item: reads and decodes one row; raises `BrokenSample` where that is impossible.
            stops: the row after the last of each segment of a cache that has grown: a row's partners are drawn from
                the rows up to its own segment's end, which were all there were; one segment where not given.
        """
        self.recipe, self._item = recipe, item
        self._stops = [len(digests_N)] if stops is None else list(stops)
        # A source may have grown since: what is not planned yet is nobody's partner.
        self._digests = digests_N[: self._stops[-1]]

    @cached_property
    def pool(self) -> Pool | None:
        """All samples, among which partners are found again; None where the recipe does not mix."""
        return None if self.recipe.mixing is None else Pool(self._digests, self._partner)

    @cached_property
    def _pools(self) -> list[Pool | None]:
        """For each segment the samples that its rows' partners are drawn from."""
        if self.recipe.mixing is None:
            return [None] * len(self._stops)
        return [Pool(self._digests[:stop], self._partner) for stop in self._stops[:-1]] + [self.pool]

    def decode(self, rows: Sequence[int] | NDArray[np.int64]) -> Decoded:
        """Reads and decodes rows; what cannot be decoded is told, and never left out in silence."""
        items: list[Item] = []
        found: list[int] = []
        broken: list[tuple[int, str]] = []
        for row in rows:
            try:
                items.append(self._item(int(row)))
            except BrokenSample as reason:
                broken.append((int(row), str(reason)))
            else:
                found.append(int(row))
        content = np.array([item.content for item in items], np.uint64)
        return Decoded(np.array(found, np.int64), [item.image_CHW for item in items], content, broken)

    def views(self, decoded: Decoded, view: int, how: How = FASTEST) -> Views:
        """Draws and renders one view of each decoded row."""
        segments = np.unique(np.searchsorted(self._stops, decoded.rows, side="right"))
        if len(segments) > 1 and self.recipe.mixing is not None:
            raise ValueError(f"rows of one segment at a time, {segments=}")
        pool = self._pools[segments[0]] if len(segments) else self.pool
        return render_views(self.recipe, decoded.images, self._digests[decoded.rows], view, pool, how)

    def draw(self, decoded: Decoded, view: int) -> Params:
        """The parameters of one view of each decoded row as they are drawn, without the pixels."""
        segment_B = np.searchsorted(self._stops, decoded.rows, side="right")
        sizes, drawn = (
            image_sizes(decoded.images),
            np.empty((len(decoded.rows), len(self.recipe.param_names)), np.int32),
        )
        for segment in np.unique(segment_B).tolist():
            places = np.flatnonzero(segment_B == segment)
            digests = self._digests[decoded.rows[places]]
            drawn[places] = self.recipe.draw(digests, sizes[places], view, self._pools[segment]).params_BP
        return drawn

    def views_again(self, decoded: Decoded, params_BP: Params, size: Resized | None = None) -> Views:
        """Renders views from stored parameters, at the teacher's size or at a student's."""
        if size is None:
            return render_again(self.recipe, decoded.images, params_BP, self.pool)
        return render_again(size.recipe, decoded.images, size.convert(params_BP), self.pool)

    def partner_rows(self, views: Views) -> NDArray[np.int64] | None:
        """Row numbers of the partners that views are mixed with; None where they are not."""
        if views.mixed is None or self.pool is None:
            return None
        return self.pool.rows(views.mixed.partners_B)

    def _partner(self, row: int) -> Tensor | None:
        try:
            return self._item(row).image_CHW
        except BrokenSample:
            return None
