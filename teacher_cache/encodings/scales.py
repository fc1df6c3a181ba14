"""How small stored numbers are read: steps of a row, steps of a channel, or features before a linear head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

ROOT_RANGE = 64.0
"""Nats below the maximum that level 255 stands for; deeper values are kept there."""


def to_levels(below_BK: Tensor) -> Tensor:
    """Nats below the maximum to uint8 levels, spaced by the root: fine where probability is."""
    return (below_BK.double() / ROOT_RANGE).clamp(0, 1).sqrt().mul(255).round().to(torch.uint8)


def from_levels(levels_BK: Tensor) -> Tensor:
    """uint8 levels to logits less the maximum, float32."""
    return levels_BK.float().div(255).square().mul(-ROOT_RANGE)


class Scale(Protocol):
    """What stored values mean. Picklable; applied on the device of the values, when they are used."""

    def logits(self, stored: Tensor) -> Tensor:
        """float32 values, of logits up to a constant of their row: what a softmax sees."""

    def exact(self, stored: Tensor) -> Tensor:
        """float32 values as the teacher gave them, up to the encoding's error."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Scale:
        """The same with every tensor that has an entry for each row changed: moved, or put into page-locked memory."""

    def flat(self) -> Scale:
        """The same for the positions of sequences as rows."""


@dataclass(frozen=True)
class Steps:
    """Quantised logits: logit = maximum − step · value."""

    step_B: Tensor
    """Nats for one level, float32, one for each row (or for each position of it)."""
    maximum_B: Tensor
    """The row's largest logit, as stored."""

    def logits(self, stored: Tensor) -> Tensor:
        """Less the maximum, which cancels in a softmax: what it was rounded to does not matter."""
        return stored.float() * -self.step_B[..., None]

    def exact(self, stored: Tensor) -> Tensor:
        """Raw logits."""
        return self.maximum_B.float()[..., None] - stored.float() * self.step_B[..., None]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Steps:
        """The same with both tensors changed."""
        return Steps(change(self.step_B), change(self.maximum_B))

    def flat(self) -> Steps:
        """The same for the positions of sequences as rows."""
        return Steps(self.step_B.flatten(), self.maximum_B.flatten())


_ON_DEVICES: OrderedDict[tuple[str, str], dict[str, Tensor]] = OrderedDict()
_MOST_ON_DEVICES = 8


@dataclass(frozen=True, eq=False)
class Shared:
    """Tensors that all rows of a field share.

    They travel to a device once: targets are made batch by batch, often in another process, and a head's weights are
    larger than all else in them.
    """

    key: str
    """Names the content."""
    tensors: Mapping[str, Tensor]

    def on(self, device: torch.device) -> Mapping[str, Tensor]:
        """The tensors on a device."""
        if device.type == "cpu":
            return self.tensors
        place = (self.key, str(device))
        if place not in _ON_DEVICES:
            _ON_DEVICES[place] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
            if len(_ON_DEVICES) > _MOST_ON_DEVICES:
                _ON_DEVICES.popitem(last=False)
        return _ON_DEVICES[place]


@dataclass(frozen=True)
class Channels:
    """Quantised features: value = low + step · level, with `low` and `step` shaped to broadcast over a row."""

    shared: Shared

    def logits(self, stored: Tensor) -> Tensor:
        """The values themselves."""
        return self.exact(stored)

    def exact(self, stored: Tensor) -> Tensor:
        """Features."""
        common = self.shared.on(stored.device)
        return torch.addcmul(common["low"], stored.float(), common["step"])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Channels:
        """Itself: what is shared follows the values."""
        return self

    def flat(self) -> Channels:
        """Itself: what is shared holds for every position."""
        return self


@dataclass(frozen=True)
class Head:
    """Quantised inputs of a linear head: logits = W (low + step · level) + b, at any temperature."""

    shared: Shared

    def logits(self, stored: Tensor) -> Tensor:
        """The logits themselves."""
        return self.exact(stored)

    def exact(self, stored: Tensor) -> Tensor:
        """Logits."""
        common = self.shared.on(stored.device)
        features = Channels(self.shared).exact(stored)
        # A loss within autocast would have the teacher's logits in the student's small type.
        with torch.autocast(stored.device.type, enabled=False):
            return functional.linear(features, common["weight"], common["bias"])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Head:
        """Itself: what is shared follows the values."""
        return self

    def flat(self) -> Head:
        """Itself: what is shared holds for every position."""
        return self
