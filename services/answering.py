"""From a plan to an answer: journal first, then the model; what is computed is on the disk before it leaves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from services.answers import transform
from services.batching import Batcher
from services.held import choose
from services.kept_answers import KeptAnswers
from services.options import Wanted
from services.problems import Problem
from services.salvage import Salvage
from services.schemas import CacheUse
from services.status import Answer, Part, Plan, Question, Status, assembled
from services.teachers import ServedTeacher
from services.timing import Spent
from services.work import Fields, TeacherFailed
from teacher_cache.errors import TeacherCacheError

T = TypeVar("T")


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
    spent: Spent = field(default_factory=Spent)
    """Where the time in the queue and the model is counted."""

    def require_room(self) -> None:
        """Raises `QueueFull` where not even one image would be taken, and the model has to be asked."""
        if self.use == "only" or (self.use == "prefer" and (self.kept is not None or self._may_be_cached)):
            return
        self.batcher.require_room(self.caller, 1, self.deadline)

    @property
    def _may_be_cached(self) -> bool:
        library = self.served.library
        return library is not None and choose(library.held, self.wanted, exact=False) is not None

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
            raise _unanswered(plan.unanswered)
        kept = await together([self._look(question) for question in plan.questions])
        left = [question for question, part in zip(plan.questions, kept, strict=True) if part is None]
        failed: dict[int, Status] = {}
        computed: list[list[Part]] = []
        if left and self.use != "only":
            # Nothing is refused for want of room that is there already.
            images = sum(len(question.images_BCHW) for question in left)
            self.batcher.require_room(self.caller, images, self.deadline)
            computed = await together([self._ask(question, failed) for question in left])
        parts = [*plan.parts, *(part for part in kept if part is not None), *chain.from_iterable(computed)]
        tensors, status = await asyncio.to_thread(assembled, plan, parts, failed)
        without = {place: one for place, one in enumerate(status) if not one.answered}
        if without and (self.strict or len(without) == len(status)):
            raise _unanswered(without)
        return Answer(tensors, status, plan.encodings)

    def looked_up(self, plan: Plan) -> list[Status]:
        """What the cache and the journal have of each item; ABSENT where the model would be asked. Blocks."""
        kept: list[Part] = []
        for question in plan.questions if self.kept is not None else ():
            if len(self._found(question)) == len(self.wanted.fields):
                kept.append(Part(question.places, {}, Status.KEPT))
        return assembled(plan, [*plan.parts, *kept], {})[1]

    def _found(self, question: Question) -> Fields:
        assert self.kept is not None, "there is a journal"
        try:
            return self.kept.find(self.served, question.identity, self.wanted.fields)
        except TeacherCacheError:
            raise _no_journal("must be readable", "it is not") from None

    async def _look(self, question: Question) -> Part | None:
        """What the journal has of a question; None where that is not all."""
        if self.kept is None or self.use not in ("prefer", "only"):
            return None
        fields = await asyncio.to_thread(self._found, question)
        if len(fields) < len(self.wanted.fields):
            return None
        return await self._part(question, question.rows, fields, Status.KEPT)

    async def _ask(self, question: Question, failed: dict[int, Status]) -> list[Part]:
        try:
            fields = await self._compute(question.images_BCHW, question.identity)
        except TeacherFailed:
            if self.strict and len(set(question.rows)) == len(question.images_BCHW):
                raise
            return await self._salvage(question, failed)
        await self._keep(question, fields)
        return [await self._part(question, question.rows, fields, Status.COMPUTED)]

    async def _salvage(self, question: Question, failed: dict[int, Status]) -> list[Part]:
        """The answers to the images that do not break the teacher; the other items are put down as failed."""
        found = await Salvage(partial(self._compute, identity=None), question).answers()
        parts = [await self._part(question, rows, fields, Status.COMPUTED) for rows, fields in found]
        there = {place for part in parts for place in part.places}
        failed.update({place: Status.FAILED for place in question.places if place not in there})
        return parts

    async def _keep(self, question: Question, fields: Fields) -> None:
        if self.kept is None or self.use not in ("prefer", "refresh"):
            return
        again = self.use == "refresh"
        try:
            await asyncio.wrap_future(self.kept.keep(self.served, question.identity, fields, again=again))
        except TeacherCacheError:
            raise _no_journal("must take an answer before it leaves", "it cannot be written") from None

    async def _compute(self, images_BCHW: Tensor, identity: bytes | None) -> Fields:
        asked = self.batcher.submit(images_BCHW, self.wanted.fields, self.caller, self.deadline, identity)
        found = await unless_stopped(asked)
        self.spent.computing(asked.asked, asked.entered, asked.left)
        return found

    async def _part(self, question: Question, rows: Sequence[int], fields: Fields, status: Status) -> Part:
        wanted = set(rows)
        pairs = [pair for pair in zip(question.places, question.rows, strict=True) if pair[1] in wanted]
        index = torch.tensor([row for _, row in pairs])
        return Part([place for place, _ in pairs], await asyncio.to_thread(self._transform, fields, index), status)

    def _transform(self, fields: Fields, index: Tensor) -> dict[str, Tensor]:
        return transform({name: value[index] for name, value in fields.items()}, self.wanted)


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
    Status.BROKEN: (422, "must be images that can be decoded", "Leave it out."),
    Status.DIFFERS: (422, "must have the pixels of their digests", "Send the images."),
}


def _unanswered(why: Mapping[int, Status]) -> Exception:
    """For the first item without an answer of its own fault; others may be without one because of it."""
    place = min(why, key=lambda item: (why[item] is Status.ABSENT, item))
    status = why[place]
    if status is Status.FAILED:
        return TeacherFailed()
    code, rule, hint = _REASONS[status]
    return Problem(code, "items", rule, f"item {place} is {status.shown}", hint)


def _no_journal(rule: str, found: str) -> Problem:
    hint = "Nothing is lost: ask again. Whoever runs the service finds the reason in its log."
    return Problem(503, "journal", rule, found, hint, {"Retry-After": "5"})
