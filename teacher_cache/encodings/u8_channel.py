"""Features in one byte a number, with a range for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, require_finite, tensors
from teacher_cache.encodings.dense_target import DenseTarget
from teacher_cache.encodings.scales import Channels, Shared

_LEVELS = 255
_MARGIN = 0.125
"""Of a channel's range over the calibration rows, kept free at each end for rows that go beyond."""
_LEAST = 1 / 16
"""Of the mean range of all channels: what a channel that hardly moved while calibrating has at least."""


@dataclass(frozen=True)
class U8Channel:
    """uint8 levels between a low and a high value that each channel has for itself.

    A value within its channel's range is off by at most half a step, (high − low) / 510; one beyond is kept at the
    range's end. The build measures what that comes to on its rows.
    """

    shape: tuple[int, ...]
    """Of one row: (D,), (C, H, W), (N, D) tokens, or a map without channels."""
    shared: Shared | None = None
    """`low` and `step`, shaped to broadcast over a row; None before calibration."""

    @property
    def name(self) -> str:
        """`u8_channel`."""
        return "u8_channel"

    @property
    def parts(self) -> tuple[Part, ...]:
        """One part, `values`."""
        return (Part("values", "uint8", self.shape),)

    @property
    def _ranges(self) -> Shared:
        assert self.shared is not None, "calibrated when planning"
        return self.shared

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, ...] to levels; NaN and inf are refused."""
        require_finite(values, self.name)
        return {"values": to_channel_levels(values, self._ranges).cpu().contiguous().numpy()}

    def decode(self, columns: Columns) -> DenseTarget:
        """Levels in their byte; they become features where they are used."""
        return DenseTarget(tensors(columns)["values"], Channels(self._ranges))


def to_channel_levels(values: Tensor, shared: Shared) -> Tensor:
    """float32 [B, ...] to uint8 levels of the same shape."""
    ranges = shared.on(values.device)
    return ((values - ranges["low"]) / ranges["step"]).round().clamp(0, _LEVELS).to(torch.uint8)


def channel_axis(field: str, dims: int) -> int | None:
    """Which axis of a row holds channels: the first of [C, H, W], the last of [D] and [N, D]; a map has none."""
    if field.startswith("attention:"):
        return None
    return 0 if dims == 3 else dims - 1


class Ranges:
    """Smallest and largest value of each channel, over rows that come batch by batch."""

    def __init__(self, axis: int | None) -> None:
        self._axis = axis
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def see(self, values: Tensor) -> None:
        """float32 [B, ...] values of a field."""
        require_finite(values, "u8_channel")
        kept = None if self._axis is None else self._axis + 1
        over = [axis for axis in range(values.ndim) if axis != kept]
        low, high = values.amin(over, keepdim=True)[0].cpu(), values.amax(over, keepdim=True)[0].cpu()
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def constants(self) -> Mapping[str, NDArray[np.float32]]:
        """`low` and `step`, float32, shaped to broadcast over a row."""
        assert self._low is not None, "at least one row was seen"
        assert self._high is not None, "at least one row was seen"
        low, high = self._low.double(), self._high.double()
        spread = high - low
        mean = spread.mean()
        spread = torch.maximum(spread, _LEAST * mean if mean > 0 else torch.ones_like(mean))
        # What is never below 0 (a ReLU) will not be: 0 stays exact, and no level is spent below it.
        bottom = torch.where(low == 0, 0.0, low - _MARGIN * spread)
        top = torch.maximum(high, low + spread) + _MARGIN * spread
        step = (top - bottom) / _LEVELS
        return {"low": bottom.float().numpy(), "step": step.float().numpy()}
