"""Every loss by name, on inputs of its own shape, and the NumPy that their references are stated in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from student_train import losses
from teacher_cache.encodings import DenseTarget, Target

Array = NDArray[np.float64]


def softmax(logits: Array, axis: int = -1) -> Array:
    powers = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def drawn(seed: int, *shape: int, spread: float = 1.0) -> Array:
    return np.random.Generator(np.random.Philox(seed)).normal(0, spread, shape)


def pair(seed: int, *shape: int, spread: float = 1.0) -> tuple[Array, Array]:
    """A student's numbers and a teacher's."""
    both = drawn(seed, 2, *shape, spread=spread)
    return both[0], both[1]


def dense(values: Array) -> DenseTarget:
    return DenseTarget(torch.tensor(values))


def labels_for(rows: int, classes: int) -> Tensor:
    return torch.arange(rows) * 7 % classes


def _labels(logits: Tensor) -> Tensor:
    return labels_for(len(logits), logits.shape[1])


def _queue(width: int) -> losses.FeatureQueue:
    queue = losses.FeatureQueue(4, width)
    queue.push(dense(drawn(99, 4, width)))
    return queue


@dataclass(frozen=True)
class Loss:
    """A loss of a student's tensor and a target."""

    shape: tuple[int, ...]
    """Of a row."""
    value: Callable[[Tensor, Target], Tensor]
    least: float | None = 0.0
    """Its value where student and teacher are equal; None where it is some entropy of the teacher's."""
    widths_differ: bool = False
    """Whether the student's rows may have another shape."""


LOSSES: dict[str, Loss] = {
    "soft_target": Loss((6,), lambda s, t: losses.soft_target_loss(s, t, 3.0)),
    "soft_target at a tensor": Loss((6,), lambda s, t: losses.soft_target_loss(s, t, torch.tensor(3.0))),
    "standardised": Loss(
        (6,), lambda s, t: losses.soft_target_loss(losses.standardised(s), losses.standardised_target(t), 2.0)
    ),
    "logit_mse": Loss((6,), losses.logit_mse),
    "dkd": Loss((6,), lambda s, t: losses.dkd_loss(s, t, _labels(s))),
    "nkd": Loss((6,), lambda s, t: losses.nkd_loss(s, t, _labels(s), 2.0), None),
    "dist": Loss((6,), lambda s, t: losses.dist_loss(s, t, 2.0)),
    "feature_mse": Loss((3, 2, 2), losses.feature_mse),
    "feature_mae": Loss((6,), losses.feature_mae),
    "hint": Loss((3, 2, 2), lambda s, t: losses.hint_loss(s, t, lambda projected: projected)),
    "attention_transfer": Loss((2, 3), losses.attention_transfer_loss),
    "normalised_activation": Loss((2, 3), losses.normalised_activation_loss),
    "flow": Loss((2, 3), losses.flow_loss),
    "saliency": Loss((3, 2, 2), losses.saliency_loss),
    "distance": Loss((6,), losses.distance_loss, widths_differ=True),
    "angle": Loss((6,), losses.angle_loss, widths_differ=True),
    "similarity": Loss((6,), losses.similarity_loss, widths_differ=True),
    "seed": Loss((6,), lambda s, t: losses.seed_loss(s, t, _queue(6), 0.2, 0.1), None),
}


def slope(value: Tensor, at: Tensor) -> Tensor:
    """The gradient of a loss."""
    (gradient,) = torch.autograd.grad(value, at)
    return gradient


def student_of(values: Array | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.as_tensor(values).detach().clone().to(dtype).requires_grad_()
