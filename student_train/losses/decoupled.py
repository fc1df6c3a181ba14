"""Soft targets taken apart: the label's class against all others, and the others among themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.losses.rows import wide
from student_train.losses.teacher import all_log_probs, require_shape
from student_train.sparse_kl import weighted
from teacher_cache.encodings import Target
from teacher_cache.errors import MismatchError

_NEVER = -1e30
"""Stands for the logarithm of 0: differences of it are finite, so that 0 · (−∞ + ∞) does not arise."""


@dataclass(frozen=True)
class _Split:
    """Log-probabilities, split at the label."""

    label_B: Tensor
    """Of the label's class."""
    others_B: Tensor
    """Of all other classes together, by log-sum-exp: log(1 − p_y) would lose all digits where p_y is near 1."""
    among_BC: Tensor
    """Of each other class, normalised over those; the label's own is negligible."""


def decoupled_kl(
    logits_BC: Tensor, target: Target, labels_B: Tensor, temperature: float = 4.0
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD [B]: KL(teacher ‖ student) = TCKD + (1 − p_y) · NCKD, at T, without T².

    Zhao, Cui, Song, Qiu, Liang, "Decoupled knowledge distillation", CVPR 2022, section 3. TCKD compares p_y
    and 1 − p_y, NCKD the other classes, normalised among themselves. Where the teacher gives the others exactly
    nothing, and where there are none, NCKD is 0.

    Args:
        logits_BC: student's raw logits [B, C], or [B, T, C] of sequences; of any floating type.
        target: dense, or sparse with a tail that says what each class left out has.
        labels_B: int64 class numbers in 0..C − 1, as many as there are rows or positions.
        temperature: T > 0.

    Raises:
        MismatchError: shapes differ, or the target does not say what each class has.
    """
    teacher, student = _both(logits_BC, target, labels_B, temperature, "decoupled_kl")
    tckd_B = weighted(teacher.label_B, teacher.label_B - student.label_B)
    tckd_B = tckd_B + weighted(teacher.others_B, teacher.others_B - student.others_B)
    nckd_B = weighted(teacher.among_BC, teacher.among_BC - student.among_BC).sum(dim=-1)
    return tckd_B, _where_known(nckd_B, teacher)


def dkd_loss(
    logits_BC: Tensor,
    target: Target,
    labels_B: Tensor,
    temperature: float = 4.0,
    label_weight: float = 1.0,
    others_weight: float = 8.0,
) -> Tensor:
    """T² · mean over the batch of label_weight · TCKD + others_weight · NCKD.

    Zhao et al., 2022, equation 7, with the constants that the authors' code uses for CIFAR-100: α = 1 is
    `label_weight`, β = 8 `others_weight`, T = 4. They sum both in probabilities; here both are sums of exponentials.

    Args:
        logits_BC: as in `decoupled_kl`, and so are `target` and `labels_B`.
        temperature: T > 0.
        label_weight: of TCKD, the authors' α.
        others_weight: of NCKD, the authors' β.

    Raises:
        MismatchError: shapes differ, or the target does not say what each class has.
    """
    tckd_B, nckd_B = decoupled_kl(logits_BC, target, labels_B, temperature)
    return temperature**2 * (label_weight * tckd_B + others_weight * nckd_B).mean()


def nkd_loss(
    logits_BC: Tensor, target: Target, labels_B: Tensor, temperature: float = 1.0, others_weight: float = 1.5
) -> Tensor:
    """Mean over the batch of −p_y log q_y + others_weight · T² · CE(teacher, student) over the normalised others.

    Yang et al., "From knowledge distillation to self-knowledge distillation: a unified approach with normalized loss
    and customized soft labels", ICCV 2023; γ = 1.5 is `others_weight` and T = 1, as in the authors' code.
    p_y and q_y are at T = 1 always, the others at T. The cross-entropy with the label that their code adds is not
    part of it. It is a cross-entropy: its least value is the teacher's entropy, not 0.

    Args:
        logits_BC: as in `decoupled_kl`, and so are `target` and `labels_B`.
        temperature: T > 0, of the others.
        others_weight: of the other classes, the authors' γ.

    Raises:
        MismatchError: shapes differ, or the target does not say what each class has.
    """
    teacher, student = _both(logits_BC, target, labels_B, 1.0, "nkd_loss")
    label_B = weighted(teacher.label_B, -student.label_B)
    if temperature != 1.0:
        teacher, student = _both(logits_BC, target, labels_B, temperature, "nkd_loss")
    others_B = _where_known(weighted(teacher.among_BC, -student.among_BC).sum(dim=-1), teacher)
    return (label_B + others_weight * temperature**2 * others_B).mean()


def _both(logits_BC: Tensor, target: Target, labels_B: Tensor, temperature: float, loss: str) -> tuple[_Split, _Split]:
    log_p_BC = all_log_probs(target, temperature, loss)
    require_shape(logits_BC, tuple(log_p_BC.shape))
    if labels_B.shape != logits_BC.shape[:-1]:
        rule = f"must be {list(logits_BC.shape[:-1])}, one class number for each row of the logits"
        raise MismatchError("labels", rule, tuple(labels_B.shape), "Pass plain class numbers, without mixing.")
    log_q_BC = torch.log_softmax(wide(logits_BC) / temperature, dim=-1)
    return _split(log_p_BC, labels_B), _split(log_q_BC, labels_B)


def _split(log_p_BC: Tensor, labels_B: Tensor) -> _Split:
    log_p_BC = log_p_BC.clamp(min=_NEVER)
    label_B1 = labels_B[..., None]
    # Below all that the clamp leaves: also among others of no mass the label's class has none.
    others_BC = log_p_BC.scatter(-1, label_B1, 2 * _NEVER)
    label_B = log_p_BC.gather(-1, label_B1)[..., 0]
    return _Split(label_B, others_BC.logsumexp(-1), torch.log_softmax(others_BC, dim=-1))


def _where_known(others_B: Tensor, teacher: _Split) -> Tensor:
    # Of others without mass the teacher does not say how they compare; a softmax would call them even.
    return torch.where(teacher.others_B <= _NEVER / 2, 0.0, others_B)
