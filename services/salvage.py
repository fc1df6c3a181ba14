"""Finding the images that break a teacher: their neighbours in the micro-batch get answers all the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import torch
from torch import Tensor

from services.status import Question
from services.work import Fields, TeacherFailed

MOST_TRIES = 32
"""Forward passes that are spent on one micro-batch."""


class Salvage:
    """Halves the images that are wanted until those that break the teacher are alone.

    All others of the micro-batch are black, so that each stays in its place.
    """

    def __init__(self, compute: Callable[[Tensor], Awaitable[Fields]], question: Question) -> None:
        """Asks nothing yet.

        Args:
            compute: asks the teacher; raises `TeacherFailed`.
            question: on which it has failed as a whole.
        """
        self._compute, self._images_BCHW = compute, question.images_BCHW
        self._wanted = sorted(set(question.rows))
        self._tries = 0
        self._found: list[tuple[list[int], Fields]] = []

    async def answers(self) -> list[tuple[list[int], Fields]]:
        """Rows among the images, and answers that hold for them; the other rows have none."""
        if len(self._wanted) < len(self._images_BCHW):
            # It may be one of those that nobody has asked for.
            await self._try(self._wanted)
        else:
            await self._split(self._wanted)
        return self._found

    async def _split(self, rows: list[int]) -> None:
        if len(rows) > 1:
            half = len(rows) // 2
            await self._try(rows[:half])
            await self._try(rows[half:])

    async def _try(self, rows: list[int]) -> None:
        self._tries += 1
        if self._tries > MOST_TRIES:
            return
        alone_BCHW = torch.zeros_like(self._images_BCHW)
        alone_BCHW[rows] = self._images_BCHW[rows]
        try:
            self._found.append((rows, await self._compute(alone_BCHW)))
        except TeacherFailed:
            await self._split(rows)
