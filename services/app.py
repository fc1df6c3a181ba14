"""The application: identity of each request, policy, problems, and the life of the teachers' threads."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import page, predicting, routes
from services.admission import require
from services.books import Books, Unrecorded, Visit
from services.policy import Asked
from services.problems import Problem, install, internal, unrecorded
from services.settings import Settings
from services.state import make_service
from services.teachers import ServedTeacher

_log = logging.getLogger("services")
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
    if settings.page:
        app.include_router(page.router())
    install(app)
    app.add_middleware(Gate, books=service.books)
    return app


class Gate:
    """What every request passes first and every answer last.

    Gives the request its id, lets nobody in without a key before anything is parsed or routed, turns what nobody
    caught into a problem that tells nothing, and has the books written before an answer leaves.
    """

    def __init__(self, app: ASGIApp, books: Books) -> None:
        self._app, self._books = app, books

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        visit = Visit(asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex)
        scope.setdefault("state", {}).update(request_id=visit.request_id, visit=visit)
        door = _Door(self._books, visit, scope, send)
        try:
            try:
                await self._enter(scope, receive, door)
            except Problem as problem:
                await problem.response(visit.request_id)(scope, receive, door.send)
            except (ClientDisconnect, Unrecorded):
                raise
            except Exception:
                _log.exception("request %s failed", visit.request_id)
                if not door.opened:
                    await internal().response(visit.request_id)(scope, receive, door.send)
        except ClientDisconnect:
            _log.info("request %s: the client hung up", visit.request_id)
        except Unrecorded as error:
            _log.error("request %s was not answered, because it cannot be recorded: %s", visit.request_id, error)
            await unrecorded().response(visit.request_id)(scope, receive, door.send_unrecorded)
        finally:
            self._books.release(visit)

    async def _enter(self, scope: Scope, receive: Receive, door: _Door) -> None:
        authorization = Headers(scope=scope).get("authorization", "").encode("latin-1")
        visit = door.visit
        visit.caller = await self._books.doorkeeper.identify(scope["path"], authorization)
        require(self._books, visit, Asked())
        await self._app(scope, receive, door.send)


class _Door:
    """Where an answer leaves."""

    def __init__(self, books: Books, visit: Visit, scope: Scope, send: Send) -> None:
        self._books, self.visit, self._scope, self._send = books, visit, scope, send
        self.opened = False
        """Whether an answer has begun to leave."""

    async def send(self, message: Message) -> None:
        """ASGI's `send`, once the books are written."""
        if message["type"] == "http.response.start" and self._scope["path"] not in self._books.doorkeeper.open_paths:
            self.visit.route = getattr(self._scope.get("route"), "path", None)
            await self._books.record(self.visit, message["status"])
        await self.send_unrecorded(message)

    async def send_unrecorded(self, message: Message) -> None:
        """ASGI's `send`, with the request's id."""
        if message["type"] == "http.response.start":
            self.opened = True
            MutableHeaders(scope=message)["X-Request-Id"] = self.visit.request_id
        await self._send(message)


__all__ = ["create_app"]
