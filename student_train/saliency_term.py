"""Step 9, saliency: what in a view the student's answer rests on, compared with the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from student_train.answer import Answer
from student_train.losses import saliency_loss
from student_train.objective import Shapes, joined
from student_train.stream import Batch
from student_train.terms import OfOneField, Stateless, own_labels
from student_train.weight import Weight, require_weight
from teacher_cache.errors import SpecError
from teacher_cache.spec import NormalizeSpec
from teacher_cache.teachers.saliency import at_pixels

_SCALE = 1024.0
"""A power of two, which is taken out again: small gradients would vanish within float16's autocast."""


class Pixels(nn.Module):
    """Takes a gradient at the student's input back to the pixels, where the teacher's is; nothing in it is trained."""

    def __init__(self, normalization: NormalizeSpec | None) -> None:
        super().__init__()
        self.normalization = normalization

    def forward(self, gradient_BCHW: Tensor) -> Tensor:
        """The gradient at pixels of 0..1."""
        return at_pixels(gradient_BCHW, self.normalization)


@dataclass(frozen=True)
class Saliency(OfOneField, Stateless):
    """Squared distance of the gradients of the label's logit at the pixels, each of length 1 (Srinivas et al. 2018).

    It takes a second backward pass, about twice the time of a step, and layers that can be differentiated twice.
    Where batch norm looks at the whole batch, a row's gradient is that of the sum of all rows' logits.
    """

    weight: Weight = 1.0
    field: str = "saliency"
    """The cached gradients."""

    name: ClassVar[str] = "saliency"
    needs_labels: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True
    nodes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_weight(self.name, self.weight)

    def joint(self, shapes: Shapes) -> nn.Module:
        """The way back to the pixels.

        Raises:
            SpecError: the student's views have another shape than the teacher's.
        """
        teacher = shapes.fields[self.field]
        if shapes.inputs != teacher:
            rule, hint = f"must be views of {list(teacher)}, as {self.field} is", "Leave out the student's own size."
            raise SpecError("saliency.input", rule, list(shapes.inputs), hint)
        return Pixels(shapes.normalization)

    def __call__(self, answer: Answer, batch: Batch, joint: nn.Module | None, *_: object) -> Tensor:
        labels_B = own_labels(batch, self.name)
        assert answer.inputs_BCHW is not None, "the objective was checked against the answer"
        if answer.logits_BC.ndim != 2:
            rule, hint = "needs one row of logits for each view", "Leave it out: a sequence has no label's logit."
            raise SpecError("saliency", rule, tuple(answer.logits_BC.shape[1:]), hint)
        # A rehearsal, which learns nothing, runs without gradients; here one is part of the value.
        with torch.enable_grad(), torch.autocast(labels_B.device.type, enabled=False):
            own_B = answer.logits_BC.gather(1, labels_B[:, None])[:, 0]
            scale_B = torch.full_like(own_B, _SCALE)
            (scaled_BCHW,) = torch.autograd.grad(own_B, answer.inputs_BCHW, scale_B, create_graph=True)
        gradient_BCHW = joined(joint, Pixels, self.name)(scaled_BCHW.float() / _SCALE)
        return saliency_loss(gradient_BCHW, batch.targets[self.field])
