"""Targets: what the cache gives back, typed, still in the small type in which it is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseTarget:
    """Values for every class or every feature."""

    values: Tensor
    """[B, C] logits, or [B, ...] features, as stored (float16 or float32)."""

    def __len__(self) -> int:
        return len(self.values)

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """log softmax(values / T), float32 [B, C]."""
        return torch.log_softmax(self.values.float() / temperature, dim=-1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenseTarget:
        """The same target on another device."""
        return DenseTarget(self.values.to(device, non_blocking=non_blocking))

    def dense(self) -> DenseTarget:
        """Itself."""
        return self


@dataclass(frozen=True)
class SparseTarget:
    """The K largest logits of C classes, and the mass of the others.

    The classes left out share their mass evenly, at the largest common logit that keeps them below the smallest
    kept one; so the distribution has mass 1 at every temperature.
    """

    values_BK: Tensor
    """float16, logit minus the row's maximum, sorted down."""
    indices_BK: Tensor
    """Class numbers in the narrowest unsigned type that holds them."""
    tail_logmass_B: Tensor
    """float16, log Σ exp(logit − maximum) over the classes left out, at T = 1; −inf where none are."""
    lse_B: Tensor
    """float16, log Σ exp(logit) over all classes, raw: with it the raw logits can be had back."""
    classes: int
    """C."""

    def __len__(self) -> int:
        return len(self.values_BK)

    def log_probs_sparse(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities at T of the kept classes, float32 [B, K], and of *each* class left out, [B]."""
        kept_BK = self.values_BK.float() / temperature
        each_B = self._tail_logit() / temperature
        rest = self.classes - kept_BK.shape[1]
        total_B = torch.logsumexp(kept_BK, dim=1)
        if rest:
            total_B = torch.logaddexp(total_B, each_B + math.log(rest))
        return kept_BK - total_B[:, None], each_B - total_B

    def _tail_logit(self) -> Tensor:
        rest = self.classes - self.values_BK.shape[1]
        if rest == 0:
            return torch.full_like(self.tail_logmass_B, -math.inf, dtype=torch.float32)
        even_B = self.tail_logmass_B.float() - math.log(rest)
        return torch.minimum(even_B, self.values_BK[:, -1].float())

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """Log-probabilities at T of all classes, float32 [B, C]: for reports; losses use the sparse form."""
        kept_BK, each_B = self.log_probs_sparse(temperature)
        return self._scatter(kept_BK, each_B)

    def _scatter(self, kept_BK: Tensor, each_B: Tensor) -> Tensor:
        full_BC = each_B[:, None].repeat(1, self.classes)
        return full_BC.scatter(1, self.indices_BK.long(), kept_BK)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseTarget:
        """The same target on another device."""
        return SparseTarget(
            self.values_BK.to(device, non_blocking=non_blocking),
            self.indices_BK.to(device, non_blocking=non_blocking),
            self.tail_logmass_B.to(device, non_blocking=non_blocking),
            self.lse_B.to(device, non_blocking=non_blocking),
            self.classes,
        )

    def dense(self) -> DenseTarget:
        """Raw logits float32 [B, C], the classes left out at their common logit."""
        kept_BK, each_B = self.log_probs_sparse()
        return DenseTarget(self._scatter(kept_BK, each_B) + self.lse_B.float()[:, None])


Target = DenseTarget | SparseTarget


def joined(targets: Sequence[Target]) -> Target:
    """The rows of several targets of one field, one after the other."""
    first = targets[0]
    if len(targets) == 1:
        return first
    if isinstance(first, DenseTarget):
        return DenseTarget(torch.cat([target.values for target in targets if isinstance(target, DenseTarget)]))
    sparse = [target for target in targets if isinstance(target, SparseTarget)]
    return SparseTarget(
        torch.cat([target.values_BK for target in sparse]),
        torch.cat([target.indices_BK for target in sparse]),
        torch.cat([target.tail_logmass_B for target in sparse]),
        torch.cat([target.lse_B for target in sparse]),
        first.classes,
    )
