"""Errors on the wire: `application/problem+json` (RFC 9457), with the product's own four parts as members.

`type` is `about:blank`, so the title is the status's phrase; field, rule, value and hint say the rest. Never a
traceback, a path of this machine, or what was in the body.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from services.options import PredictOptions
from services.scribe import RETRY_SECONDS

MEDIA_TYPE = "application/problem+json"
_LONGEST_VALUE = 80


class Problem(Exception):  # noqa: N818 - RFC 9457's word
    """A request that ends here.

    Args:
        status: of the answer.
        field: the header, option or part of the body that it is about.
        rule: the rule that does not hold.
        value: what was found; never content of the body.
        hint: what to do next.
        headers: to be sent with it (Retry-After, WWW-Authenticate, Allow).
    """

    def __init__(
        self,
        status: int,
        field: str,
        rule: str,
        value: object,
        hint: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        text = str(value)
        self.value = text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
        self.status, self.field, self.rule, self.hint = status, field, rule, hint
        self.headers = dict(headers or {})
        super().__init__(status, field, rule, self.value, hint)

    def response(self, request_id: str) -> JSONResponse:
        """The answer that says so."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": f"{self.field}: {self.rule} (found: {self.value}). {self.hint}",
            "field": self.field,
            "rule": self.rule,
            "value": self.value,
            "hint": self.hint,
            "request_id": request_id,
        }
        return _ProblemResponse(body, self.status, self.headers, media_type=MEDIA_TYPE)


class _ProblemResponse(JSONResponse):
    """A problem, with one member more where it leaves by a route of the Open Inference Protocol."""

    def render(self, content: Any) -> bytes:
        """Keeps the members, because only the scope knows the route."""
        self._members: dict[str, Any] = content
        return super().render(content)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["path"] == "/v2" or scope["path"].startswith("/v2/"):
            self.body = self.render({**self._members, "error": self._members["detail"]})
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def internal() -> Problem:
    """A defect of ours: what happened is in the server's log, under the request's id."""
    hint = "Report the request_id to whoever runs this server."
    return Problem(500, "server", "could not answer", "an internal error", hint)


def no_room(retry_after: int) -> Problem:
    """Too much waits for the model; there may be room after so many seconds."""
    headers = {"Retry-After": str(retry_after)}
    return Problem(503, "queue", "must have room", "full", "Try again later.", headers)


def unrecorded() -> Problem:
    """The books could not be written, so nothing is answered; what is wrong with the disk is in the server's log."""
    hint = "Whoever runs this server has to see to its disk."
    return Problem(
        503, "server", "must record an answer before it leaves", "it cannot", hint, {"Retry-After": str(RETRY_SECONDS)}
    )


def install(app: FastAPI) -> None:
    """Makes every refusal a problem, including those of the framework."""
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(RequestValidationError, _validation)


def request_id(request: Request) -> str:
    """The id that `app` gave the request."""
    return str(request.scope.get("state", {}).get("request_id", ""))


async def _problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem), "registered for problems only"
    return error.response(request_id(request))


async def _framework(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "registered for it only"
    known = {404: ("path", "is not one of this service"), 405: ("method", "is not offered at this path")}
    field, rule = known.get(error.status_code, ("request", "was refused"))
    value = request.method if error.status_code == 405 else request.url.path
    hint = "See GET /v1/teachers for what is served."
    return Problem(error.status_code, field, rule, value, hint, error.headers).response(request_id(request))


async def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "registered for it only"
    first = error.errors()[0]
    where, name = str(first["loc"][0]), str(first["loc"][-1])
    rule, hint = str(first["msg"]), "Correct it; the teacher's card lists outputs, fields and limits."
    if first["type"] == "extra_forbidden":
        known = sorted(PredictOptions.model_fields)
        near = difflib.get_close_matches(name, known, n=1)
        rule, hint = "is not a known option", f"Did you mean `{(near or [', '.join(known)])[0]}`?"
    status = 400 if where == "query" else 422
    return Problem(status, name, rule, first.get("input"), hint).response(request_id(request))
