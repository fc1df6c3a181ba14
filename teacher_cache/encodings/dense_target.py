"""Dense targets: a value for every class or every feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from teacher_cache.encodings.scales import Scale


@dataclass(frozen=True)
class DenseTarget:
    """Values for every class or every feature."""

    values: Tensor
    """[B, C] logits ([B, T, C] of sequences) or [B, ...] features, as stored: floating, or uint8 with a `scale`."""
    scale: Scale | None = None
    """What uint8 values mean; None where values are what they are."""

    drawn_at: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.values)

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """log softmax(values / T), float32 [B, C]."""
        logits_BC = self.values.float() if self.scale is None else self.scale.logits(self.values)
        # In place where the logits are ours: a vocabulary's are the largest thing there is.
        softened_BC = logits_BC / temperature if logits_BC is self.values else logits_BC.div_(temperature)
        return torch.log_softmax(softened_BC, dim=-1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenseTarget:
        """The same target on another device, still in its small type."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> DenseTarget:
        """The same target with every tensor that has an entry for each row changed."""
        return DenseTarget(change(self.values), None if self.scale is None else self.scale.mapped(change))

    def flat(self) -> DenseTarget:
        """The positions of sequences as rows: [B, T, C] to [B · T, C]."""
        scale = None if self.scale is None else self.scale.flat()
        return DenseTarget(self.values.flatten(0, -2), scale)

    def dense(self) -> DenseTarget:
        """Itself; quantised values as float32."""
        return self if self.scale is None else DenseTarget(self.scale.exact(self.values))
