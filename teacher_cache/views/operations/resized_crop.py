"""random_resized_crop: a random box, resized to one size."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views import pixels
from teacher_cache.views.operations.base import (
    Operation,
    Params,
    Sizes,
    area_and_aspect,
    pair,
    require,
    require_flag,
    require_interpolation,
    require_span,
)
from teacher_cache.views.operations.integer_resize import crop_resize
from teacher_cache.views.philox import Words, below

_KERNELS = ("torchvision", "integer")


@dataclass(frozen=True)
class RandomResizedCrop(Operation):
    """torchvision's `RandomResizedCrop`: ten tries at an area and an aspect, then a central fallback."""

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    antialias: bool = True
    kernel: str = field(default="torchvision", metadata={"added": True})
    """`integer` gives the same pixels on any machine and device, works on batches, and is at most two levels (of 255)
    away from `torchvision`, hardly ever more than none."""

    blocks: ClassVar[int] = 10

    def __post_init__(self) -> None:
        pair("size", self.size)
        require_span("scale", self.scale, high=1e4)
        require_span("ratio", self.ratio, low=1e-4, high=1e4)
        require_interpolation(self.interpolation)
        require_flag("antialias", self.antialias)
        require(self.kernel in _KERNELS, "kernel", f"is one of {_KERNELS}", self.kernel)
        plain = self.interpolation == "bilinear" and self.antialias is True
        require(plain or self.kernel == "torchvision", "kernel", "`integer` is bilinear with antialiasing", self)

    @property
    def params(self) -> tuple[str, ...]:
        return ("top", "left", "height", "width")

    @property
    def rounds(self) -> bool:
        return self.kernel == "torchvision" and self.interpolation != "nearest"

    @property
    def batched(self) -> bool:
        return self.kernel == "integer"

    def draw(self, words: Words, sizes_B2: Sizes) -> Params:
        found, boxes = self._try(words.block(0), sizes_B2)
        pending = np.flatnonzero(~found)
        if len(pending):
            boxes[pending] = self._tried_again(words.blocks(1, 9, pending), sizes_B2[pending])
        return boxes.astype(np.int32)

    def _tried_again(self, words_BN4: NDArray[np.uint32], sizes_B2: Sizes) -> NDArray[np.int64]:
        """The first of N tries that fits, or the central box; all at once, as few samples come here."""
        count, tries, _ = words_BN4.shape
        found, boxes = self._try(words_BN4.reshape(-1, 4), np.repeat(sizes_B2, tries, axis=0))
        found_BN = found.reshape(count, tries)
        first = boxes.reshape(count, tries, 4)[np.arange(count), found_BN.argmax(axis=1)]
        return np.where(found_BN.any(axis=1, keepdims=True), first, self._central(sizes_B2))

    def _try(self, words_B4: NDArray[np.uint32], sizes_B2: Sizes) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which samples' boxes fit, and the boxes (top, left, height, width) [B, 4]."""
        area, aspect = area_and_aspect(words_B4, sizes_B2, self.scale, self.ratio)
        box = np.stack([np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))], axis=1).astype(np.int64)
        fits: NDArray[np.bool_] = (box > 0) & (box <= sizes_B2)
        found = np.logical_and(fits[:, 0], fits[:, 1])
        room = np.where(found[:, None], sizes_B2 - box, 0)
        return found, np.concatenate([below(words_B4[:, 2:], room + 1), box], axis=1)

    def _central(self, sizes_B2: Sizes) -> NDArray[np.int64]:
        height, width = sizes_B2[:, 0], sizes_B2[:, 1]
        aspect = width / height
        crop_w = np.where(aspect > self.ratio[1], np.rint(height * self.ratio[1]), width).astype(np.int64)
        crop_h = np.where(aspect < self.ratio[0], np.rint(width / self.ratio[0]), height).astype(np.int64)
        # A ratio that no pixel fits would leave an empty box.
        crop_h, crop_w = np.maximum(crop_h, 1), np.maximum(crop_w, 1)
        return np.stack([(height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w], axis=1)

    def output_sizes(self, sizes_B2: Sizes) -> Sizes:
        return np.broadcast_to(np.array(pair("size", self.size), np.int64), sizes_B2.shape)

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        top, left, height, width = params
        size = pair("size", self.size)
        if self.kernel == "integer":
            box = image_CHW[None, :, top : top + height, left : left + width]
            return crop_resize(box, np.array([[0, 0, height, width]], np.int32), size)[0]
        mode = pixels.InterpolationMode(self.interpolation)
        cropped: Tensor = pixels.resized_crop(
            image_CHW, top, left, height, width, list(size), interpolation=mode, antialias=self.antialias
        )
        return cropped

    def apply_batch(self, images_BCHW: Tensor, params_BP: Params) -> Tensor:
        return crop_resize(images_BCHW, params_BP, pair("size", self.size))

    def with_size(self, size: tuple[int, int]) -> RandomResizedCrop:
        return replace(self, size=size)
