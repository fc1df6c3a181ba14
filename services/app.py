"""The application: identity of each request, policy, problems, and the life of the teachers' threads."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import inference_routes, page, predicting, routes
from services.admission import require
from services.books import Books, Unrecorded
from services.metrics import Metrics
from services.openapi import describe
from services.policy import Asked
from services.problems import Problem, install, internal, unrecorded
from services.request_log import log_failure, log_visit
from services.settings import Settings
from services.state import Service, make_service
from services.teachers import ServedTeacher
from services.turnstile import Turnstile
from services.visit import Visit

_log = logging.getLogger("services")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def create_app(teachers: Mapping[str, ServedTeacher], settings: Settings, books: Books | None = None) -> FastAPI:
    """An ASGI application that serves these teachers; their threads live as long as its lifespan.

    Args:
        teachers: by the name in their URL.
        settings: limits, and where the keys are.
        books: opened with these settings, where that was done before; closed at the end of the lifespan.

    Raises:
        SpecError: there is no teacher, or one that does not fit the limits, or the keys cannot be read.
    """
    service = make_service(teachers, settings, books)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    # The interactive pages of FastAPI load scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="teacher-serve", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(routes.router)
    app.include_router(predicting.router)
    app.include_router(inference_routes.router)
    if settings.page:
        app.include_router(page.router())
    install(app)
    describe(app, settings)
    app.state.metrics = Metrics(service)
    app.add_middleware(Gate, service=service, metrics=app.state.metrics)
    return app


class Gate:
    """What every request passes first and every answer last.

    Gives the request its id, lets nobody in without a key before anything is parsed or routed, turns what nobody
    caught into a problem that tells nothing, and has the books written before an answer leaves.
    """

    def __init__(self, app: ASGIApp, service: Service, metrics: Metrics) -> None:
        self._app, self._service, self._books, self._metrics = app, service, service.books, metrics
        self._turnstile = Turnstile(service)
        # Not the system for each id: for it the interpreter is given up, and got back after a wait. Nor the state that
        # all share: a teacher's code may seed it.
        self._draw = random.Random()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        visit = Visit(asked if _REQUEST_ID.fullmatch(asked) else f"{self._draw.getrandbits(128):032x}")
        visit.method = scope["method"] if scope["method"] in _METHODS else "other"
        scope.setdefault("state", {}).update(request_id=visit.request_id, visit=visit)
        door = _Door(self._service, visit, scope, receive, send)
        self._metrics.in_flight.inc()
        try:
            await self._answer(scope, door)
        finally:
            self._books.release(visit)
            door.note_route()
            self._metrics.in_flight.dec()
            self._metrics.answered(visit)
            log_visit(visit)

    async def _answer(self, scope: Scope, door: _Door) -> None:
        request_id = door.visit.request_id
        try:
            try:
                await self._enter(scope, door)
            except Problem as problem:
                await problem.response(request_id)(scope, door.receive, door.send)
            except (ClientDisconnect, Unrecorded):
                raise
            except Exception as error:
                log_failure(f"request {request_id} failed", error)
                if door.visit.status is None:
                    await internal().response(request_id)(scope, door.receive, door.send)
        except ClientDisconnect:
            _log.info("request %s: the client hung up", request_id)
        except Unrecorded as error:
            _log.error("request %s was not answered, because it cannot be recorded: %s", request_id, error)
            await unrecorded().response(request_id)(scope, door.receive, door.send_unrecorded)

    async def _enter(self, scope: Scope, door: _Door) -> None:
        headers, visit = Headers(scope=scope), door.visit
        authorization = headers.get("authorization", "").encode("latin-1")
        visit.caller = await self._books.doorkeeper.identify(scope["path"], authorization, headers.get("host", ""))
        require(self._books, visit, Asked())
        self._turnstile.require_room(scope, headers, visit)
        await self._app(scope, door.receive, door.send)


class _Door:
    """Where a request's body comes in and its answer leaves."""

    def __init__(self, service: Service, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        self._service, self._books = service, service.books
        self.visit, self._scope, self._receive, self._send = visit, scope, receive, send

    def note_route(self) -> None:
        """The template that the router has found for this path, where there is one and it was asked."""
        self.visit.route = getattr(self._scope.get("route"), "path", self.visit.route)

    async def receive(self) -> Message:
        """ASGI's `receive`, counted."""
        message = await self._receive()
        self.visit.bytes_in += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """ASGI's `send`, once the books are written."""
        if message["type"] == "http.response.start" and self._scope["path"] not in self._books.doorkeeper.open_paths:
            self.note_route()
            with self.visit.spent.on("record"):
                await self._books.record(self.visit, message["status"])
        await self.send_unrecorded(message)

    async def send_unrecorded(self, message: Message) -> None:
        """ASGI's `send`, with the request's id and where its time went."""
        if message["type"] == "http.response.start":
            self.visit.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.visit.request_id
            headers["Server-Timing"] = self.visit.spent.header()
            if self._service.draining:
                # Whoever asks again on this connection might find it closed: on a new one he finds another server.
                headers["Connection"] = "close"
        else:
            self.visit.bytes_out += len(message.get("body", b""))
        await self._send(message)


__all__ = ["create_app"]
