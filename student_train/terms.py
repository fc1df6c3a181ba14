"""Step 9, terms of logits: cross-entropy, soft targets, and what the field has made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from student_train.answer import Answer
from student_train.losses import (
    dist_loss,
    dkd_loss,
    logit_mse,
    nkd_loss,
    soft_target_loss,
    standardised,
    standardised_target,
)
from student_train.objective import Shapes
from student_train.stream import Batch
from student_train.weight import Weight, require_weight
from teacher_cache.errors import SpecError


def require_positive(name: str, value: float) -> None:
    """Raises `SpecError` where a number is not above 0, or is infinite."""
    if not (value > 0 and math.isfinite(value)):
        raise SpecError(name, "must be above 0, and finite", value, "Choose another value.")


def require_some(name: str, **weights: float) -> None:
    """Raises `SpecError` where one of a term's own weights is below 0, or none is above."""
    if min(weights.values()) < 0 or not 0 < sum(weights.values()) < math.inf:
        rule = "must all be at least 0 and finite, one of them above 0"
        raise SpecError(f"{name}.{', '.join(weights)}", rule, tuple(weights.values()), "Choose other values.")


def require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `SpecError` where a word is none of those that mean something."""
    if value not in choices:
        raise SpecError(name, f"must be one of {', '.join(choices)}", value, "Choose one of them.")


class OfOneField:
    """What terms that read one cached field have in common."""

    field: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The cached field."""
        return (self.field,)


class Stateless:
    """What terms that train nothing beside the student have in common, and all terms that do not say otherwise."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False

    def joint(self, _shapes: Shapes) -> nn.Module | None:
        """Nothing is trained beside the student."""
        return None

    def remember(self, _batch: Batch, _joint: nn.Module | None) -> None:
        """Nothing is kept of a batch."""


class OfLogits(Stateless):
    """What terms that read nothing of a student but its logits have in common."""

    weight: Weight
    temperature: float = 1.0
    """Of a term that has none to choose."""

    nodes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_weight(self.name, self.weight)
        require_positive(f"{self.name}.temperature", self.temperature)


@dataclass(frozen=True)
class CrossEntropy(OfLogits):
    """Cross-entropy with the hard labels, always at T = 1; of a mixed view with both, each by its share."""

    weight: Weight = 1.0
    label_smoothing: float = 0.0
    """Share of the mass spread evenly over all classes, 0..1."""

    name: ClassVar[str] = "cross_entropy"
    needs_labels: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            rule = "must be in 0..1, 1 excluded"
            raise SpecError("cross_entropy.label_smoothing", rule, self.label_smoothing, "Choose another value.")

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        assert batch.labels_B is not None, "the objective was checked against the data"
        own_B = self._each(answer.logits_BC, batch.labels_B)
        if batch.mixing is None:
            return own_B.mean()
        assert batch.mixing.labels_B is not None, "partners come from the rows, which have labels"
        shares_B, partners_B = batch.mixing.shares_B, self._each(answer.logits_BC, batch.mixing.labels_B)
        return (shares_B * own_B + (1 - shares_B) * partners_B).mean()

    def _each(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits_BC.float(), labels_B, label_smoothing=self.label_smoothing, reduction="none"
        )


@dataclass(frozen=True)
class KD(OfOneField, OfLogits):
    """Soft targets: T² · KL(teacher ‖ student) at temperature T."""

    weight: Weight = 1.0
    temperature: float = 4.0
    field: str = "logits"
    """The cached field that holds the teacher's logits."""
    standardise: bool = False
    """Whether both sides' logits are brought to mean 0 and deviation 1 first (Sun et al. 2024)."""

    name: ClassVar[str] = "kd"

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        target = batch.targets[self.field]
        if self.standardise:
            return soft_target_loss(standardised(answer.logits_BC), standardised_target(target), self.temperature)
        return soft_target_loss(answer.logits_BC, target, self.temperature)


@dataclass(frozen=True)
class LogitMSE(OfOneField, OfLogits):
    """Mean squared difference of the logits, each less its row's mean (Ba and Caruana 2014)."""

    weight: Weight = 1.0
    field: str = "logits"

    name: ClassVar[str] = "logit_mse"

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        return logit_mse(answer.logits_BC, batch.targets[self.field])


@dataclass(frozen=True)
class DIST(OfOneField, OfLogits):
    """Pearson correlation with the teacher, within rows and within classes (Huang et al. 2022)."""

    weight: Weight = 1.0
    temperature: float = 1.0
    rows_weight: float = 1.0
    classes_weight: float = 1.0
    field: str = "logits"

    name: ClassVar[str] = "dist"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_some(self.name, rows_weight=self.rows_weight, classes_weight=self.classes_weight)

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        target = batch.targets[self.field]
        return dist_loss(answer.logits_BC, target, self.temperature, self.rows_weight, self.classes_weight)


def own_labels(batch: Batch, name: str) -> Tensor:
    """One class number a row.

    Raises:
        SpecError: views are mixed, and rows have two.
    """
    assert batch.labels_B is not None, "the objective was checked against the data"
    if batch.mixing is not None:
        hint = "Use soft targets, or a recipe that does not mix."
        raise SpecError(name, "needs one label a row, and mixed views have two", "mixed views", hint)
    return batch.labels_B


@dataclass(frozen=True)
class DKD(OfOneField, OfLogits):
    """Soft targets taken apart: the label against all others, and the others among themselves (Zhao et al. 2022)."""

    weight: Weight = 1.0
    temperature: float = 4.0
    label_weight: float = 1.0
    """α of the paper."""
    others_weight: float = 8.0
    """β of the paper."""
    field: str = "logits"

    name: ClassVar[str] = "dkd"
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_some(self.name, label_weight=self.label_weight, others_weight=self.others_weight)

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        target, labels_B = batch.targets[self.field], own_labels(batch, self.name)
        return dkd_loss(answer.logits_BC, target, labels_B, self.temperature, self.label_weight, self.others_weight)


@dataclass(frozen=True)
class NKD(OfOneField, OfLogits):
    """The label with the teacher's certainty, and the others normalised without it (Yang et al. 2023)."""

    weight: Weight = 1.0
    temperature: float = 1.0
    others_weight: float = 1.5
    """γ of the paper."""
    field: str = "logits"

    name: ClassVar[str] = "nkd"
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # The label's own part counts 1.
        require_some(self.name, label=1.0, others_weight=self.others_weight)

    def __call__(self, answer: Answer, batch: Batch, *_: object) -> Tensor:
        target, labels_B = batch.targets[self.field], own_labels(batch, self.name)
        return nkd_loss(answer.logits_BC, target, labels_B, self.temperature, self.others_weight)
