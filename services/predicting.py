"""Questions: by image or by name, from the cache or from the model, and what the cache has."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from torch import Tensor

from services import images, naming, wire
from services.admission import admit, caller_of, image_digests, require, visit_of
from services.answering import Desk
from services.body import read_body
from services.headers import answers_tensors, deadline_of, media_type_of, names_digest
from services.naming import Named, parse_named
from services.options import OptionError, PredictOptions, Wanted, resolve
from services.planning import plan_images
from services.planning_named import look_up, plan_named
from services.policy import Asked
from services.problems import Problem
from services.responding import respond
from services.routes import service_of, teacher_of
from services.schemas import Lookup, Predictions
from services.settings import Settings
from services.state import Service
from services.status import Answer, Plan
from services.teachers import ServedTeacher
from services.tensor_body import Buffer
from services.work import Expired, QueueFull, TeacherFailed

T = TypeVar("T")
router = APIRouter()


@router.post("/v1/teachers/{name}/predict", response_model=Predictions)
async def predict(name: str, request: Request, options: Annotated[PredictOptions, Query()]) -> Response:
    """One image, a safetensors body of many, or names of samples: to logits, probabilities, the top k, or features."""
    arrived = time.monotonic()
    service = service_of(request)
    served = teacher_of(request, service, name)
    media_type = media_type_of(request, named=served.library is not None)
    tensors = answers_tensors(request, media_type)
    wanted = _wanted(request, options, served, tensors)
    _require_digest(request, served)
    if options.cache == "refresh" and service.kept is None:
        raise Problem(400, "cache", "refresh needs a journal", "refresh", "Ask without it: nothing is kept here.")
    deadline = deadline_of(request, arrived)
    batcher, caller = service.batchers[name], caller_of(request).name
    desk = Desk(served, batcher, service.kept, wanted, options.cache, options.strict, caller, deadline)
    question = _Question(request, service, desk, media_type)
    try:
        async with asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic()):
            answer = await _while_there(request, question.read, question.answer)
    except (TimeoutError, Expired):
        hint = "Allow more time, or send fewer images."
        raise Problem(504, "X-Deadline-Ms", "passed before the answer was there", "late", hint) from None
    except QueueFull as full:
        headers = {"Retry-After": str(full.retry_after)}
        raise Problem(503, "queue", "must have room", "full", "Try again later.", headers) from None
    except TeacherFailed:
        hint = "The images of other requests are not affected. Report the request_id."
        raise Problem(500, "teacher", "must answer these images", "it failed on them", hint) from None
    return await asyncio.to_thread(respond, answer, served, wanted, question.resized, tensors)


@router.post("/v1/teachers/{name}/lookup")
async def lookup(name: str, request: Request, options: Annotated[PredictOptions, Query()]) -> Lookup:
    """Which samples have an answer in the cache, which the model would be asked about, and which have none."""
    service = service_of(request)
    served = teacher_of(request, service, name)
    if media_type_of(request, named=served.library is not None) != naming.MEDIA_TYPE:
        raise Problem(415, "Content-Type", f"must be {naming.MEDIA_TYPE}", "another", "Send keys and views.")
    # Whatever may be predicted may be looked up.
    wanted = _wanted(request, options, served, tensors=True)
    _require_digest(request, served)
    named = parse_named(await read_body(request, service.settings), service.settings.max_images)
    dataset = served.library.dataset if served.library is not None else None
    require(service.books, visit_of(request), Asked.predict(name, wanted, uploaded=False, dataset=dataset))
    look = partial(look_up, served, named, wanted, most=service.settings.max_images)
    found = await service.read(name, look)
    shown = tuple("computable" if status is None else status.shown for status in found)
    return Lookup(teacher=name, digest=served.digest, status=shown)


class _Question:
    """One request to predict."""

    def __init__(self, request: Request, service: Service, desk: Desk, media_type: str) -> None:
        self._request, self._service, self._desk, self._media_type = request, service, desk, media_type
        self._plan: Callable[[], Plan] | None = None
        self._reads = True
        """Whether the data set or the cache has to be looked into."""
        self.resized = False
        """Whether an image was brought to the teacher's size."""

    async def read(self) -> None:
        """The body; and whether this key may have an answer to it."""
        data = await read_body(self._request, self._service.settings)
        if self._desk.use != "only":
            self._desk.batcher.require_room(self._desk.caller, 1, self._desk.deadline)
        if self._media_type == naming.MEDIA_TYPE:
            await self._read_named(data)
        else:
            await self._read_images(data)

    async def _read_named(self, data: Buffer) -> None:
        settings, desk, library = self._service.settings, self._desk, self._desk.served.library
        assert library is not None, "its media type was taken"
        named = await asyncio.to_thread(parse_named, data, settings.max_images)
        asked = Asked.predict(desk.served.name, desk.wanted, uploaded=False, dataset=library.dataset)
        await admit(self._request, self._service.books, asked, len(named.keys), partial(_name_digests, named))
        cached = desk.use in ("prefer", "only")
        self._plan = partial(plan_named, desk.served, named, desk.wanted, cached=cached, most=settings.max_images)

    async def _read_images(self, data: Buffer) -> None:
        desk = self._desk
        views_BCHW, self.resized = await asyncio.to_thread(
            _views, data, self._service.settings, desk.served, self._media_type
        )
        asked = Asked.predict(desk.served.name, desk.wanted)
        digests = partial(image_digests, views_BCHW)
        await admit(self._request, self._service.books, asked, len(views_BCHW), digests)
        cached = self._reads = desk.served.library is not None and desk.use in ("prefer", "only")
        self._plan = partial(plan_images, desk.served, views_BCHW, desk.wanted, cached=cached)

    async def answer(self) -> Answer:
        """Once it is read."""
        assert self._plan is not None, "it is read first"
        if self._reads:
            plan = await self._service.read(self._desk.served.name, self._plan)
        else:
            plan = await asyncio.to_thread(self._plan)
        return await self._desk.answer(plan)


