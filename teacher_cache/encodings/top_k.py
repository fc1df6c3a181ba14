"""Top-k: the largest logits with their classes, and the log-mass of what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, narrowest, require_finite, tensors
from teacher_cache.encodings.ordering import largest
from teacher_cache.encodings.packing import pack, packed_bytes, unpack
from teacher_cache.encodings.scales import Shared, to_levels
from teacher_cache.encodings.sparse_target import SparseTarget
from teacher_cache.spec import Tail


@dataclass(frozen=True)
class TopKLogits:
    """k logits less the row's maximum, their classes, the tail's log-mass and the row's log-sum-exp.

    The tail's mass is computed in float32 from the exact logits and stored: derived from rounded values it
    would cancel catastrophically.

    Values are float16, or uint8 levels spaced by the root of the depth, which are off by at most
    (4 / 255)·(2·√depth + 4 / 255) nats down to 64 nats below the maximum.
    """

    classes: int
    """C, the length of the teacher's logits."""
    k: int
    """How many are kept, 1..C."""
    values: Literal["f16", "u8"] = "f16"
    """How their depth below the maximum is kept."""
    ids: Literal["whole", "packed"] = "whole"
    """Class numbers in whole bytes, or in as many bits as they need."""
    tail: Tail = "uniform"
    """How the classes left out share their mass."""
    prior: Shared | None = None
    """The teacher's mean over the calibration rows, of `tail: prior`; not needed to encode."""

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
        indices = Part("indices", narrowest(self.classes), (self.k,))
        if self.ids == "packed":
            indices = Part("indices", "uint8", (packed_bytes(self.k, self.classes),))
        values = Part("values", "float16" if self.values == "f16" else "uint8", (self.k,))
        return (values, indices, Part("tail_logmass", "float16", ()), Part("lse", "float16", ()))

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, C] to the parts; ties are kept in the order of the class numbers."""
        require_finite(values, self.name)
        largest_BK, order_BK = largest(values, self.k)
        kept_BK = largest_BK - largest_BK[:, :1]
        rest_BC = (values - largest_BK[:, :1]).scatter_(1, order_BK, -torch.inf)
        lse_B = values.logsumexp(1).half()
        stored_BK = kept_BK.half() if self.values == "f16" else to_levels(-kept_BK)
        held_BK = stored_BK if self.values == "f16" else kept_BK
        require_finite(torch.cat([held_BK.float(), lse_B.float()[:, None]], dim=1), self.name)
        columns = {
            "values": stored_BK,
            "indices": self._ids(order_BK),
            "tail_logmass": rest_BC.logsumexp(1).half(),
            "lse": lse_B,
        }
        return {name: column.cpu().contiguous().numpy() for name, column in columns.items()}

    def _ids(self, order_BK: Tensor) -> Tensor:
        if self.ids == "packed":
            return pack(order_BK, self.classes)
        return order_BK.to(getattr(torch, narrowest(self.classes)))

    def decode(self, columns: Columns) -> SparseTarget:
        """The stored parts as a sparse target, in their stored types; packed class numbers in whole bytes."""
        stored = tensors(columns)
        indices = stored["indices"]
        return SparseTarget(
            values_BK=stored["values"],
            indices_BK=unpack(indices, self.k, self.classes) if self.ids == "packed" else indices,
            tail_logmass_B=stored["tail_logmass"],
            lse_B=stored["lse"],
            classes=self.classes,
            tail=self.tail,
            prior=self.prior,
        )
