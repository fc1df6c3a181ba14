"""Step 9, losses: pure functions of student logits and targets; each a scalar, the mean over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_cache.encodings import SparseTarget, Target


def soft_target_loss(logits_BC: Tensor, target: Target, temperature: float) -> Tensor:
    """T² · mean over the batch of KL(teacher ‖ student), both softened by T.

    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, section 2. The gradient in the
    student's logits is T (q − p) / B.

    Args:
        logits_BC: student's raw logits [B, C].
        target: dense or sparse; a sparse one is never spread out to [B, C].
        temperature: T > 0.

    Returns:
        A scalar, float32.
    """
    log_q_BC = torch.log_softmax(logits_BC.float() / temperature, dim=1)
    if isinstance(target, SparseTarget):
        kl_B = _sparse_kl(log_q_BC, target, temperature)
    else:
        log_p_BC = target.log_probs(temperature)
        kl_B = (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(dim=1)
    return temperature**2 * kl_B.mean()


def _sparse_kl(log_q_BC: Tensor, target: SparseTarget, temperature: float) -> Tensor:
    """KL [B] with the classes left out in closed form: they share one probability."""
    kept_BK, each_B = target.log_probs_sparse(temperature)
    log_q_BK = log_q_BC.gather(1, target.indices_BK.long())
    kl_B = (kept_BK.exp() * (kept_BK - log_q_BK)).sum(dim=1)
    rest = target.classes - kept_BK.shape[1]
    if rest == 0:
        return kl_B
    log_q_rest_B = log_q_BC.sum(dim=1) - log_q_BK.sum(dim=1)
    tail_B = each_B.exp() * (rest * each_B - log_q_rest_B)
    # Masked classes have no mass and an infinite logarithm: 0 · −∞ is 0 here.
    return kl_B + torch.where(each_B.isfinite(), tail_B, 0.0)
