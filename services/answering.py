"""From a plan to an answer: journal first, then the model; what is computed is on the disk before it leaves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from services.answers import transform
from services.batching import Batcher
from services.beside import beside
from services.held import choose
from services.kept_answers import KeptAnswers
from services.options import Wanted
from services.problems import Problem
from services.salvage import Salvage
from services.schemas import CacheUse
from services.status import Answer, Part, Plan, Question, Status, assembled, bytes_of
from services.teachers import ServedTeacher
from services.timing import Spent
from services.waiting import together, unless_stopped
from services.work import Fields, TeacherFailed
from teacher_cache.errors import TeacherCacheError


@dataclass(frozen=True, eq=False)
class _Found:
    """What the journal or the model says to some of the images of a question."""

    question: Question
    rows: Sequence[int]
    """Of the question's images."""
    fields: Fields
    status: Status

    def part(self, wanted: Wanted) -> Part:
        """The answers to the items that these rows are of."""
        there = set(self.rows)
        pairs = [pair for pair in zip(self.question.places, self.question.rows, strict=True) if pair[1] in there]
        index = torch.tensor([row for _, row in pairs])
        tensors = transform({name: value[index] for name, value in self.fields.items()}, wanted)
        return Part([place for place, _ in pairs], tensors, self.status)


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
        kept = await self._look_for(plan.questions)
        left = [question for question, found in zip(plan.questions, kept, strict=True) if found is None]
        failed: dict[int, Status] = {}
        computed: list[list[_Found]] = []
        if left and self.use != "only":
            # Nothing is refused for want of room that is there already.
            images = sum(len(question.images_BCHW) for question in left)
            self.batcher.require_room(self.caller, images, self.deadline)
            computed = await together(self._ask(question, failed) for question in left)
        there = [*(found for found in kept if found is not None), *chain.from_iterable(computed)]
        answer = await beside(partial(self._assembled, plan, there, failed), _size(plan, there))
        if answer.without and (self.strict or len(answer.without) == plan.items):
            raise _unanswered(answer.without)
        return answer

    def looked_up(self, plan: Plan) -> list[Status]:
        """What the cache and the journal have of each item; ABSENT where the model would be asked. Blocks."""
        kept: list[Part] = []
        for question in plan.questions if self.kept is not None else ():
            if len(self._found(question)) == len(self.wanted.fields):
                kept.append(Part(question.places, {}, Status.KEPT))
        return assembled(plan, [*plan.parts, *kept], {}).status

    def _found(self, question: Question) -> Fields:
        assert self.kept is not None, "there is a journal"
        try:
            return self.kept.find(self.served, question.identity, self.wanted.fields)
        except TeacherCacheError:
            raise _no_journal("must be readable", "it is not") from None

    async def _look_for(self, questions: Sequence[Question]) -> list[_Found | None]:
        """What the journal has of each."""
        if self.kept is None or self.use not in ("prefer", "only"):
            return [None for _ in questions]
        return await together(self._look(question) for question in questions)

    async def _look(self, question: Question) -> _Found | None:
        """What the journal has of a question; None where that is not all."""
        fields = await asyncio.to_thread(self._found, question)
        if len(fields) < len(self.wanted.fields):
            return None
        return _Found(question, question.rows, fields, Status.KEPT)

    async def _ask(self, question: Question, failed: dict[int, Status]) -> list[_Found]:
        try:
            fields = await self._compute(question.images_BCHW, question.identity)
        except TeacherFailed:
            if self.strict and len(set(question.rows)) == len(question.images_BCHW):
                raise
            return await self._salvage(question, failed)
        await self._keep(question, fields)
        return [_Found(question, question.rows, fields, Status.COMPUTED)]

    async def _salvage(self, question: Question, failed: dict[int, Status]) -> list[_Found]:
        """The answers to the images that do not break the teacher; the other items are put down as failed."""
        found = await Salvage(partial(self._compute, identity=None), question).answers()
        there = {row for rows, _ in found for row in rows}
        pairs = zip(question.places, question.rows, strict=True)
        failed.update({place: Status.FAILED for place, row in pairs if row not in there})
        return [_Found(question, rows, fields, Status.COMPUTED) for rows, fields in found]

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

    def _assembled(self, plan: Plan, there: Sequence[_Found], failed: Mapping[int, Status]) -> Answer:
        return assembled(plan, [*plan.parts, *(found.part(self.wanted) for found in there)], failed)


def _size(plan: Plan, there: Sequence[_Found]) -> int:
    """Bytes that are put together."""
    fields = [value for found in there for value in found.fields.values()]
    parts = [value for part in plan.parts for value in part.tensors.values()]
    return bytes_of((*fields, *parts), plan.items)


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
