"""Evaluation: what a model says of labelled data, always on view 0 and always in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from student_train.data import Rows
from student_train.losses import soft_target_loss
from student_train.stream import ViewStream
from teacher_cache.encodings import SparseTarget, Target
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.spec import NormalizeSpec
from teacher_cache.views import normalize


@dataclass(frozen=True)
class Measure:
    """How one figure is shown."""

    title: str
    show: Callable[[float], str]
    show_difference: Callable[[float], str]
    more_is_better: bool = True


def _percent(title: str) -> Measure:
    return Measure(title, "{:.2%}".format, "{:+.2%}".format)


MEASURES: Final[Mapping[str, Measure]] = {
    "accuracy": _percent("accuracy"),
    "validation_accuracy": _percent("accuracy, validation"),
    "agreement": _percent("agrees with teacher"),
    "kl": Measure("KL from teacher, nats", "{:.4f}".format, "{:+.4f}".format, more_is_better=False),
}
"""What may be measured of a student, in the order in which it is shown."""


@dataclass(frozen=True)
class Measured:
    """Of one model on one set of rows."""

    accuracy: float
    """Share of rows whose largest logit is the label."""
    agreement: float | None = None
    """Share of rows whose largest logit is the teacher's, where its answers are at hand."""
    kl: float | None = None
    """Mean KL(teacher ‖ student) at T = 1, in nats."""

    def named(self) -> Mapping[str, float]:
        """What there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@torch.inference_mode()
def measure(
    model: nn.Module,
    data: Rows,
    normalization: NormalizeSpec | None,
    device: str = "cpu",
    *,
    teacher: str | None = None,
    batch_size: int = 512,
) -> Measured:
    """Accuracy, and how near the model is to a teacher whose answers to the same views are cached.

    Args:
        model: images to logits; its mode (training or evaluation) is put back afterwards.
        data: labelled rows; view 0 is used.
        normalization: what the model expects.
        device: where the model is.
        teacher: the cached field of logits that the model is held against.
        batch_size: has no effect on the result beyond rounding.

    Raises:
        SpecError: the data has no labels, or its recipe is random.
        MismatchError: the data has no such field, or it does not tell a row's largest class.
    """
    require_measurable(data, "evaluate", teacher)
    training = model.training
    model.eval()
    correct, same, divergence = 0, 0, 0.0
    fields = () if teacher is None else (teacher,)
    for batch in ViewStream(data, batch_size=batch_size, fields=fields, shuffle=False):
        logits_BC: Tensor = model(normalize(batch.views_BCHW.to(device), normalization)).cpu().float()
        said_B = logits_BC.argmax(1)
        assert batch.labels_B is not None
        correct += int((said_B == batch.labels_B).sum())
        if teacher is not None:
            target = batch.targets[teacher]
            same += int((said_B == _top(target)).sum())
            divergence += float(soft_target_loss(logits_BC, target, 1.0)) * len(batch)
    model.train(training)
    rows = len(data.alive)
    if teacher is None:
        return Measured(correct / rows)
    return Measured(correct / rows, same / rows, divergence / rows)


def require_measurable(data: Rows, where: str, teacher: str | None = None) -> None:
    """Refuses what cannot be measured on, before anybody trains for it.

    Args:
        data: what `measure` would be given.
        where: how the configuration calls it.
        teacher: the cached field that a student would be held against.

    Raises:
        SpecError: the data has no labels, or its recipe is random.
        MismatchError: the data has no such field, or it does not tell a row's largest class.
    """
    if data.labels is None:
        raise SpecError(f"{where}.source", "must have labels", None, "Give a labelled source.")
    if data.views != 1:
        hint = "Use resize, center_crop and normalize only; or a cache of one view."
        found = "another view at each showing" if data.views is None else f"{data.views} views"
        raise SpecError(f"{where}.views", "must be one view with nothing random in it", found, hint)
    if teacher is not None:
        data.require((teacher,))
        _top(data.read(teacher, 0, data.alive[:1]))


def _top(target: Target) -> Tensor:
    """The teacher's largest class of each row."""
    if target.drawn_at is not None:
        hint = "Evaluate against a field with another encoding."
        raise MismatchError("evaluate.teacher", "must tell the largest class of each row", "sampled_k", hint)
    if isinstance(target, SparseTarget):
        # Sorted down, as every encoding keeps them.
        return target.indices_BK[:, 0].long()
    return target.dense().values.argmax(1)


def accuracy(
    model: nn.Module, data: Rows, normalization: NormalizeSpec | None, device: str = "cpu", batch_size: int = 512
) -> float:
    """Share of rows whose largest logit is the label; see `measure`."""
    return measure(model, data, normalization, device, batch_size=batch_size).accuracy
