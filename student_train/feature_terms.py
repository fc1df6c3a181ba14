"""Step 9, terms of features: what the student's inside is compared with, and the projections that this takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from student_train.answer import Answer
from student_train.losses import (
    angle_loss,
    attention_map,
    attention_transfer_loss,
    distance_loss,
    feature_mae,
    feature_mse,
    normalised_activation_loss,
    similarity_loss,
)
from student_train.objective import Shape, Shapes
from student_train.stream import Batch
from student_train.terms import OfOneField, Stateless, require_one_of, require_some
from student_train.weight import Weight, require_weight
from teacher_cache.encodings import Target
from teacher_cache.errors import SpecError


@dataclass(frozen=True)
class OfFeatures(OfOneField, Stateless):
    """A node of the student and a cached field that is compared with it."""

    node: str
    """A module of the student, as `named_modules` has it."""
    field: str
    """The cached field, such as `feature:layer3`."""
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        require_weight(self.name, self.weight)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The student's module."""
        return (self.node,)


@dataclass(frozen=True)
class Feature(OfFeatures):
    """Mean squared or absolute difference of features; through a projection that is trained where widths differ.

    Of maps [C, H, W] the projection is a convolution (hints: Romero et al., "FitNets", 2015, there with weight
    100); of vectors and of tokens [N, D] a linear layer. A student's map is averaged over space where the cached
    field is a vector.
    """

    distance: Literal["mse", "mae"] = "mse"
    kernel: Literal[1, 3] = 1
    """Of the convolution; with 3 there is one also where the channels are as many."""

    name: ClassVar[str] = "feature"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("feature.distance", self.distance, ("mse", "mae"))
        if self.kernel not in (1, 3):
            raise SpecError("feature.kernel", "must be 1 or 3", self.kernel, "Choose one of them.")

    def joint(self, shapes: Shapes) -> nn.Module | None:
        """A projection to the teacher's channels, or None where they are as many.

        Raises:
            SpecError: a map and a field that no projection of channels brings together; or a kernel and no maps.
        """
        student, teacher = shapes.nodes[self.node], shapes.fields[self.field]
        if self.kernel != 1 and not len(student) == len(teacher) == 3:
            hint = "Leave it out, or cache the field without pooling."
            raise SpecError("feature.kernel", "is for maps on both sides", f"{list(student)}, {list(teacher)}", hint)
        if len(teacher) == 1 and len(student) in (1, 3):
            return None if student[0] == teacher[0] else nn.Linear(student[0], teacher[0])
        if len(student) == len(teacher) == 3 and student[1:] == teacher[1:]:
            if self.kernel == 1 and student[0] == teacher[0]:
                return None
            return nn.Conv2d(student[0], teacher[0], self.kernel, padding=self.kernel // 2)
        if len(student) == len(teacher) == 2 and student[0] == teacher[0]:
            return None if student[1] == teacher[1] else nn.Linear(student[1], teacher[1])
        rule = f"must put out what a projection of channels brings to {list(teacher)}, as {self.field} is"
        hint = "Choose a node of the same height and width, or as many tokens; or cache the field with `pool: mean`."
        raise SpecError(f"feature.{self.node}", rule, list(student), hint)

    def __call__(self, answer: Answer, batch: Batch, joint: nn.Module | None, *_: object) -> Tensor:
        target = batch.targets[self.field]
        value = as_field(answer.nodes[self.node], target)
        projected = value if joint is None else joint(value)
        return feature_mse(projected, target) if self.distance == "mse" else feature_mae(projected, target)


def as_field(value: Tensor, target: Target) -> Tensor:
    """A map averaged over space where the teacher's feature is a vector."""
    return value.flatten(2).mean(2) if value.ndim > 2 and target.dense().values.ndim == 2 else value


@dataclass(frozen=True)
class AttentionTransfer(OfFeatures):
    """Where both look: squared distance of the normalised attention maps (Zagoruyko and Komodakis 2017).

    Their code takes the mean over the H·W places and weighs it by 1000: the weight here is 1000 / (H·W).
    """

    squared: bool = True
    """False: the paper's own form, the distance itself."""

    name: ClassVar[str] = "attention"

    def joint(self, shapes: Shapes) -> nn.Module | None:
        """Nothing is trained; maps must have one size."""
        student, teacher = shapes.nodes[self.node], shapes.fields[self.field]
        here: Shape = student[1:] if len(student) == 3 else student[:1]
        if here != teacher:
            rule = f"must have maps of {list(teacher)}, as {self.field} has"
            raise SpecError(f"attention.{self.node}", rule, list(here), "Choose a node of that height and width.")
        return None

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        attention = attention_map(answer.nodes[self.node])
        loss = attention_transfer_loss if self.squared else normalised_activation_loss
        return loss(attention, batch.targets[self.field])


@dataclass(frozen=True)
class Relations(OfFeatures):
    """Distances between the rows of a batch, and angles among any three (RKD: Park et al. 2019)."""

    distance_weight: float = 25.0
    angle_weight: float = 50.0

    name: ClassVar[str] = "relations"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_some(self.name, distance_weight=self.distance_weight, angle_weight=self.angle_weight)

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        feature, target = answer.nodes[self.node], batch.targets[self.field]
        parts = []
        if self.distance_weight:
            parts.append(self.distance_weight * distance_loss(feature, target))
        if self.angle_weight:
            parts.append(self.angle_weight * angle_loss(feature, target))
        return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class SimilarityPreserving(OfFeatures):
    """Which rows of a batch are alike (Tung and Mori 2019, there with weight 3000)."""

    name: ClassVar[str] = "similarity"

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        return similarity_loss(answer.nodes[self.node], batch.targets[self.field])
