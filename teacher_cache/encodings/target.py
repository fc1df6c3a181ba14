"""Targets: what the cache gives back, typed, still in the small type in which it is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from teacher_cache.errors import MismatchError


@dataclass(frozen=True)
class Steps:
    """How quantised logits are read: logit = maximum − step · value."""

    step_B: Tensor
    """Nats for one level, float32."""
    maximum_B: Tensor
    """The row's largest logit, as stored."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Steps:
        """The same on another device."""
        moved = (part.to(device, non_blocking=non_blocking) for part in (self.step_B, self.maximum_B))
        return Steps(*moved)


@dataclass(frozen=True)
class DenseTarget:
    """Values for every class or every feature."""

    values: Tensor
    """[B, C] logits, or [B, ...] features, as stored: float16, float32, or uint8 with `steps`."""
    steps: Steps | None = None
    """What uint8 values mean; None where values are what they are."""

    drawn_at: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.values)

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """log softmax(values / T), float32 [B, C]."""
        if self.steps is None:
            return torch.log_softmax(self.values.float() / temperature, dim=-1)
        # The maximum cancels in a softmax; what it was rounded to does not matter.
        below_max_BC = self.values.float() * (-self.steps.step_B / temperature)[:, None]
        return torch.log_softmax(below_max_BC, dim=-1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenseTarget:
        """The same target on another device, still in its small type."""
        steps = None if self.steps is None else self.steps.to(device, non_blocking)
        return DenseTarget(self.values.to(device, non_blocking=non_blocking), steps)

    def dense(self) -> DenseTarget:
        """Itself; quantised logits as float32."""
        if self.steps is None:
            return self
        logits_BC = self.steps.maximum_B.float()[:, None] - self.values.float() * self.steps.step_B[:, None]
        return DenseTarget(logits_BC)


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
    drawn_at: float | None = None
    """The temperature of a sample; None where the target holds at every temperature."""

    def __len__(self) -> int:
        return len(self.values_BK)

    def log_probs_sparse(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities at T of the kept classes, float32 [B, K], and of *each* class left out, [B].

        Raises:
            MismatchError: the target is a sample that was drawn at another temperature.
        """
        if self.drawn_at is not None:
            self._require_drawn_at(temperature)
            temperature = 1.0
        kept_BK = self.values_BK.float() / temperature
        each_B = self._tail_logit() / temperature
        rest = self.classes - kept_BK.shape[1]
        total_B = torch.logsumexp(kept_BK, dim=1)
        if rest:
            total_B = torch.logaddexp(total_B, each_B + math.log(rest))
        return kept_BK - total_B[:, None], each_B - total_B

    def _require_drawn_at(self, temperature: float) -> None:
        if temperature != self.drawn_at:
            hint = "Train at that temperature, or build a cache whose sampled_k is drawn at another."
            raise MismatchError(
                "temperature", f"must be {self.drawn_at:g}, at which the sample was drawn", temperature, hint
            )

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
            self.drawn_at,
        )

    def dense(self) -> DenseTarget:
        """Raw logits float32 [B, C], the classes left out at their common logit.

        Raises:
            MismatchError: of a sample; it says nothing of the classes that were not drawn.
        """
        if self.drawn_at is not None:
            hint = "Read its log_probs at the temperature at which it was drawn."
            raise MismatchError("target", "must keep logits to give them back", "sampled_k", hint)
        kept_BK, each_B = self.log_probs_sparse()
        return DenseTarget(self._scatter(kept_BK, each_B) + self.lse_B.float()[:, None])


Target = DenseTarget | SparseTarget


def joined(targets: Sequence[Target]) -> Target:
    """The rows of several targets of one field, one after the other."""
    first = targets[0]
    if len(targets) == 1:
        return first
    if isinstance(first, DenseTarget):
        return _joined_dense([target for target in targets if isinstance(target, DenseTarget)])
    sparse = [target for target in targets if isinstance(target, SparseTarget)]
    return SparseTarget(
        torch.cat([target.values_BK for target in sparse]),
        torch.cat([target.indices_BK for target in sparse]),
        torch.cat([target.tail_logmass_B for target in sparse]),
        torch.cat([target.lse_B for target in sparse]),
        first.classes,
        first.drawn_at,
    )


def _joined_dense(targets: Sequence[DenseTarget]) -> DenseTarget:
    steps = [target.steps for target in targets if target.steps is not None]
    values = torch.cat([target.values for target in targets])
    if not steps:
        return DenseTarget(values)
    joined_steps = Steps(
        torch.cat([part.step_B for part in steps]),
        torch.cat([part.maximum_B for part in steps]),
    )
    return DenseTarget(values, joined_steps)
