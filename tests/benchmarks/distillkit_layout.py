"""DistillKit's record layout: exact head, polynomial for the rest, class numbers in as few bits as they need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from published_layouts import Layout, Record
from torch import Tensor

Term = int | Literal["sqrt"]
_LEAST = 1e-6
"""Below which DistillKit lets no mass fall that it spreads over what is missing."""


@dataclass(frozen=True)
class DistillKit(Layout):
    """Goddard and Atkins, 2024; read from arcee-ai/DistillKit's `compression/{config,compressor,bitpack}.py`,
    `compression/monotonic_logprobs.py`, `lossfuncs/{common,kl}.py` and `README.md`.

    Log-probabilities sorted down: the first `exact` as they are, the others as least-squares coefficients (float32)
    of terms in their place 0, 1, 2 …; with `delta`, differences are kept instead. Class numbers are packed in
    ⌈log₂ C⌉ bits, highest first. `missing` says what the loss takes for the rest: nothing (`zero`, the default), or
    its mass as one more class (`uniform`), softened as one class and then evenly over those that are missing.
    """

    exact: int
    """How many are kept as they are."""
    terms: tuple[Term, ...] = ()
    """Powers, or the square root, of the place; none where exact = k."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the exact ones."""
    delta: bool = False
    missing: Literal["zero", "uniform"] = "uniform"
    solve: Literal["float32", "float64"] = "float64"
    """In which coefficients are found. float32 is what its capture from vLLM does, and loses high powers of the place
    to rounding (singular values span 5e8 to 0.8); float64 is what its solver does with float64 values."""

    @property
    def name(self) -> str:
        marks = {" delta": self.delta, " f32-fit": self.solve == "float32", " zero": self.missing == "zero"}
        said = "".join(mark for mark, there in marks.items() if there)
        return f"DistillKit k={self.k} exact={self.exact}{said}"

    def encode(self, logits_BC: Tensor) -> Record:
        """The bytes of the log-probabilities, [B, n], and of the class numbers, [B, m]."""
        values_BK, indices_BK = torch.log_softmax(logits_BC, dim=1).topk(self.k, dim=1)
        if self.delta:
            values_BK = torch.cat([values_BK[:, :1], values_BK.diff(dim=1)], dim=1)
        head = values_BK[:, : self.exact].to(getattr(torch, self.dtype)).contiguous().view(torch.uint8)
        dtype = getattr(torch, self.solve)
        coefficients_BP = _least_squares(self._places().to(dtype), values_BK[:, self.exact :].to(dtype)).float()
        values = torch.cat([head, coefficients_BP.contiguous().view(torch.uint8)], dim=1)
        return {"values": values.numpy(), "indices": packed(indices_BK.numpy(), self.bits)}

    @property
    def bits(self) -> int:
        """Of one class number."""
        return math.ceil(math.log2(self.classes))

    def _places(self) -> Tensor:
        """The terms at each place, float32 [k − exact, P]."""
        places = torch.arange(self.k - self.exact, dtype=torch.float32)
        columns = [places.sqrt() if term == "sqrt" else places**term for term in self.terms]
        return torch.stack(columns, dim=1) if columns else places.new_zeros(len(places), 0)

    def _kept(self, record: Record) -> tuple[Tensor, Tensor]:
        dtype, stored = getattr(torch, self.dtype), record["values"]
        split = self.exact * dtype.itemsize
        head_BK = torch.from_numpy(stored[:, :split].copy()).view(dtype).float()
        coefficients_BP = torch.from_numpy(stored[:, split:].copy().view(np.float32))
        fitted_BK = (self._places() * coefficients_BP[:, None, :]).sum(2)
        values_BK = torch.cat([head_BK, fitted_BK], dim=1)
        if self.delta:
            values_BK = values_BK.cumsum(1)
        indices = unpacked(record["indices"], self.bits, self.k)
        return values_BK.double(), torch.from_numpy(indices)

    def log_probs(self, record: Record, temperature: float) -> Tensor:
        values_BK, indices_BK = self._kept(record)
        kept_BK, rest_B1 = values_BK / temperature, values_BK.new_full((len(values_BK), 1), -math.inf)
        if self.missing == "uniform" and self.k < self.classes:
            if temperature != 1:
                left_B1 = (1 - values_BK.exp().sum(1, keepdim=True)).clamp(0, 1) ** (1 / temperature)
                kept_BK = kept_BK - (kept_BK.exp().sum(1, keepdim=True) + left_B1).log()
            rest_B1 = (1 - kept_BK.exp().sum(1, keepdim=True)).clamp(min=_LEAST).log()
            rest_B1 = rest_B1 - math.log(self.classes - self.k)
        return torch.log_softmax(rest_B1.repeat(1, self.classes).scatter(1, indices_BK, kept_BK), dim=1)


def _least_squares(places_KP: Tensor, values_BK: Tensor) -> Tensor:
    """Coefficients [B, P] by the pseudo-inverse, singular values up to 1e-5 left out."""
    if not places_KP.numel():
        return values_BK.new_zeros(len(values_BK), places_KP.shape[1])
    left, sizes, right = torch.linalg.svd(places_KP, full_matrices=False)
    inverse = torch.where(sizes > 1e-5, 1 / sizes, 0.0)
    return ((values_BK @ left) * inverse) @ right


def packed(indices_BK: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Class numbers to bytes, highest bit first, one after the other, [B, ⌈K · bits ⁄ 8⌉]."""
    single = (indices_BK[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)
    return np.packbits(single.reshape(len(indices_BK), -1), axis=1)


def unpacked(stored: NDArray[np.uint8], bits: int, k: int) -> NDArray[np.int64]:
    """The reverse, [B, K]."""
    single = np.unpackbits(stored, axis=1, count=k * bits).reshape(len(stored), k, bits)
    return single.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64)[::-1])


def distillkit(classes: int) -> Iterator[DistillKit]:
    """The README's three configurations as far as there are classes for them, and plain exact heads in bfloat16."""
    for k in (1, 2, 3, 5, 10, 20, 32, 50, 100, 200, 500):
        if k <= classes:
            yield DistillKit(classes, k, exact=k)
    if classes >= 50:
        yield DistillKit(classes, 50, 1, (0, 1, "sqrt"))
    if classes >= 128:
        yield DistillKit(classes, 128, 16, (0, 1, 2, 3, 4, "sqrt"))
        yield DistillKit(classes, 128, 16, (0, 1, 2, 3, 4, "sqrt"), solve="float32")
        yield DistillKit(classes, 128, 16, (0, 1, 2, 3, 4, "sqrt"), missing="zero")
        yield DistillKit(classes, 128, 32, (0, 1, 2), "float32", delta=True)
