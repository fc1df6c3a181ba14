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
from teacher_cache.views.drawing import Drawn, image_sizes
from teacher_cache.views.operations import Images, Params, Sizes
from teacher_cache.views.parse import parse_recipe
from teacher_cache.views.partners import Pool
from teacher_cache.views.rendering import FASTEST, How, Mixed
from teacher_cache.views.seeded_global import SeededGlobal

_REFUSALS = (ValueError, RuntimeError, IndexError, TypeError)
"""What torchvision's kernels raise over an image that they cannot take."""


class Recipe(Protocol):
    """What both kinds of recipe offer: resolve identities to integers, render integers to pixels.

    `draw` is pure; `render` is a pure function of its arguments (for `seeded-global`: under the versions in
    the fingerprint).
    """

    @property
    def seed(self) -> int: ...
    @property
    def promise(self) -> str: ...
    @property
    def random(self) -> bool: ...
    @property
    def rounds(self) -> bool: ...
    @property
    def mixing(self) -> int | None: ...
    @property
    def renderer(self) -> str: ...
    @property
    def normalize(self) -> NormalizeSpec | None: ...
    @property
    def param_names(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def view_fingerprint(self) -> str: ...
    def describe(self) -> object: ...
    def partners(self, params_BP: Params) -> NDArray[np.uint64] | None: ...
    def draw(self, digests_B: NDArray[np.uint64], sizes_B2: Sizes, view: int, pool: Pool | None = None) -> Drawn: ...
    def render(
        self, images: Images, params_BP: Params, partners: Images = (), how: How = FASTEST
    ) -> tuple[Images, Mixed | None]: ...


@dataclass(frozen=True)
class Views:
    """A batch of rendered views."""

    pixels_BCHW: Tensor
    """uint8, before any normalisation."""
    params_BP: Params
    """The resolved integers that made each view."""
    mixed: Mixed | None = None
    """With whom each view is mixed, where the recipe mixes."""

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


def render_views(
    recipe: Recipe,
    images: Sequence[Tensor],
    digests_B: NDArray[np.uint64],
    view: int,
    pool: Pool | None = None,
    how: How = FASTEST,
) -> Views:
    """Draws and renders one view of each image.

    Args:
        recipe: what to do.
        images: decoded uint8 [C, H, W], sizes may differ.
        digests_B: uint64 [B], digests of the samples' keys.
        view: the view number.
        pool: the samples that partners come from, for a recipe that mixes.
        how: device and renderer; neither changes a pixel.

    Raises:
        SpecError: an operation refuses an image, or the views do not all have one shape and make no batch.
    """
    try:
        drawn = recipe.draw(digests_B, image_sizes(images), view, pool)
    except _REFUSALS as error:
        raise _refusal(images, error) from error
    return _rendered(recipe, images, drawn.params_BP, drawn.partners, how)


def render_again(
    recipe: Recipe, images: Sequence[Tensor], params_BP: Params, pool: Pool | None = None, how: How = FASTEST
) -> Views:
    """Renders views from stored parameters, without drawing anything.

    Raises:
        SpecError: as `render_views`.
        MismatchError: a partner that the parameters name is gone.
    """
    digests = recipe.partners(params_BP)
    if digests is None:
        return _rendered(recipe, images, params_BP, (), how)
    if pool is None:
        raise ValueError("a recipe that mixes needs the samples that partners come from")
    return _rendered(recipe, images, params_BP, pool.images(digests), how)


def _rendered(recipe: Recipe, images: Sequence[Tensor], params_BP: Params, partners: Images, how: How) -> Views:
    try:
        views, mixed = recipe.render(images, params_BP, partners, how)
    except _REFUSALS as error:
        raise _refusal(images, error) from error
    if not isinstance(views, Tensor):
        views = _stacked(views)
        views = views if how.device is None else views.to(how.device)
    return Views(views, params_BP, mixed)


def _refusal(images: Sequence[Tensor], error: Exception) -> SpecError:
    hint = "Correct the recipe so that it holds for every image."
    found = sorted({tuple(image.shape) for image in images})[:3]
    return SpecError("views.recipe", f"cannot be rendered: {error}", f"images of {found}", hint)


def _stacked(views: Sequence[Tensor]) -> Tensor:
    shapes = sorted({tuple(image.shape) for image in views})
    if len(shapes) > 1:
        hint = "Add `resize` and `center_crop`, or `random_resized_crop`, so that all views have one size."
        if len({shape[0] for shape in shapes}) > 1:
            hint = "Set source.channels to 1 or 3: grey and coloured images are mixed."
        raise SpecError("views.recipe", "must bring every image to one shape", shapes[:3], hint)
    return torch.stack(list(views))


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
