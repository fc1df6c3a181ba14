"""Correlations in place of a divergence: DIST."""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.rows import centred, wide
from student_train.losses.teacher import dense_values, require_shape
from teacher_cache.encodings import Target

_LEAST_PRODUCT = 1e-8
"""Added to the product of two rows' lengths, as in the authors' code: classes that hardly move count less."""


def correlations(student_RN: Tensor, teacher_RN: Tensor) -> Tensor:
    """Pearson's ρ of each row of the one with the same row of the other, [R], −1..1.

    Invariant under x → a·x + b of a row with a > 0, as far as lengths are well above 1e-8. A row that is constant up
    to rounding correlates with nothing: 0, without gradient, where the formula's would be up to 10⁸.
    """
    (student, flat_student), (teacher, flat_teacher) = centred(student_RN), centred(teacher_RN)
    student = torch.where(flat_student | flat_teacher, 0.0, student)
    product_R = (student * teacher).sum(dim=-1)
    length_R: Tensor = torch.linalg.vector_norm(student, dim=-1) * torch.linalg.vector_norm(teacher, dim=-1)
    return product_R / (length_R + _LEAST_PRODUCT)


def dist_loss(
    logits_BC: Tensor,
    target: Target,
    temperature: float = 1.0,
    rows_weight: float = 1.0,
    classes_weight: float = 1.0,
) -> Tensor:
    """T² · [rows_weight · (1 − mean ρ over the rows) + classes_weight · (1 − mean ρ over the classes)].

    Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022; β = 1 is
    `rows_weight` (what they call the inter-class relation), γ = 1 `classes_weight` (intra-class) and T = 1, as in the
    authors' code, which adds 1e-8 below the fraction, too. ρ is Pearson's, of softmax(z / T): along the classes of a
    row, and along the batch of a class. A batch of one has no relation along it, and that part is constant.

    Args:
        logits_BC: student's raw logits [B, C], or [B, T, C] of sequences, whose positions are rows.
        target: dense: each class counts the same here, so one that is left out counts as much as a kept one.
        temperature: T > 0.
        rows_weight: of the relation within rows, the authors' β.
        classes_weight: of the relation within classes, the authors' γ.

    Raises:
        MismatchError: shapes differ, or the target is sparse.
    """
    teacher_BC = dense_values(target, "dist_loss")
    require_shape(logits_BC, tuple(teacher_BC.shape))
    p_BC = torch.softmax(teacher_BC / temperature, dim=-1).flatten(0, -2)
    q_BC = torch.softmax(wide(logits_BC) / temperature, dim=-1).flatten(0, -2)
    rows = 1 - correlations(q_BC, p_BC).mean()
    classes = 1 - correlations(q_BC.mT, p_BC.mT).mean()
    return temperature**2 * (rows_weight * rows + classes_weight * classes)
