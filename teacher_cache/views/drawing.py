"""Drawing: from the addresses of a batch of views to the integers that define them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views.operations import Params, Sizes
from teacher_cache.views.operations.mix import PARTNER_BLOCK
from teacher_cache.views.partners import Pool
from teacher_cache.views.philox import Words, below, first_blocks

if TYPE_CHECKING:
    from teacher_cache.views.recipe import Recipe

_RESERVED_VIEW = 2**32 - 1


@dataclass(frozen=True)
class Drawn:
    """What the addresses of one batch of views resolve to."""

    params_BP: Params
    """int32, columns as in `Recipe.param_names`."""
    partners: list[Tensor]
    """The decoded partners of a recipe that mixes; empty otherwise."""


def draw(recipe: Recipe, digests_B: NDArray[np.uint64], sizes_B2: Sizes, view: int, pool: Pool | None = None) -> Drawn:
    """Draws every parameter of one view of many samples.

    Args:
        digests_B: uint64 [B], digests of the samples' keys.
        sizes_B2: int64 [B, 2], (height, width) of the decoded images.
        view: the view number.
        pool: the samples that partners come from; only a recipe that mixes asks for it.

    Raises:
        ValueError: an operation refuses the size of an image.
    """
    place, partners = recipe.mixing, list[Tensor]()
    columns, sizes_B2 = _draw(recipe, range(len(recipe.operations))[:place], digests_B, sizes_B2, view)
    if place is not None:
        if pool is None:
            raise ValueError("a recipe that mixes needs the samples that partners come from")
        words = Words(digests_B, view, place, recipe.seed)
        identity, partner_columns, partners = _draw_partners(recipe, place, words, digests_B, sizes_B2, pool)
        columns += [identity, *partner_columns, recipe.operations[place].draw(words, sizes_B2)]
        columns += _draw(recipe, range(place + 1, len(recipe.operations)), digests_B, sizes_B2, view)[0]
    return Drawn(np.concatenate([np.empty((len(digests_B), 0), np.int32), *columns], axis=1), partners)


def _draw(
    recipe: Recipe, places: range, digests_B: NDArray[np.uint64], sizes_B2: Sizes, view: int | NDArray[np.uint32]
) -> tuple[list[Params], Sizes]:
    columns = []
    first = first_blocks(digests_B, view, places, recipe.seed)
    for place, first_B4 in zip(places, first, strict=True):
        operation = recipe.operations[place]
        columns.append(operation.draw(Words(digests_B, view, place, recipe.seed, first_B4), sizes_B2))
        sizes_B2 = operation.output_sizes(sizes_B2)
    return columns, sizes_B2


def _draw_partners(
    recipe: Recipe, place: int, words: Words, digests_B: NDArray[np.uint64], sizes_B2: Sizes, pool: Pool
) -> tuple[Params, list[Params], list[Tensor]]:
    """Who the partners are, what the operations before mixing draw for them, and their images."""
    block = words.block(PARTNER_BLOCK)
    partners = pool.choose(block, digests_B)
    views_B = below(block[:, 1], _RESERVED_VIEW).astype(np.uint32)
    sizes = image_sizes(partners.images)
    columns, partner_sizes_B2 = _draw(recipe, range(place), partners.digests_B, sizes, views_B)
    differs = (partner_sizes_B2 != sizes_B2).any(axis=1)
    if differs.any():
        found = [tuple(both[differs][0].tolist()) for both in (sizes_B2, partner_sizes_B2)]
        raise ValueError(f"images must have one size where they are mixed, found {found}")
    low, high = partners.digests_B & np.uint64(0xFFFFFFFF), partners.digests_B >> np.uint64(32)
    identity = np.stack([low, high, views_B], axis=1).astype(np.uint32).view(np.int32)
    return identity, columns, partners.images


def image_sizes(images: Sequence[Tensor]) -> Sizes:
    """(height, width) of each image, int64 [B, 2]."""
    shapes = [image.shape for image in images]
    if len(set(shapes)) == 1:
        return np.tile(np.array(shapes[0][1:], np.int64), (len(shapes), 1))
    return np.array([shape[1:] for shape in shapes], np.int64).reshape(-1, 2)
