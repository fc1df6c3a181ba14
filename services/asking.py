"""A question on its way: read, allowed, planned, answered, and given up where nobody waits for it any more."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from fastapi import Request
from torch import Tensor

from services.admission import admit, image_digests, visit_of
from services.answering import Desk
from services.answers import gathered
from services.beside import beside
from services.classes import with_classes
from services.library import Library
from services.naming import Named
from services.options import Wanted
from services.planning import plan_images
from services.planning_named import plan_named
from services.policy import Asked
from services.problems import Problem, no_room
from services.state import Service
from services.status import Answer, Plan, Status
from services.upload import Upload
from services.visit import Visit
from services.work import Expired, QueueFull, TeacherFailed

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Question:
    """One that this key may have answered, and that is counted."""

    desk: Desk
    plan: Callable[[], Plan]
    """Looks into the data set and the cache."""
    classes_NK: Tensor | None = None
    """Of a `gather`."""
    resized: bool | tuple[bool, ...] = False
    """Whether an image was brought to the teacher's size; of files, each."""
    reads: bool = True
    """Whether the plan looks into the data set or the cache."""
    size: float = math.inf
    """Bytes of the images that it goes over where it does not."""
    counted: Sequence[int] = ()
    """The items that were asked for: files that cannot be decoded and fillings are none."""
    digests: tuple[bytes, ...] = ()
    """Of each of them, where this key's distinct images are counted."""


Q = TypeVar("Q", bound=Question)


async def ask_images(request: Request, service: Service, desk: Desk, upload: Upload) -> Question:
    """A question by image.

    Raises:
        Problem: 403 and 429 of the key's policy and budgets, 422 for classes that do not fit.
    """
    wanted = with_classes(desk.wanted, upload.classes_NK, len(upload.views_BCHW), desk.served.classes)
    sent_BCHW = upload.decoded_BCHW
    asked = Asked.predict(desk.served.name, wanted)
    digests = await admit(request, service.books, asked, len(sent_BCHW), partial(image_digests, sent_BCHW))
    counted: Sequence[int] = range(len(upload.views_BCHW))
    if upload.broken:
        counted = [place for place in counted if place not in upload.broken]
    cached = desk.served.library is not None and desk.use in ("prefer", "only")
    plan = partial(plan_images, desk.served, upload.views_BCHW, wanted, cached=cached, broken=upload.broken)
    return Question(
        replace(desk, wanted=wanted),
        plan,
        upload.classes_NK,
        upload.resized,
        cached,
        upload.views_BCHW.nbytes,
        counted,
        digests,
    )


async def ask_named(request: Request, service: Service, desk: Desk, named: Named) -> Question:
    """A question by name; raises as `ask_images` does."""
    library = desk.served.library
    assert library is not None, "its media type was taken"
    classes_NK = await asyncio.to_thread(classes_of, named)
    wanted = with_classes(desk.wanted, classes_NK, len(named.keys), desk.served.classes)
    if named.whole and wanted.output == "gather":
        raise Problem(422, "whole", "has no effect on output=gather", "true", "Leave it out.")
    asked = asked_by_name(library, desk.served.name, wanted, named)
    digests = await admit(request, service.books, asked, len(named.keys), partial(_name_digests, named, library))
    cached, most = desk.use in ("prefer", "only"), service.settings.max_images
    looked = desk.use != "only" or desk.kept is not None
    plan = partial(plan_named, desk.served, named, wanted, cached=cached, most=most, looked=looked)
    return Question(replace(desk, wanted=wanted), plan, classes_NK, counted=range(len(named.keys)), digests=digests)


def asked_by_name(library: Library, teacher: str, wanted: Wanted, named: Named) -> Asked:
    """What a question by name asks for."""
    asked, view = Asked.predict(teacher, wanted, uploaded=False, dataset=library.dataset), max(named.view_of_each)
    return replace(asked, unplanned_view=view if view >= library.planned_views else None)


def classes_of(named: Named) -> Tensor | None:
    """Its classes [N, K], not yet checked."""
    return None if named.classes is None else torch.tensor(named.classes, dtype=torch.int64)


async def answered(
    request: Request, service: Service, read: Callable[[], Awaitable[Q]], deadline: float
) -> tuple[Q, Answer]:
    """A question and its answer, in time.

    Args:
        request: whose sender may hang up; its work then leaves the queue.
        service: which answers.
        read: reads the body to a question.
        deadline: on the monotonic clock; inf where there is none.

    Raises:
        Problem: 408, 500, 503 or 504, and what `read` raises.
    """
    try:
        async with in_time(deadline):
            question = await read()
            answer = await _while_there(request, partial(_answer, service, question, visit_of(request)))
            return question, answer
    except QueueFull as full:
        raise no_room(full.retry_after) from None
    except TeacherFailed:
        hint = "The images of other requests are not affected. Report the request_id."
        raise Problem(500, "teacher", "must answer these images", "it failed on them", hint) from None


@asynccontextmanager
async def in_time(deadline: float) -> AsyncIterator[None]:
    """Ends what is in here at a moment of the monotonic clock, with a 504 `Problem`; inf where there is none."""
    try:
        async with asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic()):
            yield
    except (TimeoutError, Expired):
        hint = "Allow more time, or send fewer images."
        raise Problem(504, "X-Deadline-Ms", "passed, or would, before the answer was there", "late", hint) from None


async def _answer(service: Service, question: Question, visit: Visit) -> Answer:
    desk = replace(question.desk, spent=visit.spent)
    if question.reads:
        with visit.spent.on("cache"):
            plan = await service.read(desk.served.name, question.plan)
    else:
        plan = await beside(question.plan, question.size)
    answer = await desk.answer(plan)
    _count(answer, question, service, visit)
    if answer.without:
        # Only answers are paid for.
        paid = await asyncio.to_thread(_paid, question, answer)
        digests = frozenset(question.digests[number] for number in paid if question.digests)
        await service.books.reduce(visit, len(paid), digests)
    if question.classes_NK is None:
        return answer
    tensors = await beside(partial(gathered, answer.tensors, question.classes_NK), answer.size)
    return replace(answer, tensors=tensors)


def _paid(question: Question, answer: Answer) -> list[int]:
    return [number for number, place in enumerate(question.counted) if place not in answer.without]


def _count(answer: Answer, question: Question, service: Service, visit: Visit) -> None:
    """Notes how many items came from the cache or the journal, where they were asked."""
    desk = question.desk
    library = desk.served.library
    looked = service.kept is not None or (library is not None and library.views > 0)
    if looked and desk.use in ("prefer", "only"):
        visit.cache_hits = answer.status.count(Status.CACHED) + answer.status.count(Status.KEPT)
        visit.cache_misses = len(answer.status) - visit.cache_hits


def _name_digests(named: Named, library: Library) -> tuple[bytes, ...]:
    """For each (sample, view) what a key's distinct images are counted by where none is sent."""
    pairs, where = zip(named.keys, named.view_of_each, strict=True), library.fingerprint
    return tuple(
        hashlib.blake2b(f"{where} {view} {key}".encode(), digest_size=16, person=b"name").digest()
        for key, view in pairs
    )


async def _while_there(request: Request, answer: Callable[[], Awaitable[T]]) -> T:
    """An answer; a client that hangs up meanwhile takes its work out of the queue."""
    work, gone = asyncio.ensure_future(answer()), asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Problem(408, "connection", "must stay open until the answer", "closed", "Ask again.")
        return work.result()
    finally:
        gone.cancel()
        work.cancel()


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
