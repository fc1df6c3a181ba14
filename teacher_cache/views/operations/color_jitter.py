"""color_jitter: brightness, contrast, saturation and hue, each by a random amount, in a random order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from teacher_cache.views import pixels
from teacher_cache.views.operations.base import Operation, Params, Sizes, is_number, require, require_channels
from teacher_cache.views.philox import Words, below, fixed_point, number, unit

Span = tuple[float, float]

_LARGEST = 32767.0
"""The largest factor that an int32 multiple of 2⁻¹⁶ holds."""
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
_ORDERS = tuple(itertools.permutations(range(4)))
_ADJUST: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda image_CHW, factor: pixels.adjust_brightness(image_CHW, factor),
    lambda image_CHW, factor: pixels.adjust_contrast(image_CHW, factor),
    lambda image_CHW, factor: pixels.adjust_saturation(image_CHW, factor),
    lambda image_CHW, factor: pixels.adjust_hue(image_CHW, factor),
)
"""In calls of their own, so that torchvision is not loaded for their names."""


@dataclass(frozen=True)
class ColorJitter(Operation):
    """torchvision's `ColorJitter`; each amount is None, a number or a pair (min, max).

    A number v means (max(0, 1 − v), 1 + v), and for hue (−v, v). An amount that is None or can only be the neutral
    1 (hue: 0) is not applied, and the neutral value is stored.

    Words: block 0, word 0 gives `order` = below(w₀, 24), the rank of a permutation of 0 brightness, 1 contrast,
    2 saturation, 3 hue among all 24 in lexicographic order; the adjustments follow one another as it lists them.
    Block 1, word i gives the i-th of `brightness`, `contrast`, `saturation`, `hue`: min + unit(wᵢ) · (max − min),
    stored as a multiple of 2⁻¹⁶. Blocks 2 and on are not used.
    """

    brightness: float | Span | None = None
    contrast: float | Span | None = None
    saturation: float | Span | None = None
    hue: float | Span | None = None

    blocks: ClassVar[int] = 2
    channels: ClassVar[tuple[int, ...]] = (1, 3)

    def __post_init__(self) -> None:
        _ = self._spans

    @property
    def rounds(self) -> bool:
        return True

    @property
    def params(self) -> tuple[str, ...]:
        return ("order", "brightness", "contrast", "saturation", "hue")

    @property
    def _spans(self) -> tuple[Span | None, ...]:
        """The range of each amount; None where it is not applied."""
        return (
            _span("brightness", self.brightness, 1.0, 0.0, _LARGEST),
            _span("contrast", self.contrast, 1.0, 0.0, _LARGEST),
            _span("saturation", self.saturation, 1.0, 0.0, _LARGEST),
            _span("hue", self.hue, 0.0, -0.5, 0.5),
        )

    def draw(self, words: Words, sizes_B2: Sizes) -> Params:
        lows, highs = np.array([span or (rest, rest) for span, rest in zip(self._spans, _NEUTRAL, strict=True)]).T
        order_B1 = below(words.block(0)[:, :1], len(_ORDERS))
        amounts_B4 = fixed_point(lows + unit(words.block(1)) * (highs - lows))
        return np.concatenate([order_B1, amounts_B4], axis=1).astype(np.int32)

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        require_channels(self, image_CHW)
        order, *amounts = params
        spans = self._spans
        for which in _ORDERS[order]:
            if spans[which] is not None:
                image_CHW = _ADJUST[which](image_CHW, number(amounts[which]))
        return image_CHW

    def rescaled(self, params_BP: Params, before: tuple[int, int], after: tuple[int, int]) -> Params:
        return params_BP


def _span(name: str, value: float | Span | None, centre: float, lowest: float, highest: float) -> Span | None:
    """What torchvision's `_check_input` makes of one argument."""
    if value is None:
        return None
    rule = f"must be a number >= 0 or (min, max) within {lowest:g}..{highest:g}"
    if isinstance(value, tuple):
        require(len(value) == 2 and all(is_number(edge) for edge in value), name, rule, value)
        low, high = value
    else:
        require(is_number(value) and 0 <= value <= highest, name, rule, value)
        # Only factors are cut at 0: a hue below −0.5 is a mistake.
        low, high = max(centre - value, 0.0) if centre else -value, centre + value
    require(lowest <= low <= high <= highest, name, rule, value)
    return None if low == high == centre else (float(low), float(high))
