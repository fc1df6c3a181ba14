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

from teacher_cache.sources import BrokenSample, Item
from teacher_cache.views import How, Pool, Recipe, Views, render_again, render_views
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


class ViewLoader:
    """Rows of one data set to views of one recipe. As picklable and as thread-safe as `item` is."""

    def __init__(self, recipe: Recipe, digests_N: NDArray[np.uint64], item: Callable[[int], Item]) -> None:
        """Opens nothing.

        Args:
            recipe: how views are made.
            digests_N: key digests by row number: the plan, from which a recipe that mixes takes partners.
            item: reads and decodes one row; raises `BrokenSample` where that is impossible.
        """
        self.recipe, self._digests, self._item = recipe, digests_N, item

    @cached_property
    def pool(self) -> Pool | None:
        """The samples that partners come from; None where the recipe does not mix."""
        return None if self.recipe.mixing is None else Pool(self._digests, self._partner)

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
        return render_views(self.recipe, decoded.images, self._digests[decoded.rows], view, self.pool, how)

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
