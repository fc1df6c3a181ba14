"""Sampled targets: few classes of many, drawn so that the decoded distribution is the teacher's in expectation.

Top-k is biased: what it leaves out, it leaves out every time. A sample leaves out something else in every view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, narrowest, require_finite, tensors
from teacher_cache.encodings.ordering import largest
from teacher_cache.encodings.sparse_target import SparseTarget
from teacher_cache.views.philox import unit

_NOTHING = -60_000.0
"""The logarithm of no weight: its exponential is 0, and unlike −∞ it survives a product with 0."""


@dataclass(frozen=True)
class SampledLogits:
    """k classes drawn from softmax(logits ⁄ temperature), with the logarithms of their weights.

    `threshold` (Duffield, Lund, Thorup, "Priority sampling" and VarOpt, 2007 and 2009): with τ such that
    Σ min(1, pᵢ ⁄ τ) = k, class i is drawn with that probability, without replacement, and weighs max(pᵢ, τ). The
    weights' sum is 1 in every draw, and each class's expectation is pᵢ.

    `replacement` is the published baseline (Anshumann et al., "Sparse logit sampling", ACL 2025): k draws from p
    with replacement, each class weighing its share of them.
    """

    classes: int
    """C, the length of the teacher's logits."""
    k: int
    """How many classes are stored, 1..C."""
    temperature: float
    """At which they are drawn; targets refuse any other."""
    scheme: Literal["threshold", "replacement"]

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.classes:
            raise ValueError(f"k must be in 1..{self.classes}, the number of classes, found {self.k}")

    @property
    def name(self) -> str:
        """`sampled_k`."""
        return "sampled_k"

    @property
    def parts(self) -> tuple[Part, ...]:
        """`values`, `indices`, and the row's `threshold` where there is one."""
        own = (Part("threshold", "float32", ()),) if self.scheme == "threshold" else ()
        return (Part("values", "float32", (self.k,)), Part("indices", narrowest(self.classes), (self.k,)), *own)

    @property
    def blocks(self) -> int:
        """Philox blocks of four words for a row: one number, or one for each draw."""
        return 1 if self.scheme == "threshold" else -(-self.k // 4)

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """Refused: a sample needs the words of each row's address."""
        raise TypeError("sampled_k draws: use encode_drawn with the words of the rows' addresses")

    def encode_drawn(self, values: Tensor, words_BW: NDArray[np.uint32]) -> dict[str, NDArray[Any]]:
        """float32 [B, C] and random words [B, 4 · blocks] to the parts, largest weight first."""
        require_finite(values, self.name)
        p_BC = torch.softmax(values.double().cpu() / self.temperature, dim=1)
        u_BW = torch.from_numpy(unit(words_BW))
        if self.scheme == "threshold":
            order_BK, threshold_B = _without_replacement(p_BC, u_BW[:, 0], self.k)
            kept_BK = p_BC.gather(1, order_BK)
        else:
            order_BK, kept_BK = _with_replacement(p_BC, u_BW[:, : self.k])
        logs_BK = torch.where(kept_BK > 0, kept_BK.log(), _NOTHING)
        columns = {
            "values": logs_BK.float().numpy(),
            "indices": order_BK.numpy().astype(narrowest(self.classes)),
        }
        if self.scheme == "threshold":
            columns["threshold"] = threshold_B.float().numpy()
        return columns

    def decode(self, columns: Columns) -> SparseTarget:
        """A sparse target without a tail, for the temperature at which it was drawn."""
        stored = tensors(columns)
        values_BK, zero_B = stored["values"], torch.zeros_like(stored["values"][..., 0])
        if self.scheme == "threshold":
            values_BK = torch.maximum(values_BK, stored["threshold"].log()[..., None])
        return SparseTarget(
            values_BK=values_BK,
            indices_BK=stored["indices"],
            tail_logmass_B=zero_B - torch.inf,
            lse_B=zero_B,
            classes=self.classes,
            drawn_at=self.temperature,
            tail="renormalise",
        )

    def inclusion(self, columns: Columns) -> Tensor:
        """The probability with which each stored class was drawn, float32 [B, K]: min(1, p / τ)."""
        if self.scheme != "threshold":
            raise TypeError("draws with replacement have no threshold")
        stored = tensors(columns)
        return (stored["values"].exp() / stored["threshold"][..., None].clamp(min=1e-38)).clamp(max=1)


def _without_replacement(p_BC: Tensor, u_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Classes [B, K] and τ [B], by systematic sampling: one uniform number draws exactly k."""
    down_BC, order_BC = p_BC.sort(dim=1, descending=True, stable=True)
    rest_BC = down_BC.flip(1).cumsum(1).flip(1)
    slots_K = torch.arange(k)
    # With m classes taken for sure, τ is what is left over the slots that are left; the first m that fits is right.
    thresholds_BK = rest_BC[:, :k] / (k - slots_K)
    fits_BK = down_BC[:, :k] <= thresholds_BK * (1 + 1e-12)
    sure_B1 = (~fits_BK).int().cumprod(1).sum(1, keepdim=True)
    threshold_B1 = thresholds_BK.gather(1, sure_B1)
    places_C = torch.arange(p_BC.shape[1])
    chance_BC = torch.where(places_C >= sure_B1, down_BC / threshold_B1.clamp(min=1e-300), 0.0)
    reached_BC = chance_BC.cumsum(1)
    # Rounding must not lose the last slot.
    reached_BC = reached_BC * ((k - sure_B1) / reached_BC[:, -1:].clamp(min=1e-300))
    wanted_BK = slots_K + 1 - sure_B1 - u_B[:, None]
    drawn_BK = torch.searchsorted(reached_BC, wanted_BK)
    picked_BK = torch.where(slots_K < sure_B1, slots_K, drawn_BK)
    # Strictly rising, so that no class comes twice, whatever ties and rounding did.
    picked_BK = (picked_BK - slots_K).cummax(1).values + slots_K
    picked_BK = torch.minimum(picked_BK, p_BC.shape[1] - k + slots_K)
    return order_BC.gather(1, picked_BK), threshold_B1[:, 0]


def _with_replacement(p_BC: Tensor, u_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Classes [B, K] and their shares of k draws; classes that fill up the row weigh nothing."""
    reached_BC = p_BC.cumsum(1)
    reached_BC = reached_BC / reached_BC[:, -1:]
    drawn_BK = torch.searchsorted(reached_BC, u_BK.contiguous(), right=True).clamp(max=p_BC.shape[1] - 1)
    counts_BC = torch.zeros_like(p_BC).scatter_add_(1, drawn_BK, torch.ones_like(u_BK))
    most_BK, order_BK = largest(counts_BC, u_BK.shape[1])
    return order_BK, most_BK / u_BK.shape[1]
