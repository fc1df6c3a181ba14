"""What is inside: features, hints, attention maps, flow between layers, gradients at the input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from student_train.losses.rows import inner_products, unit, wide
from student_train.losses.teacher import dense_values, require_shape
from teacher_cache.encodings import Target
from teacher_cache.errors import MismatchError


def feature_mse(feature_BD: Tensor, target: Target) -> Tensor:
    """Mean of the squared difference over batch and all numbers of a row.

    Args:
        feature_BD: student's features [B, ...] in the teacher's shape, projected if need be; of any floating type.
        target: the cached feature.

    Raises:
        MismatchError: the shapes differ.
    """
    return (wide(feature_BD) - _teacher(feature_BD, target, "student features")).square().mean()


def feature_mae(feature_BD: Tensor, target: Target) -> Tensor:
    """Mean of the absolute difference over batch and all numbers of a row; arguments as in `feature_mse`."""
    return (wide(feature_BD) - _teacher(feature_BD, target, "student features")).abs().mean()


def hint_loss(map_BCHW: Tensor, target: Target, projection: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean squared difference of projection(f_s) and the teacher's map.

    Romero et al., "FitNets: hints for thin deep nets", ICLR 2015, equation 3, there half the sum. As the mean over all
    numbers it is what the reference code of Tian et al., "Contrastive representation distillation", 2020, weighs by
    100.

    Args:
        map_BCHW: student's map.
        target: the cached map `feature:<node>`.
        projection: r of the paper, a 1×1 or 3×3 convolution; its parameters are trained along with the student.

    Raises:
        MismatchError: the projection's answer has not the teacher's shape.
    """
    projected = projection(map_BCHW)
    return (wide(projected) - _teacher(projected, target, "projected student map")).square().mean()


def attention_map(map_BCHW: Tensor) -> Tensor:
    """The mean over channels of the squares, [B, H, W], or [B, N] of tokens [B, N, D]: what `attention:<node>` caches.

    Zagoruyko, Komodakis, "Paying more attention to attention", ICLR 2017, section 3.1, the sum of squares, here
    divided by the number of channels, which normalising cancels.
    """
    return wide(map_BCHW).square().mean(dim=1 if map_BCHW.ndim == 4 else -1)


def attention_transfer_loss(attention_BHW: Tensor, target: Target) -> Tensor:
    """Mean over the batch of ‖Q_s / ‖Q_s‖ − Q_t / ‖Q_t‖‖², Q the flattened maps.

    Zagoruyko, Komodakis, 2017, in the squared form of their code. That takes the mean over the H·W places of a map,
    too, and weighs it by β = 1000, so its weight is 1000 / (H·W) here: 15.625 for maps of 8 × 8. A map of zeros, the
    student's or the teacher's, stands for no attention and stays zeros.

    Args:
        attention_BHW: student's `attention_map`, not normalised; of any floating type.
        target: the cached `attention:<node>`.

    Raises:
        MismatchError: the shapes differ.
    """
    return _unit_difference(attention_BHW, target, "student attention").square().sum(dim=-1).mean()


def normalised_activation_loss(attention_BHW: Tensor, target: Target) -> Tensor:
    """Mean over the batch of ‖Q_s / ‖Q_s‖ − Q_t / ‖Q_t‖‖, not squared: the paper's form, for one layer.

    Zagoruyko, Komodakis, 2017, equation 2 with p = 2, without the β / 2. The sum over layers is a sum of terms.
    Where both are equal the gradient is 0. Arguments as in `attention_transfer_loss`.

    Raises:
        MismatchError: the shapes differ.
    """
    difference = _unit_difference(attention_BHW, target, "student attention")
    length_B: Tensor = torch.linalg.vector_norm(difference, dim=-1)
    return length_B.mean()


def flow_matrix(first_BMHW: Tensor, second_BNHW: Tensor) -> Tensor:
    """Inner products of two layers' channels over space, divided by H·W: [B, M, N].

    Yim et al., "A gift from knowledge distillation", CVPR 2017, equation 1.

    Raises:
        MismatchError: the maps have not the same height and width.
    """
    if first_BMHW.shape[2:] != second_BNHW.shape[2:]:
        rule = f"must be {list(first_BMHW.shape[2:])} in height and width as the first map is"
        raise MismatchError("second map", rule, tuple(second_BNHW.shape[2:]), "Pool the larger map to the smaller.")
    first, second = wide(first_BMHW).flatten(2), wide(second_BNHW).flatten(2)
    return inner_products(first, second) / first.shape[2]


def flow_loss(flow_BMN: Tensor, target: Target) -> Tensor:
    """Mean over the batch of the squared difference of two flow matrices, summed over their M·N numbers.

    Yim et al., 2017, equation 2, for one pair of layers and λ = 1. The reference code of Tian et al., 2020, takes the
    mean over the matrix: its weight divided by M·N is the weight here.

    Args:
        flow_BMN: student's `flow_matrix`, of as many channels as the teacher's.
        target: the cached `flow:<a>,<b>`.

    Raises:
        MismatchError: the shapes differ.
    """
    difference = wide(flow_BMN) - _teacher(flow_BMN, target, "student flow")
    return difference.square().flatten(1).sum(dim=1).mean()


def saliency_loss(gradient_BCHW: Tensor, target: Target) -> Tensor:
    """Mean over the batch of ‖g_s / ‖g_s‖ − g_t / ‖g_t‖‖², g the flattened gradient of z_y at the input.

    Srinivas, Fleuret, "Knowledge transfer with Jacobian matching", ICML 2018. A gradient of zeros points
    nowhere and stays zeros.

    Args:
        gradient_BCHW: student's ∂z_y/∂x, made with `create_graph=True` so that the loss has a gradient.
        target: the cached `saliency`.

    Raises:
        MismatchError: the shapes differ.
    """
    return _unit_difference(gradient_BCHW, target, "student saliency").square().sum(dim=-1).mean()


def _teacher(student: Tensor, target: Target, name: str) -> Tensor:
    values = dense_values(target, name)
    require_shape(student, tuple(values.shape), name)
    return values


def _unit_difference(student: Tensor, target: Target, name: str) -> Tensor:
    values = _teacher(student, target, name)
    return unit(wide(student).flatten(1)) - unit(values.flatten(1))
