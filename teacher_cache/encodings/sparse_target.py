"""Sparse targets: the largest logits of each row, and what is said of the classes left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from teacher_cache.encodings.dense_target import DenseTarget
from teacher_cache.encodings.scales import Shared, from_levels
from teacher_cache.encodings.tails import Even, Ghost, Prior, Rest, rest_sum
from teacher_cache.errors import MismatchError
from teacher_cache.spec import Tail

_NEVER_SEEN = -1e3
"""Nats that a prior gives a class at least: beyond them (a mask of −1e9) float32 could not add a row's own mass."""


@dataclass(frozen=True)
class SparseTarget:
    """The K largest logits of C classes, and the mass of the others. Arrays are [B, ...], or [B, T, ...] of sequences.

    How the classes left out share their mass is the policy's: `uniform` evenly, at the largest common logit that
    keeps them below the smallest kept one; `prior` as the teacher's mean does; `ghost` as one more class;
    `renormalise` gives them nothing. The distribution has mass 1 at every temperature.
    """

    values_BK: Tensor
    """Logit minus the row's maximum, sorted down: floating, or uint8 levels (`from_levels`)."""
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
    tail: Tail = "uniform"
    """How the classes left out share their mass."""
    prior: Shared | None = None
    """`prior`, log-probabilities [C]: of that policy only."""
    count_B: Tensor | None = None
    """int32, how many of the K places a row has filled; None where all. The others stand for classes of its tail."""

    def __len__(self) -> int:
        return len(self.values_BK)

    @property
    def rest(self) -> int:
        """How many classes are left out."""
        return self.classes - self.values_BK.shape[-1]

    def log_probs_sparse(self, temperature: float = 1.0) -> tuple[Tensor, Rest]:
        """Log-probabilities at T of the kept classes, float32 [B, K], and of those left out.

        Raises:
            MismatchError: the target is a sample that was drawn at another temperature.
        """
        if self.drawn_at is not None:
            self._require_drawn_at(temperature)
            temperature = 1.0
        logits_BK, each_B = self._filled()
        if self.prior is not None and self.rest:
            return self._with_prior(logits_BK, self.prior, temperature)
        kept_BK, each_B = logits_BK / temperature, each_B / temperature
        mass_B = each_B + math.log(self.rest) if self.rest else torch.full_like(each_B, -math.inf)
        total_B = torch.logaddexp(kept_BK.logsumexp(-1), mass_B)
        rest: Rest = Even(each_B - total_B)
        if self.tail == "ghost" and self.rest:
            rest = Ghost(mass_B - total_B, self.rest)
        return kept_BK - total_B[..., None], rest

    def _require_drawn_at(self, temperature: float) -> None:
        if temperature != self.drawn_at:
            hint = "Train at that temperature, or build a cache whose sampled_k is drawn at another."
            raise MismatchError(
                "temperature", f"must be {self.drawn_at:g}, at which the sample was drawn", temperature, hint
            )

    def _filled(self) -> tuple[Tensor, Tensor]:
        """The places' logits [B, K], and the common one of each class left out [B]."""
        logits_BK = from_levels(self.values_BK) if self.values_BK.dtype == torch.uint8 else self.values_BK.float()
        if self.count_B is None:
            return logits_BK, self._each(logits_BK[..., -1], torch.full_like(logits_BK[..., -1], self.rest))
        count_B1 = self.count_B.long()[..., None]
        smallest_B = logits_BK.gather(-1, count_B1 - 1)[..., 0]
        each_B = self._each(smallest_B, (self.classes - count_B1[..., 0]).float())
        empty_BK = torch.arange(logits_BK.shape[-1], device=logits_BK.device) >= count_B1
        return torch.where(empty_BK, each_B[..., None], logits_BK), each_B

    def _each(self, smallest_B: Tensor, rest_B: Tensor) -> Tensor:
        """The common logit of each class left out, at most the smallest kept one's; −∞ where there are none."""
        if self.tail == "renormalise":
            return torch.full_like(smallest_B, -math.inf)
        even_B = self.tail_logmass_B.float() - rest_B.clamp(min=1).log()
        return torch.minimum(even_B, smallest_B)

    def _with_prior(self, logits_BK: Tensor, prior: Shared, temperature: float) -> tuple[Tensor, Rest]:
        own_B = (logits_BK / temperature).logsumexp(-1)
        prior_C = prior.on(own_B.device)["prior"].clamp(min=_NEVER_SEEN)
        shape, ids_BK = (*own_B.shape, self.classes), self.indices_BK.long()
        whole_B = rest_sum(lambda part: prior_C.expand(shape)[..., part], ids_BK, self.classes)
        offset_B = self.tail_logmass_B.float() - whole_B
        bare = Prior(prior_C, offset_B, logits_BK[..., -1], temperature, torch.zeros_like(own_B))
        total_B = torch.logaddexp(own_B, rest_sum(bare.spread, ids_BK, self.classes))
        return logits_BK / temperature - total_B[..., None], replace(bare, total_B=total_B)

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """Log-probabilities at T of all classes, float32 [B, C]: for reports; losses use the sparse form."""
        kept_BK, rest = self.log_probs_sparse(temperature)
        return self._scatter(kept_BK, rest)

    def _scatter(self, kept_BK: Tensor, rest: Rest) -> Tensor:
        return rest.spread(slice(0, self.classes)).scatter(-1, self.indices_BK.long(), kept_BK)

    def arrays(self) -> dict[str, Tensor]:
        """The arrays with one entry for each row, by name."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseTarget:
        """The same target on another device."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> SparseTarget:
        """The same target with every tensor that has an entry for each row changed."""
        changed: dict[str, Any] = {name: change(array) for name, array in self.arrays().items()}
        return replace(self, **changed)

    def flat(self) -> SparseTarget:
        """The positions of sequences as rows: [B, T, K] to [B · T, K]."""
        depth = self.values_BK.ndim - 1
        flattened: dict[str, Any] = {name: array.flatten(0, depth - 1) for name, array in self.arrays().items()}
        return replace(self, **flattened)

    def dense(self) -> DenseTarget:
        """Raw logits float32 [B, C], the classes left out at what the policy says of them.

        Raises:
            MismatchError: of a sample; it says nothing of the classes that were not drawn.
        """
        if self.drawn_at is not None:
            hint = "Read its log_probs at the temperature at which it was drawn."
            raise MismatchError("target", "must keep logits to give them back", "sampled_k", hint)
        return DenseTarget(self.log_probs() + self.lse_B.float()[..., None])
