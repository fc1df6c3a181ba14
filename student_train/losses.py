"""Step 9, losses: pure functions of student logits and targets; each a scalar, the mean over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.sparse_kl import sparse_kl, weighted
from teacher_cache.encodings import SparseTarget, Target
from teacher_cache.errors import MismatchError


def soft_target_loss(logits_BC: Tensor, target: Target, temperature: float) -> Tensor:
    """T² · mean over the batch of KL(teacher ‖ student), both softened by T.

    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, section 2. The gradient in the
    student's logits is T (q − p) / B. The target is a constant: it gets no gradient from the sparse form. Of
    sequences the mean is over all positions.

    Args:
        logits_BC: student's raw logits [B, C], or [B, T, C] of sequences; of any floating type and layout.
        target: dense or sparse; a sparse one is never spread out to [B, C], and of the student only the logits
            themselves are kept for the backward pass, which can be differentiated once. Where its tail is `ghost`,
            all classes left out are compared as one.
        temperature: T > 0.

    Returns:
        A scalar, float32; float64 where the logits are and the target is sparse.

    Raises:
        MismatchError: the target has another number of rows, positions or classes than the logits.
        RequestError: in the backward pass of a sparse target, with `create_graph=True`.
    """
    if isinstance(target, SparseTarget):
        _require_shape(logits_BC, (*target.values_BK.shape[:-1], target.classes))
        return temperature**2 * sparse_kl(logits_BC.flatten(0, -2), target.flat(), temperature).mean()
    log_p_BC = target.log_probs(temperature)
    _require_shape(logits_BC, tuple(log_p_BC.shape))
    log_q_BC = torch.log_softmax(logits_BC.float() / temperature, dim=-1)
    return temperature**2 * weighted(log_p_BC, log_p_BC - log_q_BC).sum(dim=-1).mean()


def _require_shape(logits_BC: Tensor, shape: tuple[int, ...]) -> None:
    # Neither gather, nor the sum over the classes left out, nor broadcasting would notice.
    if tuple(logits_BC.shape) != shape:
        rule = f"must be {list(shape)} as the cached target is"
        hint = "Give the student the teacher's classes, and as many positions."
        raise MismatchError("student logits", rule, tuple(logits_BC.shape), hint)
