"""The endpoints: the probes, the cards, what a key has used, and predict."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.admission import caller_of, require, visit_of
from services.headers import names_digest
from services.load import SECONDS
from services.policy import Asked, Policy
from services.problems import Problem
from services.schemas import LoadReport, Probe, TeacherCard, TeacherList, TeacherLoad, UsageReport
from services.state import Service
from services.teachers import ServedTeacher

router = APIRouter()
PREDICT = "/v1/teachers/{name}/predict"
"""Where questions are asked: what the router, the OpenAPI document and the turnstile know it by."""


@router.get("/livez")
async def livez(request: Request) -> Probe:
    """The process answers, and so will its threads; else only a new one helps."""
    require_alive(service_of(request))
    return Probe(status="live")


@router.get("/readyz")
async def readyz(request: Request) -> Probe:
    """Teachers are warm, queues under the mark, answers can be recorded, and the server is not on its way out."""
    service = service_of(request)
    await service.look_again()
    require_ready(service.not_ready())
    return Probe(status="ready")


@router.get("/v1/teachers")
async def teachers(request: Request) -> TeacherList:
    """The cards of all teachers that this key may ask."""
    service, policy = service_of(request), caller_of(request).policy
    return TeacherList(teachers=tuple([await _card(service, one, policy) for one in _allowed(service, policy)]))


@router.get("/v1/usage")
async def usage(request: Request) -> UsageReport:
    """What this key has used, and what is left of its budgets."""
    return await service_of(request).books.report(caller_of(request))


@router.get("/v1/load")
async def load(request: Request) -> LoadReport:
    """How busy the teachers are that this key may ask; made to be asked for each second."""
    visit_of(request).listed = False
    service, policy = service_of(request), caller_of(request).policy
    found = tuple(_load(service, served) for served in _allowed(service, policy))
    return LoadReport(seconds=SECONDS, draining=service.draining, teachers=found)


@router.get("/v1/teachers/{name}", response_model=TeacherCard)
async def card(name: str, request: Request) -> Response:
    """One card; its ETag is the teacher's digest."""
    service = service_of(request)
    served = teacher_of(request, service, name)
    headers = {"ETag": f'"{served.digest}"'}
    known = request.headers.get("if-none-match")
    if known is not None and names_digest("If-None-Match", known, served.digest, weak=True):
        return Response(status_code=304, headers=headers)
    found = await _card(service, served, caller_of(request).policy)
    return JSONResponse(found.model_dump(mode="json"), headers=headers)


async def _card(service: Service, served: ServedTeacher, policy: Policy) -> TeacherCard:
    dataset = None if served.library is None else await service.read(served.name, served.library.card)
    return served.card(service.settings, policy, dataset)


def require_alive(service: Service) -> None:
    """Raises a 503 `Problem` where a thread has died."""
    if dead := service.dead():
        hint = "Start it again; its log says why."
        raise Problem(503, "server", "must be alive", f"{', '.join(dead)} has died", hint)


def require_ready(reasons: Sequence[str]) -> None:
    """Raises a 503 `Problem` with the reasons why no traffic should be sent here, where there are some."""
    if reasons:
        raise Problem(503, "server", "must be ready", "; ".join(reasons), "Try again.", {"Retry-After": "1"})


def service_of(request: Request) -> Service:
    """What the application serves."""
    service: Service = request.app.state.service
    return service


def _allowed(service: Service, policy: Policy) -> list[ServedTeacher]:
    return [one for one in service.teachers.values() if policy.teachers is None or one.name in policy.teachers]


def _load(service: Service, served: ServedTeacher) -> TeacherLoad:
    batcher = service.batchers[served.name]
    pace = batcher.load.pace()
    return TeacherLoad(
        name=served.name,
        images_waiting=batcher.waiting,
        queue_images=batcher.queue_images,
        images_per_second=pace.images_per_second,
        batch_fill=pace.fill(served.micro_batch),
    )


def teacher_of(request: Request, service: Service, name: str) -> ServedTeacher:
    """The teacher that a path names; raises 403 or 404 `Problem`."""
    # First: a key that may ask some teachers only learns nothing of others, not even whether they are there.
    require(service.books, visit_of(request), Asked(teacher=name))
    if name not in service.teachers:
        hint = f"Served here: {', '.join(service.teachers)}."
        raise Problem(404, "teacher", "must be one that is served here", name, hint)
    visit_of(request).teacher = name
    return service.teachers[name]
