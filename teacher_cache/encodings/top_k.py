"""Top-k: the largest logits with their classes, and the log-mass of what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, require_finite
from teacher_cache.encodings.target import SparseTarget


@dataclass(frozen=True)
class TopKLogits:
    """k logits less the row's maximum (float16), their classes, the tail's log-mass and the row's log-sum-exp.

    The tail's mass is computed in float32 from the exact logits and stored: derived from rounded values it
    would cancel catastrophically.
    """

    classes: int
    """C, the length of the teacher's logits."""
    k: int
    """How many are kept, 1..C."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.classes:
            raise ValueError(f"k must be in 1..{self.classes}, the number of classes, found {self.k}")

    @property
    def name(self) -> str:
        """`top_k`."""
        return "top_k"

    @property
    def parts(self) -> tuple[Part, ...]:
        """`values`, `indices`, `tail_logmass`, `lse`."""
        return (
            Part("values", "float16", (self.k,)),
            Part("indices", narrowest(self.classes), (self.k,)),
            Part("tail_logmass", "float16", ()),
            Part("lse", "float16", ()),
        )

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, C] to the four parts; ties are kept in the order of the class numbers."""
        require_finite(values, self.name)
        sorted_BC, order_BC = values.sort(dim=1, descending=True, stable=True)
        shifted_BC = sorted_BC - sorted_BC[:, :1]
        tail_B = torch.logsumexp(shifted_BC[:, self.k :], dim=1)
        kept_BK = shifted_BC[:, : self.k].half()
        lse_B = torch.logsumexp(values, dim=1).half()
        require_finite(torch.cat([kept_BK, lse_B[:, None]], dim=1), self.name)
        return {
            "values": kept_BK.cpu().numpy(),
            "indices": order_BC[:, : self.k].cpu().numpy().astype(narrowest(self.classes)),
            "tail_logmass": tail_B.half().cpu().numpy(),
            "lse": lse_B.cpu().numpy(),
        }

    def decode(self, columns: Columns) -> SparseTarget:
        """The stored parts as a sparse target, in their stored types."""
        names = ("values", "indices", "tail_logmass", "lse")
        values, indices, tail, lse = (torch.from_numpy(columns[name]) for name in names)
        return SparseTarget(values, indices, tail, lse, self.classes)


def narrowest(classes: int) -> str:
    """The smallest unsigned type that holds every class number."""
    return next(name for name in ("uint8", "uint16", "uint32") if classes - 1 <= np.iinfo(name).max)
