"""Crop and resize of a whole batch in integer arithmetic: the same pixels on any machine, device and batch.

The filter is the antialiased triangle of Pillow and torchvision, with weights that are exact rationals rounded to
multiples of 2⁻¹⁶ and a sum of exactly 1. A weighted sum of pixels is then an integer below 255 · 2¹⁶ < 2²⁴, which
float32 holds exactly whatever the order of the additions, so a matrix product may do the work. Between the two
passes (rows, then columns) values are rounded to uint8, as Pillow does.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views.operations.base import require

_ONE = 2**16
_LARGEST = 2**14
"""Of a box's edge: beyond it single weights are lost in rounding, and what is missing to 1 grows."""


def crop_resize(images_BCHW: Tensor, boxes_B4: NDArray[np.int32], size: tuple[int, int]) -> Tensor:
    """Cuts a box out of each image and resizes it, bilinear with antialiasing.

    Args:
        images_BCHW: uint8, on any device.
        boxes_B4: (top, left, height, width) of each box, inside the image.
        size: (height, width) of the result.

    Returns:
        uint8 [B, C, *size] on the same device. At most two levels (of 255) away from torchvision's uint8 kernel;
        about one value in two hundred differs at all.

    Raises:
        ValueError: a box is too large for weights that are multiples of 2⁻¹⁶.
    """
    longest = int(boxes_B4[:, 2:].max(initial=1))
    require(longest <= _LARGEST, "kernel", f"`integer` takes boxes of up to {_LARGEST} pixels an edge", longest)
    device = images_BCHW.device
    # TF32 and bfloat16 products round their inputs; float64 never takes part in either.
    exact = device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    dtype = torch.float32 if exact else torch.float64
    down_BhH, across_BwW = (
        _weights(boxes_B4[:, axis], boxes_B4[:, axis + 2], edge, size[axis], device).to(dtype)
        for axis, edge in enumerate(images_BCHW.shape[2:])
    )
    with torch.autocast(device.type, enabled=False):
        wide = _rounded(images_BCHW.to(dtype).flatten(1, 2) @ across_BwW.transpose(1, 2))
        wide_BCHw = wide.reshape(*images_BCHW.shape[:3], size[1])
        return _rounded(down_BhH[:, None] @ wide_BCHw).to(torch.uint8)


def _rounded(sums: Tensor) -> Tensor:
    return sums.add_(_ONE // 2).mul_(1 / _ONE).floor_()


def _weights(
    starts_B: NDArray[np.int32], lengths_B: NDArray[np.int32], edge: int, size: int, device: torch.device
) -> Tensor:
    """Weights [B, size, edge] in units of 2⁻¹⁶ from an image's edge to the result's, each row's sum 2¹⁶.

    Place j of a box of n pixels lies (j + ½) − (o + ½) · n ⁄ size from the middle of output o; times 2 · size that
    is an integer, and so is the triangle's height there. All are far below 2⁵³, so float64 holds them exactly on
    every device, and a quotient is never so close to an integer that rounding could carry it there.
    """
    start_B1, length_B1 = (
        torch.tensor(part, device=device, dtype=torch.float64)[:, None] for part in (starts_B, lengths_B)
    )
    places_E = torch.arange(edge, device=device, dtype=torch.float64)
    outside_BE = (places_E < start_B1) | (places_E >= start_B1 + length_B1)
    centres_BO = (2 * torch.arange(size, device=device, dtype=torch.float64) + 1) * length_B1
    from_start_BE = (2 * (places_E - start_B1) + 1) * size
    reach_B11 = 2 * length_B1.clamp(min=size)[:, :, None]
    heights_BOE = (reach_B11 - (from_start_BE[:, None] - centres_BO[:, :, None]).abs_()).clamp_(min=0)
    heights_BOE.masked_fill_(outside_BE[:, None], 0)
    total_BO1 = heights_BOE.sum(dim=2, keepdim=True)
    weights_BOE = heights_BOE.mul_(2 * _ONE).add_(total_BO1).div_(2 * total_BO1).floor_()
    missing_BO1 = _ONE - weights_BOE.sum(dim=2, keepdim=True)
    # argmax may return any of several largest: no two places tie here, and the first of them wins.
    first_BO1 = (weights_BOE * edge - places_E).argmax(dim=2, keepdim=True)
    return weights_BOE.scatter_add_(2, first_BO1, missing_BO1)
