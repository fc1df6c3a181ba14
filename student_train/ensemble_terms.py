"""Step 9, terms of several teachers: followed as one, or each by a head of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from student_train.answer import Answer
from student_train.losses import (
    geometric_mean,
    majority_vote,
    mean_of_probabilities,
    soft_label_loss,
    soft_target_loss,
)
from student_train.objective import Shapes
from student_train.stream import Batch
from student_train.terms import OfLogits, Stateless, require_one_of, require_positive
from student_train.weight import Weight, require_weight
from teacher_cache.errors import SpecError


def _require_several(name: str, fields: tuple[str, ...]) -> None:
    if len(set(fields)) < 2 or len(set(fields)) < len(fields):
        hint = "Name each teacher's logits once; for one teacher there is kd."
        raise SpecError(f"{name}.fields", "must be two or more different fields", fields, hint)


@dataclass(frozen=True)
class EnsembleKD(OfLogits):
    """Soft targets of several teachers together; what is averaged makes a different target, and is named."""

    fields: tuple[str, ...]
    """The cached logits of each teacher."""
    mean_of: Literal["probabilities", "logits", "votes"] = "probabilities"
    weight: Weight = 1.0
    temperature: float = 4.0
    """1 for votes, which have none."""

    name: ClassVar[str] = "ensemble_kd"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_several(self.name, self.fields)
        require_one_of("ensemble_kd.mean_of", self.mean_of, ("probabilities", "logits", "votes"))
        if self.mean_of == "votes" and self.temperature != 1:
            hint = "Set the temperature to 1."
            raise SpecError("ensemble_kd.temperature", "must be 1 for votes, which have none", self.temperature, hint)

    @property
    def reads(self) -> tuple[str, ...]:
        """The logits of all teachers."""
        return self.fields

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        targets = [batch.targets[field] for field in self.fields]
        match self.mean_of:
            case "probabilities":
                log_p_BC = mean_of_probabilities(targets, self.temperature)
            case "logits":
                log_p_BC = geometric_mean(targets, self.temperature)
            case "votes":
                log_p_BC = majority_vote(targets)
        return soft_label_loss(answer.logits_BC, log_p_BC, self.temperature)


@dataclass(frozen=True)
class HeadsKD(Stateless):
    """Soft targets of several teachers, each followed by a head of its own: the mean over heads (Tran et al. 2020).

    "Hydra: preserving ensemble diversity for model distillation". What the student answers with its heads together is
    its own affair; `Heads` does it as an ensemble does.
    """

    node: str
    """A module of the student that puts out the logits of all heads, [B, M · C] or [B, M, C]."""
    fields: tuple[str, ...]
    """The cached logits of each teacher, in the order of the heads."""
    weight: Weight = 1.0
    temperature: float = 4.0

    name: ClassVar[str] = "heads_kd"

    def __post_init__(self) -> None:
        require_weight(self.name, self.weight)
        require_positive("heads_kd.temperature", self.temperature)
        _require_several(self.name, self.fields)

    @property
    def reads(self) -> tuple[str, ...]:
        """The logits of all teachers."""
        return self.fields

    @property
    def nodes(self) -> tuple[str, ...]:
        """The heads."""
        return (self.node,)

    def joint(self, shapes: Shapes) -> nn.Module | None:
        """Nothing is trained beside the student.

        Raises:
            SpecError: the node has not as many heads, or heads not as many classes.
        """
        student, (first, *others) = shapes.nodes[self.node], (shapes.fields[field] for field in self.fields)
        if len(first) != 1 or any(shape != first for shape in others):
            rule, found = "must be logits of the same classes", [list(first), *map(list, others)]
            raise SpecError("heads_kd.fields", rule, found, "Give teachers of other classes terms of their own.")
        heads, classes = len(self.fields), first[0]
        if student not in ((heads * classes,), (heads, classes)):
            rule = f"must put out {heads} heads of {classes} classes, [{heads * classes}] or [{heads}, {classes}]"
            raise SpecError(f"heads_kd.{self.node}", rule, list(student), "Give it a head for each of `fields`.")
        return None

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        said = answer.nodes[self.node]
        heads_BMC = said.reshape(len(said), len(self.fields), -1)
        losses = [
            soft_target_loss(heads_BMC[:, head], batch.targets[field], self.temperature)
            for head, field in enumerate(self.fields)
        ]
        return torch.stack(losses).mean()
