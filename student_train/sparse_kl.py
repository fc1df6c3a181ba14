"""KL of sparse teachers and a student's logits, in closed form and in chunks of classes: no [B, C] teacher tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teacher_cache.encodings import SparseTarget
from teacher_cache.encodings.tails import Even, Ghost, Rest, chunks, without
from teacher_cache.errors import RequestError


def sparse_kl(logits_BC: Tensor, target: SparseTarget, temperature: float) -> Tensor:
    """KL(teacher ‖ student) [B] at a temperature.

    Args:
        logits_BC: student's raw logits, as many rows and classes as the target has.
        target: its tail decides what is said of the classes left out.
        temperature: T > 0.
    """
    kept_BK, rest = target.log_probs_sparse(temperature)
    indices_BK = target.indices_BK.long()
    kl_B: Tensor
    if isinstance(rest, Even):
        kl_B = _EvenKL.apply(logits_BC, indices_BK, kept_BK, rest.each_B, temperature)
    else:
        kl_B = _SpreadKL.apply(logits_BC, indices_BK, kept_BK, rest, temperature)
    return kl_B


class _EvenKL(torch.autograd.Function):
    """KL [B] where the classes left out share one probability e, with its gradient in closed form.

    With z the logits, log q = z / T − log Σ exp(z / T):

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
        kl_B = weighted(kept_BK, kept_BK - scaled_BK + log_power_B[:, None]).sum(dim=1)
        rest = logits_BC.shape[1] - kept_BK.shape[1]
        if rest == 0:
            return kl_B
        scaled_rest_B = scaled_B - scaled_BK.sum(dim=1)
        return kl_B + weighted(each_B, rest * (each_B + log_power_B) - scaled_rest_B)

    @staticmethod
    def backward(ctx: Any, slope_B: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(q − p) / T times the slope, in the type of the logits."""
        _require_once()
        logits_BC, indices_BK, kept_BK, each_B, maximum_B, log_power_B = ctx.saved_tensors
        slope_B1, each_B1 = slope_B[:, None] / ctx.temperature, each_B.exp()[:, None]
        gradient_BC = torch.empty_like(logits_BC)
        for part in chunks(logits_BC.shape[1]):
            log_q_BC = _scaled(logits_BC[:, part], maximum_B, ctx.temperature).sub_(log_power_B[:, None])
            gradient_BC[:, part] = log_q_BC.exp_().sub_(each_B1).mul_(slope_B1)
        kept = (kept_BK, maximum_B, log_power_B, slope_B1)
        return _with_kept(gradient_BC, logits_BC, indices_BK, kept, ctx.temperature), None, None, None, None


class _SpreadKL(torch.autograd.Function):
    """KL [B] where the classes left out differ (`prior`), or count as one (`ghost`), in closed form.

    With e the probabilities of a prior's classes, and with G the ghost's mass and Q that of the student there:

        KL = Σ_kept p (log p − log q) + Σ_rest e (log e − log q),   ∂KL / ∂z = (q − e) / T over the rest
        KL = Σ_kept p (log p − log q) + G (log G − log Q),          ∂KL / ∂z = (q − q G / Q) / T over the rest

    It too is at least float32 throughout, keeps no softmax, and works in chunks.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BC: Tensor, indices_BK: Tensor, kept_BK: Tensor, rest: Rest, temperature: float
    ) -> Tensor:
        """KL [B]; `kept_BK` and `rest` are the teacher's log-probabilities at T."""
        maximum_B, log_power_B, _ = _row_sums(logits_BC, temperature)
        scaled_BK = _scaled(logits_BC.gather(1, indices_BK), maximum_B, temperature)
        kl_B = weighted(kept_BK, kept_BK - scaled_BK + log_power_B[:, None]).sum(dim=1)
        masses = []
        for part in chunks(logits_BC.shape[1]):
            log_q_BC = _scaled(logits_BC[:, part], maximum_B, temperature).sub_(log_power_B[:, None])
            if isinstance(rest, Ghost):
                masses.append(without(log_q_BC, indices_BK, part).logsumexp(1))
            else:
                log_e_BC = without(rest.spread(part).to(log_q_BC.dtype), indices_BK, part)
                kl_B = kl_B + weighted(log_e_BC, log_e_BC - log_q_BC).sum(dim=1)
        ctx.save_for_backward(logits_BC, indices_BK, kept_BK, maximum_B, log_power_B)
        ctx.rest, ctx.temperature, ctx.log_mass_B = rest, temperature, None
        if isinstance(rest, Ghost):
            log_mass_B = torch.stack(masses).logsumexp(0)
            kl_B = kl_B + weighted(rest.mass_B, rest.mass_B - log_mass_B)
            # A student that gives nothing to the rest: −∞ + ∞ would be NaN in the backward pass.
            ctx.log_mass_B = torch.where(log_mass_B.isneginf(), 0.0, log_mass_B)
        return kl_B

    @staticmethod
    def backward(ctx: Any, slope_B: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(q − p) / T times the slope, in the type of the logits."""
        _require_once()
        logits_BC, indices_BK, kept_BK, maximum_B, log_power_B = ctx.saved_tensors
        slope_B1 = slope_B[:, None] / ctx.temperature
        gradient_BC = torch.empty_like(logits_BC)
        for part in chunks(logits_BC.shape[1]):
            log_q_BC = _scaled(logits_BC[:, part], maximum_B, ctx.temperature).sub_(log_power_B[:, None])
            if ctx.log_mass_B is None:
                wanted_BC = ctx.rest.spread(part).exp()
            else:
                # The difference comes first: of logarithms of −10⁴ it is exact, while their sums with G's are not.
                wanted_BC = (log_q_BC - ctx.log_mass_B[:, None] + ctx.rest.mass_B[:, None]).exp()
            gradient_BC[:, part] = log_q_BC.exp_().sub_(wanted_BC).mul_(slope_B1)
        kept = (kept_BK, maximum_B, log_power_B, slope_B1)
        return _with_kept(gradient_BC, logits_BC, indices_BK, kept, ctx.temperature), None, None, None, None


def _require_once() -> None:
    # `once_differentiable` looks at the slope alone and would drop the logits' second derivative in silence.
    if torch.is_grad_enabled():
        rule, hint = "has no second derivative for a sparse target", "Pass target.dense() to the loss."
        raise RequestError("soft_target_loss", rule, "create_graph=True", hint)


def _with_kept(
    gradient_BC: Tensor,
    logits_BC: Tensor,
    indices_BK: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
    temperature: float,
) -> Tensor:
    """The gradient with that of the kept classes written over: corrected, a small type would round it twice."""
    kept_BK, maximum_B, log_power_B, slope_B1 = kept
    log_q_BK = _scaled(logits_BC.gather(1, indices_BK), maximum_B, temperature).sub_(log_power_B[:, None])
    corrected_BK = log_q_BK.exp_().sub_(kept_BK.exp()).mul_(slope_B1)
    return gradient_BC.scatter_(1, indices_BK, corrected_BK.to(gradient_BC.dtype))


def _row_sums(logits_BC: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest logit m, log Σ exp((z − m) / T) and Σ (z − m) / T; [B] each, at least float32."""
    maximum_B = logits_BC.amax(dim=1).to(torch.promote_types(logits_BC.dtype, torch.float32))
    power_B, scaled_B = torch.zeros_like(maximum_B), torch.zeros_like(maximum_B)
    for part in chunks(logits_BC.shape[1]):
        scaled_BC = _scaled(logits_BC[:, part], maximum_B, temperature)
        scaled_B += scaled_BC.sum(dim=1)
        power_B += scaled_BC.exp_().sum(dim=1)
    return maximum_B, power_B.log(), scaled_B


def _scaled(logits_BC: Tensor, maximum_B: Tensor, temperature: float) -> Tensor:
    """(z − m) / T in the type of m, always a new tensor."""
    # The difference comes first: of logits of 10⁴ it is exact, while their quotients have lost three digits.
    return (logits_BC - maximum_B[:, None]).div_(temperature)


def weighted(log_p: Tensor, value: Tensor) -> Tensor:
    """p · value; 0 where p is 0, whatever the value: a masked class has no mass and an infinite logarithm."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * value)
