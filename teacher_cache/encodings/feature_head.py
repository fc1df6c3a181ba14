"""The input of the teacher's last linear layer, and that layer once: logits of many classes in few bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, require_finite, tensors
from teacher_cache.encodings.dense_target import DenseTarget
from teacher_cache.encodings.scales import Head, Shared
from teacher_cache.encodings.u8_channel import to_channel_levels


@dataclass(frozen=True)
class FeatureHead:
    """uint8 levels of the penultimate feature by channel; logits are W h + b, rebuilt where they are used.

    With h off by at most half a step in each channel, logit c is off by at most ½ Σ |W_cd| · step_d, at any
    temperature, for features within the calibrated ranges; the build measures what it comes to.
    """

    classes: int
    """C."""
    width: int
    """D, of the feature."""
    shared: Shared | None = None
    """`low`, `step` [D], `weight` [C, D], `bias` [C]; None before calibration."""

    @property
    def name(self) -> str:
        """`feature_head`."""
        return "feature_head"

    @property
    def parts(self) -> tuple[Part, ...]:
        """`values`, the feature's levels."""
        return (Part("values", "uint8", (self.width,)),)

    @property
    def _constants(self) -> Shared:
        assert self.shared is not None, "calibrated when planning"
        return self.shared

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, D] inputs of the head (not logits) to levels; NaN and inf are refused."""
        require_finite(values, self.name)
        return {"values": to_channel_levels(values, self._constants).cpu().contiguous().numpy()}

    def decode(self, columns: Columns) -> DenseTarget:
        """Levels in their byte; they become logits where they are used."""
        return DenseTarget(tensors(columns)["values"], Head(self._constants))


def largest_difference(logits_BC: Tensor, features_BD: Tensor, weight_CD: Tensor, bias_C: Tensor) -> float:
    """How far logits are from W h + b, relative to the largest logit (at least 1)."""
    rebuilt_BC = torch.nn.functional.linear(features_BD, weight_CD, bias_C)
    if rebuilt_BC.shape != logits_BC.shape:
        return torch.inf
    return float((rebuilt_BC - logits_BC).abs().max() / logits_BC.abs().max().clamp(min=1))
