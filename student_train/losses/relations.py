"""Relations between the rows of a batch: distances, angles, similarities; widths of features may differ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from student_train.losses.rows import inner_products, unit, wide
from student_train.losses.teacher import dense_values, require_rows
from teacher_cache.encodings import Target


def distance_loss(feature_BD: Tensor, target: Target) -> Tensor:
    """RKD-D: Huber distance of pairwise distances, those of each side divided by their mean.

    Park, Kim, Lu, Cho, "Relational knowledge distillation", CVPR 2019; as in the authors' code the
    mean of distances is over those above 0, and the loss is the mean over all B² pairs, equal ones included. Its
    usual weight is 25. A batch of one, and rows that are all equal, have no distances: they count as 0, without
    gradient. The distances come from differences: inner products would lose those of near rows.

    Args:
        feature_BD: student's features [B, ...], flattened for each row; of any floating type.
        target: the cached features, of any width.

    Raises:
        MismatchError: the numbers of rows differ.
    """
    student, teacher = _both(feature_BD, target)
    losses_P = functional.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="none")
    # Each pair stands for two of the B², and those of a row with itself are 0.
    return 2 * losses_P.sum() / len(student) ** 2


def angle_loss(feature_BD: Tensor, target: Target) -> Tensor:
    """RKD-A: Huber distance of the cosines of the angles that any three rows make.

    Park et al., 2019; the mean over all B³ triples, those with equal rows included, whose cosine is
    0, as in the authors' code. Its usual weight is 50. It takes memory for B² · D and B³ numbers.

    Args:
        feature_BD: student's features [B, ...], flattened for each row; of any floating type.
        target: the cached features, of any width.

    Raises:
        MismatchError: the numbers of rows differ.
    """
    student, teacher = _both(feature_BD, target)
    return functional.smooth_l1_loss(_cosines(student), _cosines(teacher))


def similarity_loss(feature_BD: Tensor, target: Target) -> Tensor:
    """Similarity preserving: squared difference of the two matrices F·Fᵀ with rows of length 1, divided by B².

    Tung, Mori, "Similarity-preserving knowledge distillation", ICCV 2019. Its usual weight is 3000,
    the paper's γ. A row of zeros is similar to none and gets no gradient from its own row of the matrix.

    Args:
        feature_BD: student's features or maps [B, ...], flattened for each row; of any floating type.
        target: the cached features, of any width.

    Raises:
        MismatchError: the numbers of rows differ.
    """
    student, teacher = _both(feature_BD, target)
    difference_BB = unit(inner_products(student, student)) - unit(inner_products(teacher, teacher))
    return difference_BB.square().mean()


def _both(feature_BD: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    teacher = dense_values(target, "student features")
    require_rows(feature_BD, len(teacher), "student features")
    return wide(feature_BD).flatten(1), teacher.flatten(1)


def _relative_distances(feature_BD: Tensor) -> Tensor:
    """Distances of the pairs i < j, divided by the mean of those above 0."""
    distance_P = torch.pdist(feature_BD)
    # As a sum of zeros and not a selection, which would wait for the device.
    mean = distance_P.sum() / (distance_P > 0).sum().clamp(min=1)
    return distance_P / torch.where(mean == 0, 1.0, mean)


def _cosines(feature_BD: Tensor) -> Tensor:
    """Cosines [B, B, B] at row j of the lines to i and to k; 0 where two of them are equal."""
    lines_BBD = unit(feature_BD[None] - feature_BD[:, None])
    return inner_products(lines_BBD, lines_BBD)
