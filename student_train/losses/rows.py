"""Arithmetic on rows that stays finite, and float32 within autocast too."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SQUARE = 1e-24
"""A row whose squared length is not above it has no direction: the root is the usual 1e-12."""
_LEAST_SPREAD = 1e-6
"""Of a row's largest absolute value: a row that spreads no further is constant up to rounding in float32."""


def wide(values: Tensor) -> Tensor:
    """The values as float32 at least; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(values_RN: Tensor) -> Tensor:
    """Rows of length 1, along the last axis; a row of zeros stays one and gets no gradient.

    Dividing by a small constant instead would give a row of zeros a gradient of its inverse, 10¹².
    """
    square_R1 = values_RN.square().sum(dim=-1, keepdim=True)
    # Asked this way round, NaN is no zero and goes through.
    zero_R1 = square_R1 <= _LEAST_SQUARE
    return torch.where(zero_R1, 0.0, values_RN * torch.where(zero_R1, 1.0, square_R1).rsqrt())


def centred(values_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Rows less their mean, and which rows are constant up to rounding, bool [R, 1]."""
    centred_RN = values_RN - values_RN.mean(dim=-1, keepdim=True)
    spread_R1 = centred_RN.abs().amax(dim=-1, keepdim=True)
    return centred_RN, spread_R1 <= _LEAST_SPREAD * values_RN.abs().amax(dim=-1, keepdim=True)


def inner_products(left_BRN: Tensor, right_BSN: Tensor) -> Tensor:
    """Of each left row with each right row, [..., R, S]; autocast would round both to its small type."""
    with torch.autocast(left_BRN.device.type, enabled=False):
        return left_BRN @ right_BSN.mT
