"""Nucleus: the smallest set of classes that holds a share of the mass; sure rows take few bytes, others more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, narrowest, require_finite, tensors
from teacher_cache.encodings.ordering import largest
from teacher_cache.encodings.scales import to_levels
from teacher_cache.encodings.sparse_target import SparseTarget


@dataclass(frozen=True)
class NucleusLogits:
    """As `top_k`, with a number of classes that is each row's own.

    A row keeps its largest classes until they hold `mass` at T = 1 (Holtzman et al., "The curious case of neural text
    degeneration", 2020, section 3.1), at most `cap`. What is left out, at most 1 − mass where the cap was not met,
    has its log-mass stored and is shared evenly.
    """

    classes: int
    """C, the length of the teacher's logits."""
    mass: float
    """What the kept classes hold at least, unless there would be more than `cap`."""
    cap: int
    """The most classes that a row keeps, 1..C."""
    values: Literal["f16", "u8"] = "f16"
    """How the depth below the maximum is kept."""

    def __post_init__(self) -> None:
        if not 1 <= self.cap <= self.classes:
            raise ValueError(f"cap must be in 1..{self.classes}, the number of classes, found {self.cap}")

    @property
    def name(self) -> str:
        """`nucleus`."""
        return "nucleus"

    @property
    def parts(self) -> tuple[Part, ...]:
        """`values` and `indices` of different length in each row, `count`, `tail_logmass`, `lse`."""
        return (
            Part("values", "float16" if self.values == "f16" else "uint8", (self.cap,), ragged=True),
            Part("indices", narrowest(self.classes), (self.cap,), ragged=True),
            Part("count", "uint32", ()),
            Part("tail_logmass", "float16", ()),
            Part("lse", "float16", ()),
        )

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, C] to the parts, filled up to `cap`; ties are kept in the order of the class numbers."""
        require_finite(values, self.name)
        largest_BK, indices_BK = largest(values, self.cap)
        kept_BK = (largest_BK - largest_BK[:, :1]).double()
        shifted_BC = (values - largest_BK[:, :1]).double()
        p_BK = (kept_BK - shifted_BC.logsumexp(1, keepdim=True)).exp()
        wanted_B = (p_BK.cumsum(1) < self.mass).sum(1) + 1
        # Rounded, the whole may stay below 1: then masked classes would be wanted, which hold nothing.
        count_B = torch.minimum(wanted_B, (p_BK > 0).sum(1))
        inside_BK = torch.arange(self.cap, device=values.device) < count_B[:, None]
        tail_B = shifted_BC.scatter_(1, indices_BK, kept_BK.masked_fill(inside_BK, -torch.inf)).logsumexp(1)
        stored_BK = kept_BK.half() if self.values == "f16" else to_levels(-kept_BK)
        lse_B = values.double().logsumexp(1).half()
        held_BK = stored_BK.masked_fill(~inside_BK, 0).float()
        require_finite(torch.cat([held_BK, lse_B.float()[:, None]], dim=1), self.name)
        fills = {part.name: part.fill for part in self.parts}
        columns = {
            "values": stored_BK.masked_fill(~inside_BK, fills["values"]),
            "indices": indices_BK.masked_fill(~inside_BK, fills["indices"]).to(getattr(torch, narrowest(self.classes))),
            "count": count_B.to(torch.uint32),
            "tail_logmass": tail_B.half(),
            "lse": lse_B,
        }
        return {name: column.cpu().contiguous().numpy() for name, column in columns.items()}

    def decode(self, columns: Columns) -> SparseTarget:
        """A sparse target of `cap` places a row; those beyond a row's own stand for classes of its tail."""
        stored = tensors(columns)
        count_B = stored["count"].long()
        empty_BK = torch.arange(self.cap, device=count_B.device) >= count_B[..., None]
        indices_BK = torch.where(empty_BK, self.classes, stored["indices"].long())
        return SparseTarget(
            values_BK=stored["values"],
            indices_BK=torch.where(empty_BK, _absent(indices_BK, empty_BK), indices_BK).to(stored["indices"].dtype),
            tail_logmass_B=stored["tail_logmass"],
            lse_B=stored["lse"],
            classes=self.classes,
            count_B=count_B.int(),
        )


def _absent(indices_BK: Tensor, empty_BK: Tensor) -> Tensor:
    """For each empty place a class that its row does not hold, each another: among the first K there are enough."""
    places = indices_BK.shape[-1]
    present_BK = torch.zeros((*indices_BK.shape[:-1], places + 1), dtype=torch.bool, device=indices_BK.device)
    present_BK.scatter_(-1, indices_BK.clamp(max=places), True)
    free_BK = present_BK[..., :places].int().argsort(dim=-1, stable=True)
    nth_BK = empty_BK.int().cumsum(-1).sub(1).clamp(min=0).long()
    return free_BK.gather(-1, nth_BK)
