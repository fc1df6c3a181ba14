"""Step 9, losses: pure functions of student logits and targets; each a scalar, the mean over the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from teacher_cache.encodings import SparseTarget, Target
from teacher_cache.errors import MismatchError, RequestError

CHUNK = 2**16
"""Classes that the sparse loss works on at once: its temporaries are [B, CHUNK], however many classes there are."""


def soft_target_loss(logits_BC: Tensor, target: Target, temperature: float) -> Tensor:
    """T² · mean over the batch of KL(teacher ‖ student), both softened by T.

    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, section 2. The gradient in the
    student's logits is T (q − p) / B. The target is a constant: it gets no gradient from the sparse form.

    Args:
        logits_BC: student's raw logits [B, C], of any floating type and layout.
        target: dense or sparse; a sparse one is never spread out to [B, C], and of the student only the logits
            themselves are kept for the backward pass, which can be differentiated once.
        temperature: T > 0.

    Returns:
        A scalar, float32; float64 where the logits are and the target is sparse.

    Raises:
        MismatchError: a sparse target has another number of rows or classes than the logits.
        RequestError: in the backward pass of a sparse target, with `create_graph=True`.
    """
    if isinstance(target, SparseTarget):
        kl_B = _sparse_kl(logits_BC, target, temperature)
    else:
        log_q_BC = torch.log_softmax(logits_BC.float() / temperature, dim=1)
        log_p_BC = target.log_probs(temperature)
        kl_B = (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(dim=1)
    return temperature**2 * kl_B.mean()


def _sparse_kl(logits_BC: Tensor, target: SparseTarget, temperature: float) -> Tensor:
    """KL [B] with the classes left out in closed form: they share one probability."""
    # Neither gather nor the sum over the classes left out would notice.
    if tuple(logits_BC.shape) != (len(target), target.classes):
        shape, rule = tuple(logits_BC.shape), f"must be [{len(target)}, {target.classes}] as the cached target is"
        raise MismatchError("student logits", rule, shape, "Give the student the teacher's number of classes.")
    kept_BK, each_B = target.log_probs_sparse(temperature)
    kl_B: Tensor = _SparseKL.apply(logits_BC, target.indices_BK.long(), kept_BK, each_B, temperature)
    return kl_B


class _SparseKL(torch.autograd.Function):
    """KL [B] of a sparse teacher and a student's logits, with its gradient in closed form.

    With z the logits, log q = z / T − log Σ exp(z / T), and e the probability of each class left out:

        KL = Σ_kept p (log p − log q) + e · Σ_rest (log e − log q)
        ∂KL / ∂z = (q − p) / T

    Between the passes it keeps the logits, [B, K] and [B] and no softmax. All arithmetic is at least float32 and none
    of it is among the operations that autocast lowers, so both passes are the same within autocast and outside.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BC: Tensor, indices_BK: Tensor, kept_BK: Tensor, each_B: Tensor, temperature: float
    ) -> Tensor:
        """KL [B]; `kept_BK` and `each_B` are the teacher's log-probabilities at T."""
        maximum_B, log_power_B, scaled_B = _row_sums(logits_BC, temperature)
        scaled_BK = _scaled(logits_BC.gather(1, indices_BK), maximum_B, temperature)
        ctx.save_for_backward(logits_BC, indices_BK, kept_BK, each_B, maximum_B, log_power_B)
        ctx.temperature = temperature
        kl_B = _weighted(kept_BK, kept_BK - scaled_BK + log_power_B[:, None]).sum(dim=1)
        rest = logits_BC.shape[1] - kept_BK.shape[1]
        if rest == 0:
            return kl_B
        scaled_rest_B = scaled_B - scaled_BK.sum(dim=1)
        return kl_B + _weighted(each_B, rest * (each_B + log_power_B) - scaled_rest_B)

    @staticmethod
    def backward(ctx: Any, slope_B: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(q − p) / T times the slope, in the type of the logits."""
        # `once_differentiable` looks at the slope alone and would drop the logits' second derivative in silence.
        if torch.is_grad_enabled():
            rule, hint = "has no second derivative for a sparse target", "Pass target.dense() to the loss."
            raise RequestError("soft_target_loss", rule, "create_graph=True", hint)
        logits_BC, indices_BK, kept_BK, each_B, maximum_B, log_power_B = ctx.saved_tensors
        slope_B1, each_B1 = slope_B[:, None] / ctx.temperature, each_B.exp()[:, None]
        gradient_BC = torch.empty_like(logits_BC)
        for part in _chunks(logits_BC):
            log_q_BC = _scaled(logits_BC[:, part], maximum_B, ctx.temperature).sub_(log_power_B[:, None])
            gradient_BC[:, part] = log_q_BC.exp_().sub_(each_B1).mul_(slope_B1)
        # Written over, not corrected by the difference: in a small type the correction would be rounded twice.
        log_q_BK = _scaled(logits_BC.gather(1, indices_BK), maximum_B, ctx.temperature).sub_(log_power_B[:, None])
        corrected_BK = log_q_BK.exp_().sub_(kept_BK.exp()).mul_(slope_B1)
        return gradient_BC.scatter_(1, indices_BK, corrected_BK.to(gradient_BC.dtype)), None, None, None, None


def _row_sums(logits_BC: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest logit m, log Σ exp((z − m) / T) and Σ (z − m) / T; [B] each, at least float32."""
    maximum_B = logits_BC.amax(dim=1).to(torch.promote_types(logits_BC.dtype, torch.float32))
    power_B, scaled_B = torch.zeros_like(maximum_B), torch.zeros_like(maximum_B)
    for part in _chunks(logits_BC):
        scaled_BC = _scaled(logits_BC[:, part], maximum_B, temperature)
        scaled_B += scaled_BC.sum(dim=1)
        power_B += scaled_BC.exp_().sum(dim=1)
    return maximum_B, power_B.log(), scaled_B


def _chunks(logits_BC: Tensor) -> Iterator[slice]:
    """Slices of at most CHUNK classes."""
    return (slice(start, start + CHUNK) for start in range(0, logits_BC.shape[1], CHUNK))


def _scaled(logits_BC: Tensor, maximum_B: Tensor, temperature: float) -> Tensor:
    """(z − m) / T in the type of m, always a new tensor."""
    # The difference comes first: of logits of 10⁴ it is exact, while their quotients have lost three digits.
    return (logits_BC - maximum_B[:, None]).div_(temperature)


def _weighted(log_p: Tensor, value: Tensor) -> Tensor:
    """p · value; 0 where p is 0, whatever the value: a masked class has no mass and an infinite logarithm."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * value)
