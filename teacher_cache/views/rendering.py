"""Rendering: from decoded images and resolved integers to uint8 views, image by image or as a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views.operations import Images, Mix, Params

if TYPE_CHECKING:
    from teacher_cache.views.recipe import Recipe


_LARGE = 2**16
"""Bytes of an image; measured: at 3×224×224 a flip in passing costs less than another pass over the batch."""


@dataclass(frozen=True)
class Mixed:
    """With whom, and how much, each view of a batch is mixed."""

    partners_B: NDArray[np.uint64]
    """Key digests of the partners."""
    shares_B: NDArray[np.float64]
    """How much of each view is the sample's own, 0..1: the weight of its own label."""


class How(NamedTuple):
    """Where and in which way views are made; none of it changes a pixel."""

    device: torch.device | None = None
    """Where the batched part runs; None is where the images are."""
    batched: bool = True
    """False works image by image wherever that is possible."""


FASTEST = How()
"""What is used where nothing is asked for."""


def render(
    recipe: Recipe, images: Images, params_BP: Params, partners: Images, how: How
) -> tuple[Images, Mixed | None]:
    """Decoded images and their resolved parameters to uint8 views.

    Images are worked on one by one until they have one size and an operation has a batched form; from
    `batched_from` on they may be on another device. On the CPU large images are worked on one by one to the end,
    which is faster. Every way gives the same pixels.

    Args:
        recipe: the operations.
        images: uint8 [C, H, W], sizes may differ.
        params_BP: as drawn or stored.
        partners: the partners' images where the recipe mixes.
        how: device and renderer.

    Returns:
        The views, as a batch [B, C, H, W] where one was made; and with whom they are mixed.

    Raises:
        ValueError: images have not one shape where they are mixed, or an operation refuses one.
    """
    # Operations may overwrite a batch: the caller's own stays as it is.
    images, partners = (side.clone() if isinstance(side, Tensor) else side for side in (images, partners))
    mixed = None
    for place, operation in enumerate(recipe.operations):
        columns = recipe.columns_of(params_BP, place, "own")
        if isinstance(operation, Mix):
            for earlier in range(place):
                partners = _apply(recipe, earlier, partners, recipe.columns_of(params_BP, earlier, "partner"), how)
            own, others = (_batch(recipe, place, side, how) for side in (images, partners))
            digests = recipe.partners(params_BP)
            if own is None or others is None or own.shape != others.shape or digests is None:
                raise ValueError("images must have one shape where they are mixed")
            mixed = Mixed(digests, operation.shares(columns, (own.shape[2], own.shape[3])))
            images = operation.mix(own, others, columns)
        else:
            images = _apply(recipe, place, images, columns, how)
    return images, mixed


def _apply(recipe: Recipe, place: int, images: Images, params_BP: Params, how: How) -> Images:
    operation = recipe.operations[place]
    if how.batched and operation.batched and not _alone(images, how):
        batch_BCHW = _batch(recipe, place, images, how)
        if batch_BCHW is not None:
            return operation.apply_batch(batch_BCHW, params_BP)
    rows = params_BP.tolist()
    return [operation.apply(image, tuple(row)) for image, row in zip(images, rows, strict=True)]


def _alone(images: Images, how: How) -> bool:
    """Whether images are so large that each is better finished while it is in the processor's cache."""
    return how.device is None and not isinstance(images, Tensor) and len(images) > 0 and images[0].nbytes > _LARGE


def _batch(recipe: Recipe, place: int, images: Images, how: How) -> Tensor | None:
    """The images as one tensor where they have one shape, on the device if nothing is left to do one by one."""
    if not isinstance(images, Tensor):
        if len({image.shape for image in images}) != 1:
            return None
        images = torch.stack(list(images))
    return images.to(how.device) if how.device is not None and place >= recipe.batched_from else images
