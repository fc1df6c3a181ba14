"""Soft targets, and what is done to logits and temperatures before: matching, standardising, learning T."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from student_train.losses.rows import centred, wide
from student_train.losses.teacher import dense_values, require_shape
from student_train.sparse_kl import sparse_kl, weighted
from teacher_cache.encodings import DenseTarget, SparseTarget, Target
from teacher_cache.errors import MismatchError, SpecError


def soft_target_loss(logits_BC: Tensor, target: Target, temperature: float | Tensor) -> Tensor:
    """T² · mean over the batch of KL(teacher ‖ student), both softened by T.

    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, section 2. The gradient in the
    student's logits is T (q − p) / B. The target is a constant: it gets no gradient. Of sequences the mean is over
    all positions.

    Args:
        logits_BC: student's raw logits [B, C], or [B, T, C] of sequences; of any floating type and layout.
        target: dense or sparse; a sparse one is never spread out to [B, C], and of the student only the logits
            themselves are kept for the backward pass, which can be differentiated once. Where its tail is `ghost`,
            all classes left out are compared as one.
        temperature: T > 0; a scalar tensor gets its gradient, through both distributions and T².

    Returns:
        A scalar, float32; float64 where the logits are.

    Raises:
        MismatchError: the target has another number of rows, positions or classes than the logits; or it is sparse
            and the temperature a tensor.
        RequestError: in the backward pass of a sparse target, with `create_graph=True`.
    """
    if isinstance(target, SparseTarget):
        if isinstance(temperature, Tensor):
            hint = "Read a field with a dense encoding, such as dense_u8, or fix the temperature."
            raise MismatchError("temperature", "must be a plain number for a sparse target", "a tensor", hint)
        require_shape(logits_BC, (*target.values_BK.shape[:-1], target.classes))
        return temperature**2 * sparse_kl(logits_BC.flatten(0, -2), target.flat(), temperature).mean()
    if isinstance(temperature, Tensor):
        log_p_BC = torch.log_softmax(dense_values(target, "soft_target_loss") / wide(temperature), dim=-1)
    else:
        log_p_BC = DenseTarget(target.values.detach(), target.scale).log_probs(temperature)
    return soft_label_loss(logits_BC, log_p_BC, temperature)


def soft_label_loss(logits_BC: Tensor, log_p_BC: Tensor, temperature: float | Tensor) -> Tensor:
    """`soft_target_loss` with log-probabilities that are softened already: of an ensemble, or of a vote.

    Args:
        logits_BC: student's raw logits, of any floating type.
        log_p_BC: what to follow, normalised, at the same temperature; −∞ where there is no mass.
        temperature: T > 0 of both.

    Raises:
        MismatchError: the shapes differ.
    """
    require_shape(logits_BC, tuple(log_p_BC.shape))
    log_q_BC = torch.log_softmax(wide(logits_BC) / temperature, dim=-1)
    loss: Tensor = temperature**2 * weighted(log_p_BC, log_p_BC - log_q_BC).sum(dim=-1).mean()
    return loss


def logit_mse(logits_BC: Tensor, target: Target) -> Tensor:
    """Mean over batch and classes of the squared difference of logits, each less its row's mean.

    Ba, Caruana, "Do deep nets really need to be deep?", 2014, section 2.2, there without the means and halved. A
    row's mean is cancelled by the softmax, so no teacher means anything by it. Half of this is the limit of
    `soft_target_loss` for T → ∞ (Hinton et al., section 2.1).

    Raises:
        MismatchError: the shapes differ, or the target is sparse.
    """
    teacher_BC = dense_values(target, "logit_mse")
    require_shape(logits_BC, tuple(teacher_BC.shape))
    return (centred(wide(logits_BC))[0] - centred(teacher_BC)[0]).square().mean()


def standardised(logits_BC: Tensor) -> Tensor:
    """(z − mean) / (std + 1e-7) of each row; a constant row is zeros and gets no gradient.

    Sun, Ren, Li, Wang, Cao, "Logit standardization in knowledge distillation", CVPR 2024, algorithm 1. As the
    authors' code does, and not their equation, std divides by C − 1. Both sides are standardised before soft
    targets: `soft_target_loss(standardised(logits_BC), standardised_target(target), T)`.

    Args:
        logits_BC: of any floating type.

    Returns:
        float32 at least, without unit: T is then in standard deviations.
    """
    centred_BC, constant_B1 = centred(wide(logits_BC))
    centred_BC = torch.where(constant_B1, 0.0, centred_BC)
    root = math.sqrt(max(logits_BC.shape[-1] - 1, 1))
    deviation_B1: Tensor = torch.linalg.vector_norm(centred_BC, dim=-1, keepdim=True) / root
    return centred_BC / (deviation_B1 + 1e-7)


def standardised_target(target: Target) -> DenseTarget:
    """A target of the teacher's standardised logits.

    Raises:
        MismatchError: the target is sparse: its rows have no standard deviation.
    """
    return DenseTarget(standardised(dense_values(target, "standardised")))


def learned_temperature(theta: Tensor) -> Tensor:
    """T = 1 + 20 · sigmoid(θ), in (1, 21).

    Li et al., "Curriculum temperature for knowledge distillation", AAAI 2023; the constants are those of the authors'
    code, where θ starts at 1. θ is trained against the student: θ goes through `reversed_gradient` first.

    Args:
        theta: a scalar, of any floating type.
    """
    temperature: Tensor = 1 + 20 * wide(theta).sigmoid()
    return temperature


def reversed_gradient(value: Tensor, weight: float) -> Tensor:
    """The value itself; in the backward pass −weight times its gradient.

    Ganin, Lempitsky, "Unsupervised domain adaptation by backpropagation", ICML 2015.
    """
    reversed_value: Tensor = _Reversal.apply(value, weight)
    return reversed_value


class _Reversal(torch.autograd.Function):
    """The identity, with its gradient turned round."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:
        """A view: the same object would lose its place in the graph."""
        ctx.weight = weight
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        """−weight · slope."""
        return -ctx.weight * slope, None


def reversal_weight(epoch: float, rise: float = 10) -> float:
    """The weight of a reversed gradient: from 0 up to 1 along half a cosine, then 1.

    (1 − cos(π · min(epoch, rise) / rise)) / 2; Li et al., 2023, with the 10 epochs of the authors' code.

    Args:
        epoch: passes done, fractions included.
        rise: epochs until it is 1.

    Raises:
        SpecError: `rise` is not above 0, or `epoch` below 0.
    """
    if not rise > 0:
        raise SpecError("rise", "must be above 0", rise, "Choose another number of epochs.")
    if not epoch >= 0:
        raise SpecError("epoch", "must be at least 0", epoch, "Count from the first epoch, 0.")
    return (1 - math.cos(math.pi * min(epoch / rise, 1))) / 2
