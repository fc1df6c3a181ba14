"""Step 8, batch: what one step trains on, and what it cost to make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache import Target


@dataclass(frozen=True)
class Mixing:
    """What a batch of mixed views is made of besides its own rows."""

    partners_B: NDArray[np.int64]
    """Row numbers of the partners."""
    labels_B: Tensor | None
    """The partners' class numbers."""
    shares_B: Tensor
    """float32, how much of each view is its own row's: the weight of its own label."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Mixing:
        """The same with its tensors changed."""
        labels = None if self.labels_B is None else change(self.labels_B)
        return Mixing(self.partners_B, labels, change(self.shares_B))


@dataclass(frozen=True)
class Spent:
    """Seconds that making a batch took, wherever it was made: with workers they are not the training loop's."""

    decode: float
    """Reading and decoding the source's items."""
    view: float
    """Rendering the views, and proving some of them."""
    target: float
    """Reading the cached rows, verifying and decoding them."""


@dataclass(frozen=True)
class Batch:
    """One step's data. Everything in it belongs together by identity."""

    epoch: int
    step: int
    view_B: NDArray[np.int64]
    """The view number of each row."""
    rows_B: NDArray[np.int64]
    views_BCHW: Tensor
    """uint8, before normalisation."""
    labels_B: Tensor | None
    """int64 class numbers."""
    targets: Mapping[str, Target]
    """The cached fields that the stream was asked for."""
    mixing: Mixing | None = None
    """The other label of each row, where the recipe mixes."""
    spent: Spent | None = None

    def __len__(self) -> int:
        return len(self.rows_B)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device; out of page-locked memory nobody waits for the copy."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the name is that which torch's loader calls."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        return replace(
            self,
            views_BCHW=change(self.views_BCHW),
            labels_B=None if self.labels_B is None else change(self.labels_B),
            targets={name: target.mapped(change) for name, target in self.targets.items()},
            mixing=None if self.mixing is None else self.mixing.mapped(change),
        )
