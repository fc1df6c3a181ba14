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

from services.policy import require_allowed
from services.problems import Problem, install, internal
from services.routes import router
from services.settings import Settings
from services.state import make_service
from services.teachers import ServedTeacher

_log = logging.getLogger("services")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def create_app(teachers: Mapping[str, ServedTeacher], settings: Settings) -> FastAPI:
    """An ASGI application that serves these teachers; their threads live as long as its lifespan.

    Args:
        teachers: by the name in their URL.
        settings: limits and key.

    Raises:
        SpecError: there is no teacher, or one that does not fit the limits.
    """
    service = make_service(teachers, settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        for batcher in service.batchers.values():
            batcher.start()
        yield
        service.draining = True
        for batcher in service.batchers.values():
            await asyncio.to_thread(batcher.stop)

    # The interactive pages of FastAPI load scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="teacher-serve", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(router)
    install(app)
    app.add_middleware(Gate, settings=settings)
    return app


class Gate:
    """What every request passes first and every answer last.

    Gives the request its id, asks the policy before anything is parsed or routed, and turns what nobody caught
    into a problem that tells nothing.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            authorization = headers.get("authorization", "").encode("latin-1")
            require_allowed(self._settings, scope["path"], authorization)
            await self._app(scope, receive, send_with_id)
        except Problem as problem:
            await problem.response(request_id)(scope, receive, send_with_id)
        except ClientDisconnect:
            _log.info("request %s: the client hung up", request_id)
        except Exception:
            _log.exception("request %s failed", request_id)
            if not started:
                await internal().response(request_id)(scope, receive, send_with_id)


__all__ = ["create_app"]
