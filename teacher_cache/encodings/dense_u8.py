"""Dense logits in one byte a class: so many steps below the row's maximum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Part, require_finite, tensors
from teacher_cache.encodings.dense_target import DenseTarget
from teacher_cache.encodings.scales import Steps

_LEVELS = 255


@dataclass(frozen=True)
class DenseU8:
    """uint8 levels below the maximum, with a fixed step or with one for each row; maximum and log-sum-exp beside.

    A level is off by at most half a step, so log-probabilities at temperature T are off by at most step / T, and
    KL(teacher ‖ decoded) is at most (step / T)² / 8 (a perturbation within ±δ has a variance of at most δ² under
    any distribution, and the log-partition's second derivative is a variance). With a fixed step, classes further
    than 255 steps below the maximum are kept at 255 steps: at 1/8 nat they have a probability below e^−31.
    """

    classes: int
    """C, the length of the teacher's logits."""
    step: float | None
    """Nats for one level; None for one step a row, its range over 255."""

    @property
    def name(self) -> str:
        """`dense_u8`."""
        return "dense_u8"

    @property
    def parts(self) -> tuple[Part, ...]:
        """`values`, `maximum`, `lse`, and `step` where rows have their own."""
        own = (Part("step", "float32", ()),) if self.step is None else ()
        return (
            Part("values", "uint8", (self.classes,)),
            *own,
            Part("maximum", "float16", ()),
            Part("lse", "float16", ()),
        )

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, C] to the parts; NaN, inf and a maximum beyond half precision are refused."""
        require_finite(values, self.name)
        maximum_B = values.amax(dim=1)
        below_BC = maximum_B[:, None].double() - values
        step_B = self._steps(below_BC)
        levels_BC = below_BC.div_(step_B.double()[:, None]).round_().clamp_(max=_LEVELS)
        scalars = torch.stack([maximum_B, torch.logsumexp(values, dim=1)], dim=1).half()
        require_finite(scalars, self.name)
        columns = {
            "values": levels_BC.to(torch.uint8),
            "maximum": scalars[:, 0],
            "lse": scalars[:, 1],
        }
        if self.step is None:
            columns["step"] = step_B
        return {name: column.cpu().contiguous().numpy() for name, column in columns.items()}

    def _steps(self, below_BC: Tensor) -> Tensor:
        if self.step is not None:
            return torch.full((len(below_BC),), self.step, device=below_BC.device)
        # A row of one value has no range: any step says so.
        spread_B = (below_BC.amax(dim=1) / _LEVELS).float()
        return torch.where(spread_B > 0, spread_B, 1.0)

    def decode(self, columns: Columns) -> DenseTarget:
        """Levels in their byte; they become logits where they are used."""
        stored = tensors(columns)
        step_B = torch.full_like(stored["maximum"].float(), self.step) if self.step is not None else stored["step"]
        return DenseTarget(stored["values"], Steps(step_B, stored["maximum"]))
