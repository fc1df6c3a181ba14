"""What every teacher offers, wherever its weights are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.spec import needs_label


@dataclass(frozen=True, eq=False)
class ViewNames:
    """What views are called: a service that has the data set, too, need not be sent their pixels."""

    keys: tuple[str, ...]
    """Of the samples."""
    view: int
    """Its number, the same for all."""
    digests: NDArray[np.uint64]
    """Pixel digests: what makes sure that it is these views."""


def padded(views_BCHW: Tensor, micro_batch: int) -> Tensor:
    """Views filled up with black ones to a whole micro-batch: a teacher's last bit may depend on the batch's size."""
    filling = views_BCHW.new_zeros((micro_batch - len(views_BCHW), *views_BCHW.shape[1:]))
    return torch.cat([views_BCHW, filling])


def ask_whole(
    teacher: Teacher, views_BCHW: Tensor, micro_batch: int, labels_B: Tensor | None = None
) -> dict[str, Tensor]:
    """Asks about a whole micro-batch, filled up where there are fewer views; the fillings are answered, too.

    Args:
        teacher: whom to ask.
        views_BCHW: uint8, at most a micro-batch.
        micro_batch: rows in one question.
        labels_B: int64 class numbers, for fields that are made with them. Where planning looks at shapes, at speed
            or at other fields, it need not know any: class 0 stands for them, as it does for fillings.
    """
    return begin_whole(teacher, views_BCHW, micro_batch, labels_B)()


def begin_whole(
    teacher: Teacher,
    views_BCHW: Tensor,
    micro_batch: int,
    labels_B: Tensor | None = None,
    names: ViewNames | None = None,
) -> Callable[[], dict[str, Tensor]]:
    """`ask_whole` in two steps: gives what returns the answer; a remote teacher is under way to it meanwhile.

    `names` are the views', for a remote teacher.
    """
    whole = padded(views_BCHW, micro_batch)
    if isinstance(teacher, RemoteTeacher):
        return teacher.submit(whole, names).result
    if not any(map(needs_label, teacher.fields)):
        return lambda: teacher(whole)
    filled_B = torch.zeros(micro_batch, dtype=torch.int64)
    if labels_B is not None:
        filled_B[: len(labels_B)] = labels_B
    return lambda: teacher(whole, filled_B)


class Teacher(Protocol):
    """Step 3: a frozen model, uint8 views to named fields.

    Obligations: `__call__` is deterministic for one batch size on one kind of machine; it keeps no state; it
    returns float32 tensors that own their memory, one row for each view. Not required to be thread-safe.
    """

    @property
    def fingerprint(self) -> str:
        """Names weights, architecture, preprocessing and precision."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The names that `__call__` returns."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda`, wherever it runs: the last bit of a logit may depend on it."""

    @property
    def threads(self) -> int | None:
        """Threads of the machine that it runs on; None where it runs here, on the build's own."""

    def __call__(self, views_BCHW: Tensor, labels_B: Tensor | None = None, /) -> dict[str, Tensor]:
        """uint8 [B, C, H, W] views to float32 [B, ...] values of each field, on the teacher's device.

        Labels are given where one of `fields` is made with them, and only there.
        """


@dataclass(frozen=True)
class Bill:
    """What a remote teacher was asked for, by all builds that keep its answers in one place."""

    requests: int
    """Answered, or perhaps answered and lost."""
    images: int
    """In them, with the black ones that fill up."""
    spent: str | None
    """For them, in the unit of the price; None where no price is known."""
    notes: tuple[str, ...]
    """What was lost, where anything was."""


@runtime_checkable
class RemoteTeacher(Teacher, Protocol):
    """A teacher whose answers come over a network and may cost something.

    Obligations beyond a teacher's: `submit` may be called again before the last answer is there, from one thread;
    an answer that has arrived is never asked for again, however often the process is killed.
    """

    @property
    def concurrency(self) -> int:
        """How many questions may be under way at once."""

    def submit(self, views_BCHW: Tensor, names: ViewNames | None, /) -> Future[dict[str, Tensor]]:
        """`__call__`, answered later; `names` are those of the first views, the others are fillings."""

    def shapes(self, view_shape: tuple[int, ...], /) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each field, without asking a question.

        Raises:
            TeacherError: it does not take views of this shape.
        """

    def drain(self) -> None:
        """Tries nothing again, and returns when the answers that are under way have been kept, or are lost."""

    def close(self) -> None:
        """Drains, and gives back what is open; nothing is asked afterwards."""

    def settle(self, forget: bool, /) -> Bill | None:
        """All that was asked for is in a sealed cache.

        Args:
            forget: whether the answers may go, which are kept until then.

        Returns:
            What whoever pays should know; None where nothing is counted.
        """
