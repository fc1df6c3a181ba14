"""Several teachers as one: what their mean is depends on what is averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from student_train.losses.teacher import all_log_probs
from teacher_cache.encodings import SparseTarget, Target
from teacher_cache.errors import MismatchError, SpecError


def mean_of_probabilities(targets: Sequence[Target], temperature: float) -> Tensor:
    """log of mean_m softmax(z_m / T), [B, C]: the mixture, for `soft_label_loss` at the same T.

    Hinton et al., 2015, section 1; Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation
    using deep ensembles", 2017, section 2.4. It is as broad as its teachers differ.

    Args:
        targets: one for each of M teachers, of the same rows and classes.
        temperature: T > 0.

    Returns:
        Log-probabilities, float32.

    Raises:
        SpecError: there is no teacher.
        MismatchError: teachers differ in shape, or one does not say what each class has.
    """
    return _log_probs(targets, temperature, "mean_of_probabilities").logsumexp(0) - math.log(len(targets))


def geometric_mean(targets: Sequence[Target], temperature: float) -> Tensor:
    """log softmax of mean_m z_m / T, [B, C]: the mean of logits, which is the normalised geometric mean.

    Hinton et al., 2015, section 1, name both means. This is another target than `mean_of_probabilities`: a class that
    one teacher rules out is ruled out. A row of which the teachers rule out every class has no such mean and is NaN.

    Args:
        targets: one for each of M teachers, of the same rows and classes.
        temperature: T > 0.

    Returns:
        Log-probabilities, float32, for `soft_label_loss` at the same T.

    Raises:
        SpecError: there is no teacher.
        MismatchError: teachers differ in shape, or one does not say what each class has.
    """
    # A teacher's log-probabilities differ from its logits / T by a constant of the row, which the softmax cancels.
    return torch.log_softmax(_log_probs(targets, temperature, "geometric_mean").mean(0), dim=-1)


def majority_vote(targets: Sequence[Target]) -> Tensor:
    """log of (votes / M), [B, C]: each teacher votes for its largest logit; −∞ where nobody does.

    A distribution at T = 1, for `soft_label_loss` at T = 1: a vote has no temperature. Of equal logits the first
    class gets the vote.

    Args:
        targets: one for each of M teachers, of the same rows and classes; of sparse ones all tails will do.

    Returns:
        Log-probabilities, float32.

    Raises:
        SpecError: there is no teacher.
        MismatchError: teachers differ in shape, or one is a sample, in which the largest may be missing.
    """
    _require_same(targets)
    classes = _shape(targets[0])[-1]
    return torch.stack([functional.one_hot(_vote(target), classes) for target in targets]).float().mean(0).log()


def _vote(target: Target) -> Tensor:
    if not isinstance(target, SparseTarget):
        return target.dense().values.argmax(dim=-1)
    if target.drawn_at is not None:
        hint = "Read a dense, top_k or nucleus field."
        raise MismatchError("majority_vote.target", "must hold each row's largest logit", "sampled_k", hint)
    return target.indices_BK[..., 0].long()


def _log_probs(targets: Sequence[Target], temperature: float, loss: str) -> Tensor:
    """[M, B, C]."""
    _require_same(targets)
    return torch.stack([all_log_probs(target, temperature, loss) for target in targets])


def _require_same(targets: Sequence[Target]) -> None:
    if not targets:
        raise SpecError("targets", "needs at least one teacher", "none", "Name the teachers' fields.")
    for place, target in enumerate(targets):
        if _shape(target) != _shape(targets[0]):
            rule = f"must be {list(_shape(targets[0]))} as the first teacher's is"
            hint = "Teachers of one ensemble answer on the same rows and classes."
            raise MismatchError(f"targets[{place}]", rule, _shape(target), hint)


def _shape(target: Target) -> tuple[int, ...]:
    if isinstance(target, SparseTarget):
        return (*target.values_BK.shape[:-1], target.classes)
    return tuple(target.values.shape)
