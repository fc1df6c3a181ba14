"""mixup and cutmix: a view mixed with a partner's, for one sample at a time and so for any batch.

torchvision mixes a batch with itself, so partner and share depend on the batch. Here both come from the sample's
own address: the recipe chooses the partner (`views/partners.py`), the operation draws how much of it is seen.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views.beta import draw_beta
from teacher_cache.views.operations.base import Operation, Params, Sizes, require, scaled_edges
from teacher_cache.views.philox import Words, below, fixed_point

_ONE = 2**16
PARTNER_BLOCK = 0
"""Block 0 of a mixing operation chooses the partner and its view; the operation draws from block 1 on."""


@dataclass(frozen=True)
class Mix(Operation):
    """What mixing operations share. Images and partners have one size."""

    alpha: float = 1.0
    """Of the Beta(α, α) distribution of λ, the share of the sample itself."""

    blocks: ClassVar[int] = 258

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        require(number and 0 < self.alpha < math.inf, "alpha", "must be a number above 0", self.alpha)

    @property
    def batched(self) -> bool:
        return True

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        raise TypeError("a mixing operation needs a partner: use `mix`")

    @abstractmethod
    def mix(self, images_BCHW: Tensor, partners_BCHW: Tensor, params_BP: Params) -> Tensor:
        """Mixes each image with its partner, on any device, in integer arithmetic."""

    @abstractmethod
    def shares(self, params_BP: Params, size: tuple[int, int]) -> NDArray[np.float64]:
        """How much of each view is the sample's own, 0..1: the weight of its own label."""


@dataclass(frozen=True)
class MixUp(Mix):
    """torchvision's `MixUp`: λ · image + (1 − λ) · partner, rounded to the nearest level (halves up)."""

    @property
    def params(self) -> tuple[str, ...]:
        return ("lam",)

    def draw(self, words: Words, sizes_B2: Sizes) -> Params:
        return fixed_point(draw_beta(words, self.alpha, first=1))[:, None].astype(np.int32)

    def mix(self, images_BCHW: Tensor, partners_BCHW: Tensor, params_BP: Params) -> Tensor:
        lam = torch.tensor(params_BP[:, 0], device=images_BCHW.device).view(-1, 1, 1, 1)
        mixed = images_BCHW * lam + partners_BCHW * (_ONE - lam)
        return mixed.add_(_ONE // 2).bitwise_right_shift_(16).to(torch.uint8)

    def shares(self, params_BP: Params, size: tuple[int, int]) -> NDArray[np.float64]:
        return params_BP[:, 0] / _ONE

    def rescaled(self, params_BP: Params, before: tuple[int, int], after: tuple[int, int]) -> Params:
        return params_BP


@dataclass(frozen=True)
class CutMix(Mix):
    """torchvision's `CutMix`: a box of the partner with about 1 − λ of the area, around a random point."""

    @property
    def params(self) -> tuple[str, ...]:
        return ("x1", "y1", "x2", "y2")

    def draw(self, words: Words, sizes_B2: Sizes) -> Params:
        lam = draw_beta(words, self.alpha, first=2)
        height, width = sizes_B2[:, 0], sizes_B2[:, 1]
        centre = words.block(1)
        x, y = below(centre[:, 0], width), below(centre[:, 1], height)
        half = 0.5 * np.sqrt(1.0 - lam)
        half_w, half_h = (half * width).astype(np.int64), (half * height).astype(np.int64)
        edges = [np.maximum(x - half_w, 0), np.maximum(y - half_h, 0)]
        edges += [np.minimum(x + half_w, width), np.minimum(y + half_h, height)]
        return np.stack(edges, axis=1).astype(np.int32)

    def mix(self, images_BCHW: Tensor, partners_BCHW: Tensor, params_BP: Params) -> Tensor:
        height, width = images_BCHW.shape[2:]
        inside_BHW = in_boxes(params_BP, (height, width), images_BCHW.device)
        return torch.where(inside_BHW[:, None], partners_BCHW, images_BCHW)

    def shares(self, params_BP: Params, size: tuple[int, int]) -> NDArray[np.float64]:
        x1, y1, x2, y2 = params_BP.T.astype(np.int64)
        shares: NDArray[np.float64] = 1.0 - (x2 - x1) * (y2 - y1) / (size[0] * size[1])
        return shares

    def rescaled(self, params_BP: Params, before: tuple[int, int], after: tuple[int, int]) -> Params:
        columns = [scaled_edges(params_BP[:, place], before[1 - place % 2], after[1 - place % 2]) for place in range(4)]
        return np.stack(columns, axis=1).astype(np.int32)


def in_boxes(boxes_B4: Params, size: tuple[int, int], device: torch.device) -> Tensor:
    """Which pixels [B, H, W] lie in each image's box (x1, y1, x2, y2), the far edges excluded."""
    x1, y1, x2, y2 = torch.tensor(boxes_B4, device=device, dtype=torch.int64).T[:, :, None]
    rows = torch.arange(size[0], device=device)
    columns = torch.arange(size[1], device=device)
    inside: Tensor = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None, :]
    return inside
