"""rand_augment and trivial_augment: random steps out of one table of fourteen operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views import pixels
from teacher_cache.views.operations.base import Operation, Params, Sizes, is_number, is_whole, require, require_channels
from teacher_cache.views.philox import Words, below, chance, fixed_point, number

Fill = float | tuple[float, ...] | None
Step = Callable[[Tensor, float, dict[str, Any]], Tensor]

_MOST = 2**16
"""Of steps, as blocks are numbered, and of bins, as magnitudes are multiples of 2⁻¹⁶."""
_LONGEST = 72_000
"""Of an image's edges: 150 ÷ 331 of it in multiples of 2⁻¹⁶ is an int32."""


def _shear(image: Tensor, x: float, y: float, how: dict[str, Any]) -> Tensor:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    sheared: Tensor = pixels.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0], **how)
    return sheared


def _translate(image: Tensor, x: float, y: float, how: dict[str, Any]) -> Tensor:
    moved: Tensor = pixels.affine(image, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0], **how)
    return moved


_STEPS: dict[str, Step] = {
    "Identity": lambda image, _magnitude, _how: image,
    "ShearX": lambda image, magnitude, how: _shear(image, magnitude, 0.0, how),
    "ShearY": lambda image, magnitude, how: _shear(image, 0.0, magnitude, how),
    "TranslateX": lambda image, magnitude, how: _translate(image, magnitude, 0.0, how),
    "TranslateY": lambda image, magnitude, how: _translate(image, 0.0, magnitude, how),
    "Rotate": lambda image, magnitude, how: pixels.rotate(image, angle=magnitude, **how),
    "Brightness": lambda image, magnitude, _how: pixels.adjust_brightness(image, 1.0 + magnitude),
    "Color": lambda image, magnitude, _how: pixels.adjust_saturation(image, 1.0 + magnitude),
    "Contrast": lambda image, magnitude, _how: pixels.adjust_contrast(image, 1.0 + magnitude),
    "Sharpness": lambda image, magnitude, _how: pixels.adjust_sharpness(image, 1.0 + magnitude),
    "Posterize": lambda image, magnitude, _how: pixels.posterize(image, bits=int(magnitude)),
    "Solarize": lambda image, magnitude, _how: pixels.solarize(image, threshold=255 * magnitude),
    "AutoContrast": lambda image, _magnitude, _how: pixels.autocontrast(image),
    "Equalize": lambda image, _magnitude, _how: pixels.equalize(image),
}
STEPS = tuple(_STEPS)
"""Names of the operations, in torchvision's order: one is stored as its place here."""
_SIGNED = np.array([name in STEPS[1:10] for name in STEPS])
_POSTERIZE, _SOLARIZE = STEPS.index("Posterize"), STEPS.index("Solarize")


