"""The view engine: identities in, exact uint8 views and their digests out, whichever kind of recipe made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.errors import SpecError
from teacher_cache.spec import NormalizeSpec, ViewSpec
from teacher_cache.views.digest import as_unsigned, pixel_digests
from teacher_cache.views.operations import Params, Sizes
from teacher_cache.views.recipe import parse_recipe
from teacher_cache.views.seeded_global import SeededGlobal


class Recipe(Protocol):
    """What both kinds of recipe offer: resolve identities to integers, render integers to pixels.

    `resolve` is pure; `render` is a pure function of its arguments (for `seeded-global`: under the versions in
    the fingerprint).
    """

    @property
    def seed(self) -> int: ...
    @property
    def promise(self) -> str: ...
    @property
    def random(self) -> bool: ...
    @property
    def normalize(self) -> NormalizeSpec | None: ...
    @property
    def param_names(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def view_fingerprint(self) -> str: ...
    def describe(self) -> object: ...
    def resolve(self, digests_B: NDArray[np.uint64], sizes_B2: Sizes, view: int) -> Params: ...
    def render(self, image_CHW: Tensor, params_P: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class Views:
    """A batch of rendered views."""

    pixels_BCHW: Tensor
    """uint8, before any normalisation."""
    params_BP: Params
    """The resolved integers that made each view."""

    def digests(self) -> NDArray[np.uint64]:
        """The pixel digest of each view, uint64 [B]."""
        return as_unsigned(pixel_digests(self.pixels_BCHW))


def open_recipe(spec: ViewSpec) -> Recipe:
    """The recipe that a configuration describes."""
    if spec.callable is not None:
        return SeededGlobal(spec.callable, spec.seed)
    recipe = parse_recipe(spec.recipe or (), spec.seed)
    if spec.count > 1 and not recipe.random:
        raise SpecError("views.count", "must be 1 when nothing in the recipe is random", spec.count, "Set it to 1.")
    return recipe


def render_views(recipe: Recipe, images: Sequence[Tensor], digests_B: NDArray[np.uint64], view: int) -> Views:
    """Renders one view of each image.

    Args:
        recipe: how.
        images: decoded uint8 [C, H, W], sizes may differ.
        digests_B: uint64 [B], digests of the samples' keys.
        view: the view number.

    Raises:
        SpecError: an operation refuses an image, or the views do not all have one shape and make no batch.
    """
    sizes = np.array([image.shape[1:] for image in images], np.int64).reshape(-1, 2)
    try:
        params = recipe.resolve(digests_B, sizes, view)
        views = [recipe.render(image, row.tolist()) for image, row in zip(images, params, strict=True)]
    except (ValueError, RuntimeError) as error:
        hint = "Correct the recipe so that it holds for every image."
        found = sorted({tuple(size) for size in sizes.tolist()})[:3]
        raise SpecError("views.recipe", f"cannot be rendered: {error}", f"images of {found}", hint) from error
    shapes = sorted({tuple(image.shape) for image in views})
    if len(shapes) > 1:
        hint = "Add `resize` and `center_crop`, or `random_resized_crop`, so that all views have one size."
        if len({shape[0] for shape in shapes}) > 1:
            hint = "Set source.channels to 1 or 3: grey and coloured images are mixed."
        raise SpecError("views.recipe", "must bring every image to one shape", shapes[:3], hint)
    return Views(torch.stack(views), params)


def normalize(views_BCHW: Tensor, spec: NormalizeSpec | None) -> Tensor:
    """uint8 views to the float32 input of a network: scaled to 0..1, then (x − mean) / std for each channel."""
    scaled = views_BCHW.to(torch.float32) / 255
    if spec is None:
        return scaled
    if len(spec.mean) not in (1, views_BCHW.shape[1]):
        rule = f"needs one value for each of {views_BCHW.shape[1]} channels"
        raise SpecError("normalize.mean", rule, spec.mean, "Give as many values as the images have channels.")
    mean, std = (torch.tensor(values, device=scaled.device).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
    return (scaled - mean) / std
