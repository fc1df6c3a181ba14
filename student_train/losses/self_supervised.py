"""Teachers without classes: SEED, which compares similarities to rows seen before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from student_train.losses.rows import inner_products, unit, wide
from student_train.losses.teacher import dense_values, require_shape
from student_train.sparse_kl import weighted
from teacher_cache.encodings import Target
from teacher_cache.errors import MismatchError, SpecError


class FeatureQueue:
    """The last rows of the teacher's features, of length 1 each: what SEED compares with. Deterministic.

    It starts empty, where the authors fill it with noise, and holds what was pushed, oldest rows leaving first. It
    belongs to a run's state: without it, a run that goes on compares with other rows than one that was never
    stopped. Not for use by several threads.
    """

    def __init__(self, size: int, width: int, device: torch.device | str = "cpu") -> None:
        """Makes an empty queue.

        Args:
            size: rows that it holds at most; 65,536 in the paper.
            width: D, numbers of a feature.
            device: where its rows are kept before the first push, which takes them to where the features are.

        Raises:
            SpecError: one of both is below 1.
        """
        for name, value in (("queue.size", size), ("queue.width", width)):
            if value < 1:
                raise SpecError(name, "must be at least 1", value, "Choose another number.")
        self._rows_KD = torch.zeros(size, width, device=device)
        self._next = 0
        self._filled = 0

    def __len__(self) -> int:
        """Rows that it holds."""
        return self._filled

    @property
    def features_KD(self) -> Tensor:
        """The rows that it holds, float32, in no particular order; a later push leaves them as they are."""
        return self._rows_KD[: self._filled]

    def push(self, target: Target) -> None:
        """Takes the rows of a target [B, D] in; done after the loss on them, which has them as `self` already.

        Raises:
            MismatchError: their width is another, or the target is sparse.
        """
        rows_BD = unit(dense_values(target, "queue"))
        size, width = self._rows_KD.shape
        if rows_BD.ndim != 2 or rows_BD.shape[1] != width:
            rule = f"must be [B, {width}] as the queue's rows are"
            raise MismatchError("features", rule, tuple(rows_BD.shape), "Pool the features, or make another queue.")
        rows_BD = rows_BD[-size:]
        places_B = (self._next + torch.arange(len(rows_BD), device=rows_BD.device)) % size
        # Out of place: a loss whose backward pass is still to come keeps the rows as they were.
        self._rows_KD = self._rows_KD.to(rows_BD.device).index_copy(0, places_B, rows_BD.to(self._rows_KD.dtype))
        self._next = (self._next + len(rows_BD)) % size
        self._filled = min(self._filled + len(rows_BD), size)

    def state_dict(self) -> dict[str, Any]:
        """Rows and place, for a checkpoint; later pushes leave them as they are."""
        return {"rows": self._rows_KD.cpu(), "next": self._next, "filled": self._filled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, on any device.

        Raises:
            MismatchError: the state is of a queue of another size or width.
        """
        if state["rows"].shape != self._rows_KD.shape:
            rule = f"must be {list(state['rows'].shape)}, rows and width, as in the saved state"
            raise MismatchError("queue", rule, tuple(self._rows_KD.shape), "Make the queue as it was made then.")
        self._rows_KD = state["rows"].to(self._rows_KD)
        self._next, self._filled = int(state["next"]), int(state["filled"])


def seed_loss(
    feature_BD: Tensor,
    target: Target,
    queue: FeatureQueue,
    student_temperature: float = 0.2,
    teacher_temperature: float = 0.01,
) -> Tensor:
    """Mean over the batch of the cross-entropy of the teacher's similarities with the student's.

    Fang et al., "SEED: self-supervised distillation for visual representation", ICLR 2021, with
    their temperatures. Each row is compared with [the teacher's own feature of it, all rows of the queue], by inner
    products of features of length 1; softmax over these at each side's temperature. Without a queue there is nothing
    to compare with, and the loss is 0. It is a cross-entropy: its least value is the teacher's entropy.

    Args:
        feature_BD: student's features [B, D], projected to the teacher's width; of any floating type.
        target: the cached features [B, D].
        queue: of the teacher's features; left as it is: push the target afterwards.
        student_temperature: above 0.
        teacher_temperature: above 0; lower ones compare with fewer neighbours.

    Raises:
        MismatchError: shapes differ, or the target is sparse.
    """
    teacher = dense_values(target, "seed_loss")
    require_shape(feature_BD, tuple(teacher.shape), "student features")
    if teacher.ndim != 2 or teacher.shape[1] != queue.features_KD.shape[1]:
        rule = f"must be [B, {queue.features_KD.shape[1]}] as the queue's rows are"
        raise MismatchError("features", rule, tuple(teacher.shape), "Pool the features, or make another queue.")
    teacher_BD, student_BD = unit(teacher), unit(wide(feature_BD))
    log_p_BK = torch.log_softmax(_similarities(teacher_BD, teacher_BD, queue) / teacher_temperature, dim=1)
    log_q_BK = torch.log_softmax(_similarities(student_BD, teacher_BD, queue) / student_temperature, dim=1)
    return weighted(log_p_BK, -log_q_BK).sum(dim=1).mean()


def _similarities(feature_BD: Tensor, own_BD: Tensor, queue: FeatureQueue) -> Tensor:
    """[B, 1 + K]: with the row's own teacher feature first, then with the queue."""
    own_B1 = (feature_BD * own_BD).sum(dim=1, keepdim=True)
    return torch.cat([own_B1, inner_products(feature_BD, queue.features_KD.to(feature_BD))], dim=1)
