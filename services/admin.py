"""The port for whoever runs a server, on loopback only: metrics, load, drain, keys.

Loopback keeps other machines out. It keeps out neither other users of this one nor the pages in a browser on it: so
whoever changes something shows a token, which lies in the state folder and is readable by its owner only, and whatever
a browser would send is refused.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import secrets
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from services import keys
from services.identity import LOCAL_NAMES, host_name
from services.metrics import Metrics
from services.policy import Policy
from services.problems import Problem, install, request_id
from services.state import Service
from services.state_folder import StateFolder, write_private
from teacher_cache.errors import SpecError
from teacher_cache.spec import parse

_log = logging.getLogger("services")


class NewKey(BaseModel):
    """`POST /keys`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    policy: dict[str, Any] = {}
    """As in `teacher-serve keys add --set`; without limits it may ask everything."""


class Admin:
    """The endpoints of one server."""

    def __init__(self, service: Service, metrics: Metrics, drain: Callable[[], None]) -> None:
        """Writes a new token, where there is a state folder.

        Args:
            service: what is served.
            metrics: its figures.
            drain: begins the way out, as SIGTERM does; may be called again.

        Raises:
            SpecError: the folder cannot be written.
        """
        self._service, self._metrics, self._drain = service, metrics, drain
        self._folder = None if service.settings.state is None else StateFolder(service.settings.state)
        self._token = secrets.token_urlsafe(32)
        if self._folder is not None:
            write_private(self._folder.admin_token, f"{self._token}\n".encode())

    def app(self) -> FastAPI:
        """The application; served on loopback, beside the other."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        owner = [Depends(self._require_owner)]
        app.add_api_route("/metrics", self._text, methods=["GET"])
        app.add_api_route("/load", self._load, methods=["GET"])
        app.add_api_route("/drain", self._leave, methods=["POST"], status_code=202, dependencies=owner)
        app.add_api_route("/keys", self._list, methods=["GET"], dependencies=owner)
        app.add_api_route("/keys", self._add, methods=["POST"], dependencies=owner, response_model=None)
        app.add_api_route("/keys/{name}", self._revoke, methods=["DELETE"], dependencies=owner)
        install(app)
        app.add_exception_handler(SpecError, _refused)
        app.add_middleware(LocalOnly)
        return app

    def _require_owner(self, request: Request) -> None:
        if self._folder is None:
            hint = "Serve with --state FOLDER; to end a server without one, send it SIGTERM."
            raise Problem(403, "state", "is needed to know who may change something", "none", hint)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token.encode()):
            hint = "Send `Authorization: Bearer <token>`; it is in the state folder, and a new one at each start."
            headers = {"WWW-Authenticate": "Bearer"}
            raise Problem(401, "Authorization", "must carry the token of admin.token", "(hidden)", hint, headers)

    @property
    def _owned(self) -> StateFolder:
        assert self._folder is not None, "only its owner comes this far"
        return self._folder

    def _text(self, request: Request) -> Response:
        """What Prometheus reads."""
        text, media_type = self._metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": media_type})

    async def _load(self) -> dict[str, Any]:
        """How busy it is, for people and for scripts."""
        service = self._service
        teachers = {
            name: {"images_waiting": batcher.waiting, "warm": batcher.warm}
            for name, batcher in service.batchers.items()
        }
        return {"draining": service.draining, "not_ready": service.not_ready(), "teachers": teachers}

    async def _leave(self) -> dict[str, str]:
        """Takes no more after a while, finishes what was taken, and ends."""
        _log.info("asked to drain at the admin port")
        self._drain()
        return {"status": "draining"}

    # Plain functions: they wait for locks and disks, and so run in threads.
    def _list(self) -> list[dict[str, Any]]:
        return keys.listed(self._owned, datetime.now(UTC))

    def _add(self, new: NewKey) -> JSONResponse:
        key = keys.add(self._owned, new.name, parse(Policy, new.policy, "the policy"))
        _log.info("key %s was added at the admin port", new.name)
        return JSONResponse({"name": new.name, "key": key}, 201, {"Cache-Control": "no-store"})

    def _revoke(self, name: str) -> dict[str, Any]:
        revoked = keys.revoke(self._owned, name)
        _log.info("key %s was revoked at the admin port", name)
        return {"name": name, "revoked": revoked}


class LocalOnly:
    """Refuses what did not come from a program on this machine, before anything is routed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
            problem = _stranger(scope)
            if problem is not None:
                await problem.response(scope["state"]["request_id"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _stranger(scope: Scope) -> Problem | None:
    headers, client = Headers(scope=scope), scope.get("client")
    if client is None or not ipaddress.ip_address(client[0]).is_loopback:
        return Problem(403, "address", "must be of this machine", client and client[0], "Log in there.")
    if host_name(headers.get("host", "")) not in LOCAL_NAMES:
        # A page whose name was made to point here (DNS rebinding) still sends its own name.
        return Problem(403, "Host", f"must be {', '.join(LOCAL_NAMES)}", "another name", "Use one of them.")
    if "origin" in headers or headers.get("sec-fetch-site", "none") != "none":
        return Problem(403, "Origin", "must not be a page in a browser", "(hidden)", "Ask with a program.")
    return None


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SpecError), "registered for it only"
    status = 404 if request.method == "DELETE" and error.field == "name" else 422
    return Problem(status, error.field, error.rule, error.value, error.hint).response(request_id(request))


__all__ = ["Admin"]
