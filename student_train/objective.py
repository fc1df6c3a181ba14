"""Step 9, objective: named weighted terms that declare which cached fields they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from student_train.losses import soft_target_loss
from student_train.stream import Batch
from teacher_cache.errors import SpecError


class Term(Protocol):
    """One part of an objective. Pure; safe to share.

    Attributes:
        name: how it is called in logs.
        weight: what its value is multiplied by.
        reads: the cached fields that it needs.
        needs_labels: whether batches must have labels.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool]

    @property
    def weight(self) -> float: ...

    @property
    def reads(self) -> tuple[str, ...]: ...

    def __call__(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        """The unweighted value, a scalar."""


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise SpecError(name, "must be above 0", value, "Choose another value.")


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with the hard labels, always at T = 1; of a mixed view with both, each by its share."""

    weight: float = 1.0
    label_smoothing: float = 0.0
    """Share of the mass spread evenly over all classes, 0..1."""

    name: ClassVar[str] = "cross_entropy"
    needs_labels: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        _positive("cross_entropy.weight", self.weight)
        if not 0 <= self.label_smoothing < 1:
            rule = "must be in 0..1, 1 excluded"
            raise SpecError("cross_entropy.label_smoothing", rule, self.label_smoothing, "Choose another value.")

    def __call__(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        assert batch.labels_B is not None, "the objective was checked against the data"
        own_B = self._each(logits_BC, batch.labels_B)
        if batch.mixing is None:
            return own_B.mean()
        assert batch.mixing.labels_B is not None, "partners come from the rows, which have labels"
        shares_B, partners_B = batch.mixing.shares_B, self._each(logits_BC, batch.mixing.labels_B)
        return (shares_B * own_B + (1 - shares_B) * partners_B).mean()

    def _each(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        return functional.cross_entropy(logits_BC, labels_B, label_smoothing=self.label_smoothing, reduction="none")


@dataclass(frozen=True)
class KD:
    """Soft targets: T² · KL(teacher ‖ student) at temperature T."""

    weight: float = 1.0
    temperature: float = 4.0
    field: str = "logits"
    """The cached field that holds the teacher's logits."""

    name: ClassVar[str] = "kd"
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _positive("kd.weight", self.weight)
        _positive("kd.temperature", self.temperature)

    @property
    def reads(self) -> tuple[str, ...]:
        """The field of the logits."""
        return (self.field,)

    def __call__(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        return soft_target_loss(logits_BC, batch.targets[self.field], self.temperature)


class Objective:
    """A weighted sum of terms."""

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise SpecError("objective", "needs at least one term", "none", "For example cross_entropy.")
        self.terms = tuple(terms)
        names = [term.name for term in self.terms]
        self._names = [f"{name}_{place}" if names.count(name) > 1 else name for place, name in enumerate(names)]

    @property
    def fields(self) -> tuple[str, ...]:
        """The cached fields that some term reads: what a stream must carry."""
        return tuple(sorted({field for term in self.terms for field in term.reads}))

    @property
    def needs_labels(self) -> bool:
        """Whether some term reads the labels."""
        return any(term.needs_labels for term in self.terms)

    def __call__(self, logits_BC: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term's own unweighted value (detached) for the logs, by name (`kd_1` of two)."""
        loss = torch.zeros((), device=logits_BC.device)
        values: dict[str, Tensor] = {}
        for name, term in zip(self._names, self.terms, strict=True):
            value = term(logits_BC, batch)
            loss = loss + term.weight * value
            values[name] = value.detach()
        return loss, values
