"""random_erasing: a random box of the image is overwritten with one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views import pixels
from teacher_cache.views.operations.base import (
    Operation,
    Params,
    Sizes,
    area_and_aspect,
    is_number,
    is_whole,
    require,
    require_span,
    scaled_edges,
)
from teacher_cache.views.operations.mix import in_boxes
from teacher_cache.views.philox import Words, below, chance

_TRIES = 10
_WIDEST = 10_000.0
"""Beyond this ratio no box fits any image, and exp(ln r) need not be finite."""


@dataclass(frozen=True)
class RandomErasing(Operation):
    """torchvision's `RandomErasing`, of uint8 pixels before any normalisation.

    `value` is a level 0..255, or a tuple of one for each channel. 0 is black here, where torchvision's 0, after
    `Normalize`, is the mean colour: give round(255 · mean) to erase to (nearly) zero after normalisation.

    `top`, `left`, `height` and `width` are stored, all 0 when nothing is erased.

    Words: block 0, word 0: the image is erased if chance(w₀, p). Block i = 1…10 is the i-th try:
    area = H · W · (s₀ + unit(w₀) · (s₁ − s₀)), aspect = exp(ln r₀ + unit(w₁) · (ln r₁ − ln r₀)),
    height = √(area · aspect), width = √(area ÷ aspect), each rounded to the nearest integer (halves to even). Aspect
    is height over width, the other way round than in `random_resized_crop`. The first try with height < H and
    width < W is taken, with top = below(w₂, H − height + 1) and left = below(w₃, W − width + 1). If that box is
    empty, or if none fits, nothing is erased.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: int | tuple[int, ...] = 0

    blocks: ClassVar[int] = 1 + _TRIES

    def __post_init__(self) -> None:
        require(is_number(self.p) and 0 <= self.p <= 1, "p", "must be in 0..1", self.p)
        pair = isinstance(self.scale, tuple) and len(self.scale) == 2 and all(map(is_number, self.scale))
        require(
            pair and 0 <= self.scale[0] <= self.scale[1] <= 1,
            "scale",
            "must be (low, high) with 0 <= low <= high <= 1",
            self.scale,
        )
        require_span("ratio", self.ratio, low=1 / _WIDEST, high=_WIDEST)
        rule = "draws normal noise, for float images, but views are uint8: give a level 0..255, such as 128, not"
        require(str(self.value) != "random", "value", rule, self.value)
        levels = self.value if isinstance(self.value, tuple) else (self.value,)
        rule = "must be an integer in 0..255 or a tuple of one for each channel"
        require(len(levels) > 0 and all(is_whole(level, 0, 255) for level in levels), "value", rule, self.value)

    @property
    def params(self) -> tuple[str, ...]:
        return ("top", "left", "height", "width")

    @property
    def batched(self) -> bool:
        return True

    def draw(self, words: Words, sizes_B2: Sizes) -> Params:
        boxes = np.zeros((len(sizes_B2), 4), np.int32)
        pending = np.flatnonzero(chance(words.block(0)[:, 0], self.p))
        for number in range(1, 1 + _TRIES):
            if not len(pending):
                break
            found, drawn = self._try(words.block(number, pending), sizes_B2[pending])
            boxes[pending[found]] = drawn[found]
            pending = pending[~found]
        return boxes

    def _try(self, words_B4: NDArray[np.uint32], sizes_B2: Sizes) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which samples' boxes fit, and the boxes (top, left, height, width) [B, 4], zeros where empty."""
        area, aspect = area_and_aspect(words_B4, sizes_B2, self.scale, self.ratio)
        box = np.stack([np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))], axis=1).astype(np.int64)
        found = np.all(box < sizes_B2, axis=1)
        room = np.where(found[:, None], sizes_B2 - box, 0)
        boxes = np.concatenate([below(words_B4[:, 2:], room + 1), box], axis=1)
        return found, boxes * (box > 0).all(axis=1, keepdims=True)

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        top, left, height, width = params
        value_C11 = self._levels(image_CHW.shape[0], image_CHW.device)
        if not height or not width:
            return image_CHW
        erased: Tensor = pixels.erase(image_CHW, i=top, j=left, h=height, w=width, v=value_C11)
        return erased

    def apply_batch(self, images_BCHW: Tensor, params_BP: Params) -> Tensor:
        value_C11 = self._levels(images_BCHW.shape[1], images_BCHW.device)
        # A mask looks at every pixel: on a CPU that is 3 to 11 times as slow as writing the boxes one by one.
        fill = overwritten if images_BCHW.device.type == "cpu" else masked
        return fill(images_BCHW, params_BP, value_C11)

    def _levels(self, channels: int, device: torch.device) -> Tensor:
        """The value of each channel, uint8 [C, 1, 1] or [1, 1, 1]."""
        levels = self.value if isinstance(self.value, tuple) else (self.value,)
        rule = f"must have one level for each of the image's {channels} channels"
        require(not isinstance(self.value, tuple) or len(levels) == channels, "value", rule, self.value)
        return torch.tensor(levels, dtype=torch.uint8, device=device).view(-1, 1, 1)

    def rescaled(self, params_BP: Params, before: tuple[int, int], after: tuple[int, int]) -> Params:
        corners, far = params_BP[:, :2], params_BP[:, :2] + params_BP[:, 2:]
        edges = [
            np.stack([scaled_edges(values[:, axis], before[axis], after[axis]) for axis in (0, 1)], axis=1)
            for values in (corners, far)
        ]
        return np.concatenate([edges[0], edges[1] - edges[0]], axis=1).astype(np.int32)


def overwritten(images_BCHW: Tensor, boxes_B4: Params, value_C11: Tensor) -> Tensor:
    """Images in memory, with one value in each one's box (top, left, height, width)."""
    erased = images_BCHW.clone()
    array, value = erased.numpy(), value_C11.numpy()
    for row in np.flatnonzero(boxes_B4[:, 2]):
        top, left, height, width = boxes_B4[row]
        array[row, :, top : top + height, left : left + width] = value
    return erased


def masked(images_BCHW: Tensor, boxes_B4: Params, value_C11: Tensor) -> Tensor:
    """The same on any device, without a loop over the images."""
    top, left, height, width = boxes_B4.T
    corners_B4 = np.stack([left, top, left + width, top + height], axis=1)
    size = (images_BCHW.shape[2], images_BCHW.shape[3])
    return torch.where(in_boxes(corners_B4, size, images_BCHW.device)[:, None], value_C11, images_BCHW)
