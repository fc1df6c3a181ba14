"""The endpoints: the probes, the cards, what a key has used, and predict."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from services import answers, images, wire
from services.admission import admit, caller_of, image_digests, require, visit_of
from services.batching import Batcher
from services.headers import answers_tensors, deadline_of, media_type_of, names_digest
from services.large_response import LargeResponse
from services.options import OptionError, PredictOptions, Wanted, resolve
from services.policy import Asked
from services.problems import Problem
from services.schemas import Predictions, Probe, TeacherCard, TeacherList, UsageReport
from services.settings import Settings
from services.state import Service
from services.teachers import ServedTeacher
from services.upload import read_body
from services.work import Expired, Fields, QueueFull, TeacherFailed

router = APIRouter()


@router.get("/livez")
async def livez() -> Probe:
    """The process answers."""
    return Probe(status="live")


@router.get("/readyz")
async def readyz(request: Request) -> Probe:
    """Teachers are warm, their queues under the mark, and the server is not on its way out."""
    reasons = _service(request).not_ready()
    if reasons:
        raise Problem(503, "server", "must be ready", "; ".join(reasons), "Try again.", {"Retry-After": "1"})
    return Probe(status="ready")


@router.get("/v1/teachers")
async def teachers(request: Request) -> TeacherList:
    """The cards of all teachers that this key may ask."""
    service, policy = _service(request), caller_of(request).policy
    allowed = [one for one in service.teachers.values() if policy.teachers is None or one.name in policy.teachers]
    return TeacherList(teachers=tuple(one.card(service.settings, policy) for one in allowed))


@router.get("/v1/usage")
async def usage(request: Request) -> UsageReport:
    """What this key has used, and what is left of its budgets."""
    return await _service(request).books.report(caller_of(request))


@router.get("/v1/teachers/{name}", response_model=TeacherCard)
async def card(name: str, request: Request) -> Response:
    """One card; its ETag is the teacher's digest."""
    service = _service(request)
    served = _teacher(request, service, name)
    headers = {"ETag": f'"{served.digest}"'}
    known = request.headers.get("if-none-match")
    if known is not None and names_digest("If-None-Match", known, served.digest, weak=True):
        return Response(status_code=304, headers=headers)
    found = served.card(service.settings, caller_of(request).policy)
    return JSONResponse(found.model_dump(mode="json"), headers=headers)


@router.post("/v1/teachers/{name}/predict", response_model=Predictions)
async def predict(name: str, request: Request, options: Annotated[PredictOptions, Query()]) -> Response:
    """One image, or a safetensors body of many, to logits, probabilities, the top k, or features."""
    arrived = time.monotonic()
    service = _service(request)
    served, batcher = _teacher(request, service, name), service.batchers[name]
    media_type = media_type_of(request)
    tensors = answers_tensors(request, media_type)
    wanted = _wanted(request, options, served, tensors)
    condition = request.headers.get("if-match")
    if condition is not None and not names_digest("If-Match", condition, served.digest, weak=False):
        hint = "Read the card again: this is another teacher now."
        raise Problem(412, "If-Match", "must name this teacher's digest", condition, hint)
    deadline = deadline_of(request, arrived)
    try:
        async with asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic()):
            views_BCHW, resized = await _views(request, service.settings, served, batcher, media_type)
            asked, digests = Asked.predict(name, wanted), partial(image_digests, views_BCHW)
            await admit(request, service.books, asked, len(views_BCHW), digests)
            # Hashing a large body would keep the event loop from everyone else.
            identity = await asyncio.to_thread(wire.identity_of, views_BCHW)
            found = await _ask(
                request, batcher.submit(views_BCHW, wanted.fields, caller_of(request).name, deadline, identity)
            )
    except (TimeoutError, Expired):
        hint = "Allow more time, or send fewer images."
        raise Problem(504, "X-Deadline-Ms", "passed before the answer was there", "late", hint) from None
    except QueueFull as full:
        headers = {"Retry-After": str(full.retry_after)}
        raise Problem(503, "queue", "must have room", "full", "Try again later.", headers) from None
    return await asyncio.to_thread(_response, found, served, wanted, resized, tensors)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _teacher(request: Request, service: Service, name: str) -> ServedTeacher:
    # First: a key that may ask some teachers only learns nothing of others, not even whether they are there.
    require(service.books, visit_of(request), Asked(teacher=name))
    if name not in service.teachers:
        hint = f"Served here: {', '.join(service.teachers)}."
        raise Problem(404, "teacher", "must be one that is served here", name, hint)
    return service.teachers[name]


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


async def _views(
    request: Request, settings: Settings, served: ServedTeacher, batcher: Batcher, media_type: str
) -> tuple[Tensor, bool]:
    """The body as uint8 [N, C, H, W], and whether it was resized. Decoding leaves the event loop free."""
    data = await read_body(request, settings)
    batcher.require_room(caller_of(request).name, 1)
    if media_type != wire.MEDIA_TYPE:
        return await asyncio.to_thread(images.decode, data, media_type, served.view_shape, settings.max_pixels)
    try:
        views_BCHW = await asyncio.to_thread(wire.unpack_images, data, served.view_shape)
    except wire.WireError as error:
        hint = "See `input` in the teacher's card."
        raise Problem(422, error.field, error.rule, error.value, hint) from None
    if len(views_BCHW) > settings.max_images:
        rule, hint = f"must hold at most {settings.max_images}", "Send several requests."
        raise Problem(413, "images", rule, len(views_BCHW), hint)
    return views_BCHW, False


async def _ask(request: Request, asked: Future[Fields]) -> Fields:
    """Waits for the model; a client that hangs up, or a deadline that passes, takes its work out of the queue."""
    answer = asyncio.wrap_future(asked)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        either: list[asyncio.Future[Any]] = [answer, gone]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Problem(408, "connection", "must stay open until the answer", "closed", "Ask again.")
        return answer.result()
    except TeacherFailed:
        hint = "The images of other requests are not affected. Report the request_id."
        raise Problem(500, "teacher", "must answer these images", "it failed on them", hint) from None
    except asyncio.CancelledError:
        if not answer.cancelled():
            raise
        headers = {"Retry-After": "1"}
        raise Problem(503, "server", "must be running", "stopping", "Try again.", headers) from None
    finally:
        gone.cancel()
        answer.cancel()


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(fields: Fields, served: ServedTeacher, wanted: Wanted, resized: bool, tensors: bool) -> Response:
    answer = answers.transform(fields, wanted)
    if tensors:
        body = wire.pack_tensors(answer, answers.metadata(served, wanted, resized))
        return LargeResponse([body], wire.MEDIA_TYPE)
    return LargeResponse(answers.as_json(answer, served, wanted, resized), "application/json")
