"""Dense logits in half a byte a class: sixteen levels over each row's range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, require_finite, tensors
from teacher_cache.encodings.dense_target import DenseTarget
from teacher_cache.encodings.scales import Steps

_LEVELS = 15
_LEAST = 2.0**-14
"""The smallest normal float16: rows that span less are kept as flat, which loses less than their rounding."""


@dataclass(frozen=True)
class DenseU4:
    """Levels 0..15 below the row's maximum, two classes a byte, with a step of the row's own.

    A level is off by at most half a step, so KL(teacher ‖ decoded) at temperature T is at most (step / T)² / 8, as of
    `dense_u8`; a step is a fifteenth of the row's range.
    """

    classes: int
    """C, the length of the teacher's logits."""

    @property
    def name(self) -> str:
        """`dense_u4`."""
        return "dense_u4"

    @property
    def parts(self) -> tuple[Part, ...]:
        """`values`, `step`, `maximum`, `lse`."""
        scalars = (Part(name, "float16", ()) for name in ("step", "maximum", "lse"))
        return (Part("values", "uint8", (-(-self.classes // 2),)), *scalars)

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, C] to the parts; NaN, inf and what half precision cannot hold are refused."""
        require_finite(values, self.name)
        maximum_B = values.amax(dim=1)
        below_BC = maximum_B[:, None].double() - values
        # Rounded up, so that fifteen steps reach the row's end.
        step_B = (below_BC.amax(dim=1) / _LEVELS * (1 + 2.0**-10)).clamp(min=_LEAST).half()
        scalars = torch.stack([step_B.float(), maximum_B, torch.logsumexp(values, dim=1)], dim=1).half()
        require_finite(scalars, self.name)
        levels_BC = below_BC.div_(step_B.double()[:, None]).round_().clamp_(max=_LEVELS).to(torch.uint8)
        if self.classes % 2:
            levels_BC = torch.cat([levels_BC, levels_BC.new_zeros((len(levels_BC), 1))], dim=1)
        columns = {"values": levels_BC[:, ::2] | levels_BC[:, 1::2] << 4, "step": step_B}
        columns |= {"maximum": scalars[:, 1], "lse": scalars[:, 2]}
        return {name: column.cpu().contiguous().numpy() for name, column in columns.items()}

    def decode(self, columns: Columns) -> DenseTarget:
        """Levels in a byte each; they become logits where they are used."""
        stored = tensors(columns)
        packed = stored["values"]
        levels = torch.stack([packed & _LEVELS, packed >> 4], dim=-1).flatten(-2)[..., : self.classes]
        return DenseTarget(levels, Steps(stored["step"].float(), stored["maximum"]))
