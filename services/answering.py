"""From a plan to an answer: journal first, then the model; what is computed is on the disk before it leaves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from services.answers import transform
from services.batching import Batcher
from services.kept_answers import KeptAnswers
from services.options import Wanted
from services.problems import Problem
from services.schemas import CacheUse
from services.status import Answer, Part, Plan, Question, Status, assembled
from services.teachers import ServedTeacher
from services.work import Fields, TeacherFailed
from teacher_cache.errors import TeacherCacheError

T = TypeVar("T")
_MOST_TRIES = 32
"""Forward passes that are spent on finding the images which break one micro-batch."""


@dataclass(frozen=True, eq=False)
class Desk:
    """Where one request's questions are answered."""

    served: ServedTeacher
    batcher: Batcher
    kept: KeptAnswers | None
    wanted: Wanted
    use: CacheUse
    strict: bool
    """Whether one item without an answer leaves the others without one, too."""
    caller: str
    """Who asks, and so in whose line it waits."""
    deadline: float = math.inf

    async def answer(self, plan: Plan) -> Answer:
        """Everything that the plan leaves open.

        Raises:
            QueueFull: too much waits.
            Expired: the deadline passed.
            TeacherFailed: it fails on the only item, or with `strict` on one of them.
            Problem: 404 or 422 for the first item without an answer, with `strict` or where there is none at all; 503
                where the journal cannot be written, or the service stops.
        """
        if self.strict and plan.unanswered:
            raise _unanswered(*next(iter(plan.unanswered.items())))
        if self.use != "only":
            images = sum(len(question.images_BCHW) for question in plan.questions)
            self.batcher.require_room(self.caller, images, self.deadline)
        failed: dict[int, Status] = {}
        found = await together([self._ask(question, failed) for question in plan.questions])
        parts = [*plan.parts, *chain.from_iterable(found)]
        tensors, status = await asyncio.to_thread(assembled, plan, parts, failed)
        without = [place for place, one in enumerate(status) if not one.answered]
        if without and (self.strict or len(without) == len(status)):
            raise _unanswered(without[0], status[without[0]])
        return Answer(tensors, status, plan.encodings)

    async def _ask(self, question: Question, failed: dict[int, Status]) -> list[Part]:
        kept = self.kept if self.use in ("prefer", "only") else None
        if kept is not None:
            fields = await asyncio.to_thread(kept.find, self.served.answers_key, question.identity, self.wanted.fields)
            if len(fields) == len(self.wanted.fields):
                return [await self._part(question, question.rows, fields, Status.KEPT)]
        if self.use == "only":
            return []
        try:
            fields = await self._compute(question.images_BCHW, question.identity)
        except TeacherFailed:
            if self.strict:
                raise
            return await _Salvage(self, question, failed).parts()
        await self._keep(question, fields)
        return [await self._part(question, question.rows, fields, Status.COMPUTED)]

    async def _keep(self, question: Question, fields: Fields) -> None:
        if self.kept is None or self.use not in ("prefer", "refresh"):
            return
        again = self.use == "refresh"
        try:
            await asyncio.wrap_future(self.kept.keep(self.served.answers_key, question.identity, fields, again=again))
        except TeacherCacheError:
            hint = "Nothing is lost: ask again. Whoever runs the service finds the reason in its log."
            headers = {"Retry-After": "5"}
            rule = "must take an answer before it leaves"
            raise Problem(503, "journal", rule, "it cannot be written", hint, headers) from None

    async def _compute(self, images_BCHW: Tensor, identity: bytes | None) -> Fields:
        asked = self.batcher.submit(images_BCHW, self.wanted.fields, self.caller, self.deadline, identity)
        return await unless_stopped(asked)

    async def _part(self, question: Question, rows: Sequence[int], fields: Fields, status: Status) -> Part:
        wanted = set(rows)
        pairs = [pair for pair in zip(question.places, question.rows, strict=True) if pair[1] in wanted]
        index = torch.tensor([row for _, row in pairs])
        return Part([place for place, _ in pairs], await asyncio.to_thread(self._transform, fields, index), status)

    def _transform(self, fields: Fields, index: Tensor) -> dict[str, Tensor]:
        return transform({name: value[index] for name, value in fields.items()}, self.wanted)


class _Salvage:
    """Halves a micro-batch on which the teacher fails, until the images that break it are alone.

    The other images of the micro-batch are black, so that each stays in its place.
    """

    def __init__(self, desk: Desk, question: Question, failed: dict[int, Status]) -> None:
        self._desk, self._question, self._failed = desk, question, failed
        self._tries = 0
        self._found: list[Part] = []

    async def parts(self) -> list[Part]:
        """The answers that there are; the other items are put down as failed."""
        rows = sorted(set(self._question.rows))
        await self._split(rows)
        return self._found

    async def _split(self, rows: list[int]) -> None:
        if len(rows) > 1:
            half = len(rows) // 2
            await self._try(rows[:half])
            await self._try(rows[half:])
        else:
            self._give_up(rows)

    async def _try(self, rows: list[int]) -> None:
        self._tries += 1
        if self._tries > _MOST_TRIES:
            self._give_up(rows)
            return
        alone_BCHW = torch.zeros_like(self._question.images_BCHW)
        alone_BCHW[rows] = self._question.images_BCHW[rows]
        try:
            fields = await self._desk._compute(alone_BCHW, None)
        except TeacherFailed:
            await self._split(rows)
        else:
            self._found.append(await self._desk._part(self._question, rows, fields, Status.COMPUTED))

    def _give_up(self, rows: list[int]) -> None:
        pairs = zip(self._question.places, self._question.rows, strict=True)
        self._failed.update({place: Status.FAILED for place, row in pairs if row in rows})


async def together(work: Sequence[Awaitable[T]]) -> list[T]:
    """All results in order; where one fails the others are cancelled, and have ended, before that is told."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def unless_stopped(asked: Future[T]) -> T:
    """A future's result; cancelled with whoever waits. Where the service has cancelled it, a 503 `Problem`."""
    answer: asyncio.Future[Any] = asyncio.wrap_future(asked)
    try:
        found: T = await answer
        return found
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        headers = {"Retry-After": "1"}
        raise Problem(503, "server", "must be running", "stopping", "Try again.", headers) from None
    finally:
        answer.cancel()


_REASONS = {
    Status.ABSENT: (404, "must be in the cache or the journal", "Leave out cache=only, or strict."),
    Status.UNKNOWN: (404, "must be samples of the data set, and views of its recipe", "The card names the data set."),
    Status.BROKEN: (422, "must be samples that can be decoded", "Leave it out."),
    Status.DIFFERS: (422, "must have the pixels of their digests", "Send the images."),
}


def _unanswered(place: int, status: Status) -> Exception:
    if status is Status.FAILED:
        return TeacherFailed()
    code, rule, hint = _REASONS[status]
    return Problem(code, "items", rule, f"item {place} is {status.shown}", hint)
