"""Dense encodings: every value, in single or half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, require_finite
from teacher_cache.encodings.target import DenseTarget

_TORCH = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Dense:
    """Values as float32 (exact) or float16 (relative error at most 2⁻¹¹ for normal numbers).

    For logits below 32 in size, float16 is lossless for distillation: KL about 1e-6 at T = 1.
    """

    shape: tuple[int, ...]
    """Of one row: (C,) for logits."""
    dtype: Literal["float32", "float16"]

    @property
    def name(self) -> str:
        """`dense_f32` or `dense_f16`."""
        return "dense_f32" if self.dtype == "float32" else "dense_f16"

    @property
    def parts(self) -> tuple[Part, ...]:
        """One part, `values`."""
        return (Part("values", self.dtype, self.shape),)

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, ...] to `values`; a finite value that overflows float16 is refused like inf."""
        stored = values.to(_TORCH[self.dtype])
        require_finite(stored, self.name)
        return {"values": stored.cpu().contiguous().numpy()}

    def decode(self, columns: Columns) -> DenseTarget:
        """The stored values, in their stored type."""
        return DenseTarget(torch.from_numpy(columns["values"]))
