"""Step 10, learner: a student and its objective as one module, whose gradients several processes average."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from student_train.answer import Taps
from student_train.batch import Batch
from student_train.objective import Objective
from teacher_cache.spec import NormalizeSpec
from teacher_cache.views import normalize


class Learner(nn.Module):
    """From a batch to its loss. What is trained beside the student is a part of this, and no part of the student."""

    def __init__(
        self, student: nn.Module, answer: Taps, objective: Objective, normalization: NormalizeSpec | None
    ) -> None:
        """Joins what is there already.

        Args:
            student: the plain module.
            answer: listens to it.
            objective: joined to it.
            normalization: of its input.
        """
        super().__init__()
        self.student, self.joints = student, nn.ModuleList(objective.joints)
        self._answer, self._objective, self._normalization = answer, objective, normalization

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms, and each term's own value (see `Objective`)."""
        return self._objective(self._answer(normalize(batch.views_BCHW, self._normalization)), batch, progress)


def has_idle_parts(learner: Learner, batch: Batch) -> bool:
    """Whether some weights get no gradient of a batch; found by trying, which leaves no trace.

    Args:
        learner: on the device of the batch.
        batch: any.
    """
    training = learner.student.training
    learner.student.eval()
    here = batch.views_BCHW.device
    with torch.random.fork_rng([here] if here.type == "cuda" else []):
        learner(batch, 0.0)[0].backward()
    idle = any(weight.grad is None for weight in learner.parameters() if weight.requires_grad)
    learner.zero_grad(set_to_none=True)
    learner.student.train(training)
    return idle


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Where it is wanted, has torch refuse what gives other bits on every run; then its settings are as they were."""
    if not wanted:
        yield
        return
    # Read when the library's first handle is made; without it, matrix products on a GPU are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmark
