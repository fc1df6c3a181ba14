"""A façade of the Open Inference Protocol (v2), for programs that were written for other servers.

It takes the same way as `predict`: the same keys, limits, counts, plans and batches. Only what is sent looks otherwise.
"""

from __future__ import annotations

import asyncio
import difflib
import time
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from services import wire
from services.admission import caller_of
from services.asking import answered, ask_images
from services.body import read_body, require_json
from services.headers import deadline_of
from services.inference_answer import HEADER, Inferred, infer_response, require_named
from services.inference_body import FILES, Inference, cut, parse_inference, tensors_of
from services.options import PredictOptions
from services.predicting import desk_of, require_digest, wanted_of
from services.problems import Problem, request_id
from services.routes import require_alive, require_ready, service_of, teacher_of
from services.settings import Settings
from services.state import Service
from services.teachers import ServedTeacher
from services.upload import Upload, decoded, require_few

router = APIRouter()
_PACKAGE = "teacher-cache"
_MEDIA_TYPES = ("", "application/json", "application/octet-stream")
_OPTIONS = frozenset(PredictOptions.model_fields) - {"dtype"}


@router.get("/v2")
async def server_metadata() -> JSONResponse:
    """What this server is."""
    about = {"name": "teacher-serve", "version": version(_PACKAGE), "extensions": ["binary_tensor_data"]}
    return JSONResponse(about)


@router.get("/v2/health/live")
async def live(request: Request) -> JSONResponse:
    """As `livez`, but behind the key, as all routes are."""
    require_alive(service_of(request))
    return JSONResponse({"live": True})


@router.get("/v2/health/ready")
async def ready(request: Request) -> JSONResponse:
    """As `readyz`."""
    await service_of(request).look_again()
    require_ready(service_of(request).not_ready())
    return JSONResponse({"ready": True})


@router.get("/v2/models/{name}")
async def model_metadata(name: str, request: Request) -> JSONResponse:
    """What a teacher takes, and what it answers to this key where nothing else is asked for."""
    service = service_of(request)
    served = teacher_of(request, service, name)
    card = served.card(service.settings, caller_of(request).policy)
    images = {"name": "images", "datatype": "UINT8", "shape": [-1, *card.input.shape]}
    fields = [one for one in card.fields if one != "logits" or "logits" in card.outputs]
    outputs = [{"name": one, "datatype": "FP32", "shape": [-1, *card.fields[one].shape]} for one in fields]
    outputs.append({"name": "status", "datatype": "UINT8", "shape": [-1]})
    return JSONResponse({"name": name, "platform": "teacher-serve", "inputs": [images], "outputs": outputs})


@router.get("/v2/models/{name}/ready")
async def model_ready(name: str, request: Request) -> JSONResponse:
    """Whether one teacher is warm."""
    service = service_of(request)
    served = teacher_of(request, service, name)
    reasons = ["draining"] if service.draining else []
    reasons += [] if service.batchers[served.name].warm else [f"{name} is not warm"]
    require_ready([*reasons, *([f"the cache of {name} cannot be read"] if name in service.unreadable else [])])
    return JSONResponse({"name": name, "ready": True})


@router.post("/v2/models/{name}/infer")
async def infer(name: str, request: Request) -> Response:
    """Images, or files, to logits, probabilities, the top k, named classes, or features."""
    arrived = time.monotonic()
    service = service_of(request)
    served = teacher_of(request, service, name)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in _MEDIA_TYPES:
        raise Problem(415, "Content-Type", f"must be {' or '.join(_MEDIA_TYPES[1:])}", media_type, "Send one of them.")
    if request.query_params:
        hint = "Send it in the request's `parameters`."
        raise Problem(400, next(iter(request.query_params)), "is not taken from the URL", "an option", hint)
    require_digest(request, served)
    deadline = deadline_of(request, arrived)
    read = partial(_read, request, service, served, deadline)
    question, answer = await answered(request, service, read, deadline)
    return await asyncio.to_thread(infer_response, answer, served, question, request_id(request))


async def _read(request: Request, service: Service, served: ServedTeacher, deadline: float) -> Inferred:
    text, behind = cut(await read_body(request, service.settings), request.headers.get(HEADER))
    require_json(text, service.settings)
    inference = await asyncio.to_thread(parse_inference, text)
    if inference.model_name not in (None, served.name):
        raise Problem(400, "model_name", f"must be {served.name}, as in the URL", "another", "Leave it out.")
    options = _options(inference, served)
    desk = desk_of(request, served, wanted_of(request, options, served, tensors=True), options, deadline)
    require_named(inference, desk.wanted, files=any(sent.datatype == FILES for sent in inference.inputs))
    desk.require_room()
    upload = await asyncio.to_thread(_upload, inference, behind, served, service.settings)
    question = await ask_images(request, service, desk, upload)
    return Inferred(**{field.name: getattr(question, field.name) for field in fields(question)}, inference=inference)


def _options(asked: Inference, served: ServedTeacher) -> PredictOptions:
    """The request's parameters; features are also asked for by wanting them, as everywhere in this protocol."""
    given: dict[str, Any] = {name: value for name, value in asked.parameters.items() if name != "binary_data_output"}
    unknown = next((name for name in given if name not in _OPTIONS), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, sorted(_OPTIONS), n=1) or [", ".join(sorted(_OPTIONS))]
        raise Problem(400, unknown, "is not a known parameter", "an unknown one", f"Did you mean `{near[0]}`?")
    fields = [one.name for one in asked.outputs if one.name in served.field_shapes]
    if fields:
        given.setdefault("fields", ",".join(fields))
    try:
        # Who asks this way looks for values, and not for a status that tells of none.
        return PredictOptions.model_validate({"strict": True, **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        hint = "Correct it; the teacher's card lists outputs, fields and limits."
        raise Problem(400, str(first["loc"][0]), str(first["msg"]), first.get("input"), hint) from None


def _upload(asked: Inference, behind: memoryview, served: ServedTeacher, settings: Settings) -> Upload:
    tensors = tensors_of(asked, behind, settings.max_images)
    images, classes = tensors.pop("images", None), tensors.pop("classes", None)
    hint = "See GET /v2/models/<name> for what it takes."
    if images is None or tensors:
        rule = "must be `images`, and `classes` where they are gathered"
        raise Problem(422, "inputs", rule, next(iter(tensors), "no images"), hint)
    if isinstance(classes, list):
        raise Problem(422, "classes", "must be INT32 or INT64", "BYTES", hint)
    if isinstance(images, list):
        return decoded(images, served, settings, classes)
    require_few(len(images), settings)
    try:
        return Upload(wire.as_views(images, served.view_shape), classes_NK=classes)
    except wire.WireError as error:
        raise Problem(422, error.field, error.rule, error.value, hint) from None
