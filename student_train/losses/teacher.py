"""What a loss reads of the teacher: constants, of all classes or of all features, or a refusal."""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_cache.encodings import DenseTarget, SparseTarget, Target
from teacher_cache.errors import MismatchError


def dense_values(target: Target, loss: str) -> Tensor:
    """The teacher's own numbers, a constant of float32 at least: raw logits [B, C], or features [B, ...].

    Args:
        target: dense; quantised values are read through their scale.
        loss: who asks, for the message.

    Raises:
        MismatchError: the target is sparse. What it says of the classes left out is a mass that they share, and a
            formula in which each class counts the same, whatever its mass, would mostly compare those.
    """
    if isinstance(target, SparseTarget):
        hint = "Read a field with a dense encoding, such as dense_u8, or use soft targets."
        raise MismatchError(f"{loss}.target", "must hold a number for every class", _kind(target), hint)
    values = target.dense().values.detach()
    return values.to(torch.promote_types(values.dtype, torch.float32))


def all_log_probs(target: Target, temperature: float, loss: str) -> Tensor:
    """Log-probabilities [B, C] of all classes at T, a constant of float32: for formulas that weigh by probability.

    Args:
        target: dense, or sparse with a tail that says what each class left out has.
        temperature: T > 0.
        loss: who asks, for the message.

    Raises:
        MismatchError: the target is a sample, which is right in the mean for formulas linear in p alone, or its tail
            is `ghost`, which says nothing of single classes.
    """
    if isinstance(target, SparseTarget) and (target.drawn_at is not None or (target.tail == "ghost" and target.rest)):
        hint = "Read a dense field or a top_k one with another tail, or use soft targets."
        raise MismatchError(f"{loss}.target", "must say what each class left out has", _kind(target), hint)
    if isinstance(target, DenseTarget):
        target = DenseTarget(target.values.detach(), target.scale)
    return target.log_probs(temperature)


def require_shape(student: Tensor, shape: tuple[int, ...], name: str = "student logits") -> None:
    """Refuses a student's tensor of another shape than the target's.

    Neither gather, nor the sum over the classes left out, nor broadcasting would notice.

    Raises:
        MismatchError: the shapes differ.
    """
    if tuple(student.shape) != tuple(shape):
        rule = f"must be {list(shape)} as the cached target is"
        what = "the teacher's classes, and as many positions" if name == "student logits" else "the teacher's shape"
        raise MismatchError(name, rule, tuple(student.shape), f"Give the student {what}.")


def require_rows(student: Tensor, rows: int, name: str) -> None:
    """Refuses a student's tensor of another number of rows than the target's.

    Raises:
        MismatchError: the numbers differ.
    """
    if len(student) != rows:
        rule = f"must have {rows} rows as the cached target has"
        raise MismatchError(name, rule, len(student), "Give the student the views of the batch.")


def _kind(target: SparseTarget) -> str:
    if target.drawn_at is not None:
        return "sampled_k"
    return f"{target.values_BK.shape[-1]} of {target.classes} classes, tail {target.tail}"
