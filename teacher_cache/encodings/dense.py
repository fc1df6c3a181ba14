"""Dense encodings: every value, in single or half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, require_finite, tensors
from teacher_cache.encodings.dense_target import DenseTarget

_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {"float32": "dense_f32", "float16": "dense_f16", "bfloat16": "dense_bf16"}


@dataclass(frozen=True)
class Dense:
    """Values as float32 (exact), float16 or bfloat16 (relative error at most 2⁻¹¹ and 2⁻⁸ for normal numbers).

    NumPy and Zarr know no bfloat16: its bits are kept as uint16.

    For logits below 32 in size, float16 is lossless for distillation: KL about 1e-6 at T = 1.
    """

    shape: tuple[int, ...]
    """Of one row: (C,) for logits."""
    dtype: Literal["float32", "float16", "bfloat16"]

    @property
    def name(self) -> str:
        """`dense_f32`, `dense_f16` or `dense_bf16`."""
        return _NAMES[self.dtype]

    @property
    def parts(self) -> tuple[Part, ...]:
        """One part, `values`."""
        return (Part("values", "uint16" if self.dtype == "bfloat16" else self.dtype, self.shape),)

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, ...] to `values`; a finite value that overflows the type is refused like inf."""
        stored = values.to(_TORCH[self.dtype])
        require_finite(stored, self.name)
        stored = stored.cpu().contiguous()
        bits = stored.view(torch.uint16) if self.dtype == "bfloat16" else stored
        return {"values": bits.numpy()}

    def decode(self, columns: Columns) -> DenseTarget:
        """The stored values, in their stored type."""
        values = tensors(columns)["values"]
        return DenseTarget(values.view(torch.bfloat16) if self.dtype == "bfloat16" else values)