@dataclass(frozen=True)
class RandAugment(Operation):
    """torchvision's `RandAugment`: `num_ops` random steps, all of one magnitude.

    For each step i, `<i>.operation` (a place in `STEPS`) and `<i>.magnitude` (a multiple of 2⁻¹⁶) are stored.

    Words: block i is step i. operation = below(w₀, 14). Let t be the operation's entry in (0, 0.3, 0.3,
    150 · W ÷ 331, 150 · H ÷ 331, 30, 0.9, 0.9, 0.9, 0.9, 4, 1, 0, 0) and m = t · magnitude ÷ (bins − 1). Posterize
    has 8 − m, rounded to the nearest integer (halves to even), Solarize 1 − m, any other m, from ShearX to Sharpness
    negated if chance(w₂, 1/2). Words 1 and 3 are not used.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    interpolation: str = "nearest"
    fill: Fill = None

    channels: ClassVar[tuple[int, ...]] = (1, 3)

    def __post_init__(self) -> None:
        _require_common(self.num_magnitude_bins, self.interpolation, self.fill)
        require(is_whole(self.num_ops, 0, _MOST - 1), "num_ops", f"must be an integer in 0..{_MOST - 1}", self.num_ops)
        last = self.num_magnitude_bins - 1
        rule = f"must be an integer in 0..{last} (num_magnitude_bins - 1)"
        require(is_whole(self.magnitude, 0, last), "magnitude", rule, self.magnitude)

    @property
    def blocks(self) -> int:
        return self.num_ops

    @property
    def rounds(self) -> bool:
        return True

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(f"{step}.{name}" for step in range(self.num_ops) for name in ("operation", "magnitude"))

    def draw(self, words: Words, sizes_B2: Sizes) -> Params:
        longest = int(sizes_B2.max(initial=0))
        require(longest <= _LONGEST, "the image's longer edge", f"must be at most {_LONGEST} pixels", longest)
        tops_B14 = np.tile([0, 0.3, 0.3, 0, 0, 30, 0.9, 0.9, 0.9, 0.9, 4, 1, 0, 0], (len(sizes_B2), 1))
        tops_B14[:, 3], tops_B14[:, 4] = 150 * sizes_B2[:, 1] / 331, 150 * sizes_B2[:, 0] / 331
        bins_B = np.full(len(sizes_B2), self.magnitude)
        steps = [_draw(words.block(step), tops_B14, bins_B, self.num_magnitude_bins) for step in range(self.num_ops)]
        return np.concatenate([np.empty((len(sizes_B2), 0), np.int32), *steps], axis=1)

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        require_channels(self, image_CHW)
        return _apply(image_CHW, params, self.interpolation, self.fill)


@dataclass(frozen=True)
class TrivialAugmentWide(Operation):
    """torchvision's `TrivialAugmentWide`: one random step of a random magnitude.

    `operation` (a place in `STEPS`) and `magnitude` (a multiple of 2⁻¹⁶) are stored.

    Words: as one step of `RandAugment`, but with (0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 6, 1, 0, 0), and
    with below(w₁, bins) for the magnitude's bin. Word 3 is not used.
    """

    num_magnitude_bins: int = 31
    interpolation: str = "nearest"
    fill: Fill = None

    blocks: ClassVar[int] = 1
    channels: ClassVar[tuple[int, ...]] = (1, 3)

    def __post_init__(self) -> None:
        _require_common(self.num_magnitude_bins, self.interpolation, self.fill)

    @property
    def rounds(self) -> bool:
        return True

    @property
    def params(self) -> tuple[str, ...]:
        return ("operation", "magnitude")

    def draw(self, words: Words, sizes_B2: Sizes) -> Params:
        words_B4 = words.block(0)
        tops_B14 = np.tile([0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 6, 1, 0, 0], (len(words_B4), 1))
        return _draw(words_B4, tops_B14, below(words_B4[:, 1], self.num_magnitude_bins), self.num_magnitude_bins)

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        require_channels(self, image_CHW)
        return _apply(image_CHW, params, self.interpolation, self.fill)


def _draw(words_B4: NDArray[np.uint32], tops_B14: NDArray[np.float64], bins_B: NDArray[np.int64], bins: int) -> Params:
    """One step of each sample: (operation, magnitude) [B, 2]."""
    step_B = below(words_B4[:, 0], len(STEPS))
    amount_B = tops_B14[np.arange(len(step_B)), step_B] * bins_B / (bins - 1)
    amount_B = np.where(step_B == _POSTERIZE, np.rint(8 - amount_B), amount_B)
    amount_B = np.where(step_B == _SOLARIZE, 1 - amount_B, amount_B)
    sign_B = np.where(_SIGNED[step_B] & chance(words_B4[:, 2], 0.5), -1, 1)
    return np.stack([step_B, fixed_point(amount_B) * sign_B], axis=1).astype(np.int32)


def _apply(image_CHW: Tensor, params: tuple[int, ...], interpolation: str, fill: Fill) -> Tensor:
    """Every step in turn, as torchvision's `_apply_image_or_video_transform`."""
    channels = image_CHW.shape[0]
    one_each = not isinstance(fill, tuple) or len(fill) == channels
    require(one_each, "fill", f"must have one number for each of the image's {channels} channels", fill)
    levels = [float(level) for level in fill] if isinstance(fill, tuple) else fill
    how = {"interpolation": pixels.InterpolationMode(interpolation), "fill": levels}
    for step, magnitude in zip(params[::2], params[1::2], strict=True):
        image_CHW = _STEPS[STEPS[step]](image_CHW, number(magnitude), how)
    return image_CHW


def _require_common(bins: int, interpolation: str, fill: Fill) -> None:
    require(is_whole(bins, 2, _MOST), "num_magnitude_bins", f"must be an integer in 2..{_MOST}", bins)
    modes = ("nearest", "bilinear")
    require(interpolation in modes, "interpolation", f"is one of {modes} (tensors can do no other here)", interpolation)
    levels = fill if isinstance(fill, tuple) else (0 if fill is None else fill,)
    legal = len(levels) > 0 and all(is_number(level) and 0 <= level <= 255 for level in levels)
    require(legal, "fill", "must be None, a number in 0..255 or a tuple of one for each channel", fill)