def _wanted(request: Request, options: PredictOptions, served: ServedTeacher, tensors: bool) -> Wanted:
    names = [name for name, _ in request.query_params.multi_items()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Problem(400, twice, "must be given once", f"{names.count(twice)} times", "Give it once.")
    try:
        wanted = resolve(options, dict(served.field_shapes), tensors)
    except OptionError as error:
        raise Problem(400, error.field, error.rule, error.value, error.hint) from None
    return replace(wanted, rounding=caller_of(request).policy.rounding)


def _require_digest(request: Request, served: ServedTeacher) -> None:
    condition = request.headers.get("if-match")
    if condition is not None and not names_digest("If-Match", condition, served.digest, weak=False):
        hint = "Read the card again: this is another teacher now."
        raise Problem(412, "If-Match", "must name this teacher's digest", condition, hint)


def _views(data: Buffer, settings: Settings, served: ServedTeacher, media_type: str) -> tuple[Tensor, bool]:
    """The body as uint8 [N, C, H, W], and whether it was resized."""
    if media_type != wire.MEDIA_TYPE:
        return images.decode(data, media_type, served.view_shape, settings.max_pixels)
    try:
        views_BCHW = wire.unpack_images(data, served.view_shape)
    except wire.WireError as error:
        hint = "See `input` in the teacher's card."
        raise Problem(422, error.field, error.rule, error.value, hint) from None
    if len(views_BCHW) > settings.max_images:
        rule, hint = f"must hold at most {settings.max_images}", "Send several requests."
        raise Problem(413, "images", rule, len(views_BCHW), hint)
    return views_BCHW, False


def _name_digests(named: Named) -> frozenset[bytes]:
    """One for each distinct (sample, view): what a key's distinct images are counted by where none is sent."""
    pairs = zip(named.keys, named.view_of_each, strict=True)
    return frozenset(
        hashlib.blake2b(f"{view} {key}".encode(), digest_size=16, person=b"name").digest() for key, view in pairs
    )


async def _while_there(request: Request, read: Callable[[], Awaitable[None]], answer: Callable[[], Awaitable[T]]) -> T:
    """An answer; a client that hangs up meanwhile takes its work out of the queue."""
    await read()
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
