"""Step 9, temperature: soft targets at a temperature that is learned beside the student, and against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from student_train.answer import Answer
from student_train.losses import learned_temperature, reversal_weight, reversed_gradient, soft_target_loss
from student_train.objective import Shapes, joined
from student_train.stream import Batch
from student_train.terms import OfOneField, Stateless
from student_train.weight import Weight, require_weight
from teacher_cache.errors import SpecError

_FARTHEST = 10


class Temperature(nn.Module):
    """θ, of which the temperature is made: trained beside the student, and no part of it."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start))


@dataclass(frozen=True)
class LearnedTemperatureKD(OfOneField, Stateless):
    """Soft targets at a temperature T = 1 + 20 · sigmoid(θ) that is trained to make them harder (CTKD: Li et al. 2023).

    θ goes up the student's loss: its gradient is turned round, with a weight that rises along half a cosine. Its
    learning rate, its weight decay and the clipping of its gradient are the student's, as in the authors' code.
    """

    weight: Weight = 1.0
    start: float = 1.0
    """θ before the first step; 1 is T = 15.6."""
    rise: float = 0.05
    """Share of the run until the turned gradient counts in full, above 0 and at most 1; the authors' 10 of 240 epochs
    are 0.042."""
    field: str = "logits"
    """The cached logits, in a dense encoding."""

    name: ClassVar[str] = "ctkd"
    nodes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_weight(self.name, self.weight)
        if not 0 < self.rise <= 1:
            raise SpecError("ctkd.rise", "must be above 0 and at most 1", self.rise, "Choose a share of the run.")
        if not abs(self.start) <= _FARTHEST:
            hint = "Choose a smaller one: farther out the sigmoid is flat, and nothing is learned."
            raise SpecError("ctkd.start", f"must be in -{_FARTHEST}..{_FARTHEST}", self.start, hint)

    def joint(self, _shapes: Shapes) -> nn.Module:
        """θ."""
        return Temperature(self.start)

    def __call__(self, answer: Answer, batch: Batch, joint: nn.Module | None, progress: float) -> Tensor:
        theta = joined(joint, Temperature, self.name).theta
        against = reversed_gradient(theta, reversal_weight(progress, self.rise))
        return soft_target_loss(answer.logits_BC, batch.targets[self.field], learned_temperature(against))
