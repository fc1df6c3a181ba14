"""What a sparse target says of the classes left out, at one temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 2**16
"""Classes that are worked on at once: temporaries are [B, CHUNK], however many classes there are."""


def chunks(classes: int) -> Iterator[slice]:
    """Slices of at most CHUNK classes."""
    return (slice(start, min(start + CHUNK, classes)) for start in range(0, classes, CHUNK))


class Rest(Protocol):
    """Log-probabilities at one temperature of the classes left out."""

    def spread(self, part: slice) -> Tensor:
        """Of each class in a slice [..., width], as if all of them were left out."""


@dataclass(frozen=True)
class Even:
    """Each class left out has the same; −inf where they have none."""

    each_B: Tensor
    """Log-probability of each."""

    def spread(self, part: slice) -> Tensor:
        """The same for every class."""
        return self.each_B[..., None].expand(*self.each_B.shape, part.stop - part.start)


@dataclass(frozen=True)
class Ghost:
    """All of them together are one more class; how they share its mass is not said."""

    mass_B: Tensor
    """Log-probability of all together."""
    rest: int
    """How many they are."""

    def spread(self, part: slice) -> Tensor:
        """Evenly: for reports. A loss compares the whole mass."""
        return Even(self.mass_B - math.log(self.rest)).spread(part)


@dataclass(frozen=True)
class Prior:
    """They share their mass as the teacher's mean does, none above the smallest kept class."""

    prior_C: Tensor
    """Log-probabilities of all classes under the teacher's mean over the calibration rows."""
    offset_B: Tensor
    """What is added to them, so that the classes left out have their mass."""
    most_B: Tensor
    """The smallest kept logit, less the maximum."""
    temperature: float
    total_B: Tensor
    """Log of the sum over all classes, at the temperature."""

    def spread(self, part: slice) -> Tensor:
        """The prior, shifted, cut off and softened."""
        shifted_BC = self.prior_C[part] + self.offset_B[..., None]
        return torch.minimum(shifted_BC, self.most_B[..., None]) / self.temperature - self.total_B[..., None]


def rest_sum(spread: Callable[[slice], Tensor], indices_BK: Tensor, classes: int) -> Tensor:
    """log Σ exp over the classes that are not in `indices_BK`, [B], chunk by chunk.

    Args:
        spread: a slice of classes to values [B, width].
        indices_BK: int64, the classes to leave out.
        classes: C.
    """
    sums = [without(spread(part), indices_BK, part).logsumexp(-1) for part in chunks(classes)]
    return torch.stack(sums).logsumexp(0)


def without(values_BC: Tensor, indices_BK: Tensor, part: slice, filling: float = -math.inf) -> Tensor:
    """A copy of one chunk's values, the classes named in `indices_BK` replaced by `filling`."""
    width = part.stop - part.start
    local_BK = indices_BK - part.start
    # A spare column at the end takes the classes of other chunks.
    local_BK = torch.where((local_BK >= 0) & (local_BK < width), local_BK, width)
    room_BC = torch.cat([values_BC, values_BC[..., :1]], dim=-1)
    return room_BC.scatter_(-1, local_BK, filling)[..., :width]
