"""Questions: by image or by name, from the cache or from the model, and what the cache has."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from services import naming
from services.admission import caller_of, require, visit_of
from services.answering import Desk
from services.asking import Question, answered, ask_images, ask_named, asked_by_name, classes_of, in_time
from services.beside import beside
from services.body import read_body, require_json
from services.classes import with_classes
from services.headers import answers_tensors, deadline_of, media_type_of, names_digest
from services.naming import parse_named
from services.options import FormOptions, OptionError, PredictOptions, Wanted, resolve
from services.planning_named import look_up
from services.problems import Problem
from services.responding import respond
from services.routes import PREDICT, service_of, teacher_of
from services.schemas import Lookup, Predictions
from services.state import Service
from services.status import Status
from services.teachers import ServedTeacher
from services.upload import size_of, uploaded

router = APIRouter()


@router.post(PREDICT, response_model=Predictions)
async def predict(name: str, request: Request, options: Annotated[PredictOptions, Query()]) -> Response:
    """Images, files, or names of samples: to logits, probabilities, the top k, named classes, or features."""
    arrived = time.monotonic()
    service, visit = service_of(request), visit_of(request)
    served = teacher_of(request, service, name)
    media_type = media_type_of(request, named=served.library is not None)
    tensors = answers_tensors(request, media_type)
    _require_once(request)
    wanted = wanted_of(request, options, served, tensors)
    require_digest(request, served)
    deadline = deadline_of(request, arrived)
    desk = desk_of(request, served, wanted, options, deadline)
    read = partial(_read, request, service, desk, media_type)
    question, answer = await answered(request, service, read, deadline)
    policy = caller_of(request).policy
    with visit.spent.on("encode"):
        work = partial(respond, answer, served, question, policy, tensors)
        return await beside(work, answer.size, as_json=not tensors)


@router.post("/v1/teachers/{name}/lookup")
async def lookup(name: str, request: Request, options: Annotated[FormOptions, Query()]) -> Lookup:
    """Which samples have an answer in the cache, which the model would be asked about, and which have none."""
    arrived, service = time.monotonic(), service_of(request)
    served = teacher_of(request, service, name)
    if media_type_of(request, named=served.library is not None) != naming.MEDIA_TYPE:
        raise Problem(415, "Content-Type", f"must be {naming.MEDIA_TYPE}", "another", "Send keys and views.")
    assert served.library is not None, "its media type was taken"
    _require_once(request)
    # Whatever may be predicted may be looked up.
    wanted = wanted_of(request, options, served, tensors=True)
    require_digest(request, served)
    async with in_time(deadline_of(request, arrived)):
        data = await read_body(request, service.settings)
        require_json(data, service.settings)
        named = await asyncio.to_thread(parse_named, data, service.settings.max_images)
        classes_NK = await asyncio.to_thread(classes_of, named)
        wanted = with_classes(wanted, classes_NK, len(named.keys), served.classes)
        require(service.books, visit_of(request), asked_by_name(served.library, name, wanted, named))
        most, kept = service.settings.max_images, service.kept is not None
        found = await service.read(name, partial(look_up, served, named, wanted, most=most, rendered=kept))
        desk = desk_of(request, served, wanted, PredictOptions(cache="only"), math.inf)
        status = await asyncio.to_thread(desk.looked_up, found)
    shown = tuple("computable" if one is Status.ABSENT else one.shown for one in status)
    return Lookup(teacher=name, digest=served.digest, status=shown)


async def _read(request: Request, service: Service, desk: Desk, media_type: str) -> Question:
    spent = visit_of(request).spent
    # Before the body is in memory, and once more before it is decoded: a slow one may find the room gone.
    desk.require_room()
    with spent.on("body"):
        data = await read_body(request, service.settings)
    desk.require_room()
    if media_type == naming.MEDIA_TYPE:
        require_json(data, service.settings)
        with spent.on("decode"):
            named = await asyncio.to_thread(parse_named, data, service.settings.max_images)
        return await ask_named(request, service, desk, named)
    with spent.on("decode"):
        work = partial(uploaded, data, media_type, desk.served, service.settings)
        upload = await beside(work, size_of(data, media_type))
    return await ask_images(request, service, desk, upload)


def desk_of(request: Request, served: ServedTeacher, wanted: Wanted, options: PredictOptions, deadline: float) -> Desk:
    """Where a question with these options is answered; raises a 400 `Problem` for a refresh without a journal."""
    service, caller = service_of(request), caller_of(request).name
    if options.cache == "refresh" and service.kept is None:
        raise Problem(400, "cache", "refresh needs a journal", "refresh", "Ask without it: nothing is kept here.")
    batcher = service.batchers[served.name]
    return Desk(served, batcher, service.kept, wanted, options.cache, options.strict, caller, deadline)


def wanted_of(request: Request, options: FormOptions, served: ServedTeacher, tensors: bool) -> Wanted:
    """What the options ask of this teacher, for this key.

    Args:
        request: whose key sets the rounding.
        options: as asked.
        served: the teacher.
        tensors: whether the answer can carry features, and numbers of other types.

    Raises:
        Problem: 400, an option does not fit.
    """
    try:
        wanted = resolve(options, dict(served.field_shapes), tensors)
    except OptionError as error:
        raise Problem(400, error.field, error.rule, error.value, error.hint) from None
    return replace(wanted, rounding=caller_of(request).policy.rounding)


def _require_once(request: Request) -> None:
    names = [name for name, _ in request.query_params.multi_items()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Problem(400, twice, "must be given once", f"{names.count(twice)} times", "Give it once.")


def require_digest(request: Request, served: ServedTeacher) -> None:
    """Raises a 412 `Problem` where If-Match names another teacher than this one."""
    condition = request.headers.get("if-match")
    if condition is not None and not names_digest("If-Match", condition, served.digest, weak=False):
        hint = "Read the card again: this is another teacher now."
        raise Problem(412, "If-Match", "must name this teacher's digest", condition, hint)
