"""What `/openapi.json` says beyond what the framework can see: bodies that are not JSON, keys, headers, problems."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from services import images, naming, problems, wire
from services.headers import MILLISECONDS
from services.identity import OPEN_PATHS
from services.inference_body import Inference
from services.naming import Named
from services.routes import PREDICT
from services.settings import Settings

_LOOKUP = "/v1/teachers/{name}/lookup"
_INFER = "/v2/models/{name}/infer"
_QUESTIONS = {PREDICT: "Named", _LOOKUP: "Named", _INFER: "Inference"}
"""The paths that take questions, and what their JSON is."""
_BINARY = {"type": "string", "format": "binary"}
_TEXT = {"type": "string"}
_PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "RFC 9457, and what to do next.",
    "properties": {
        "type": {"const": "about:blank"},
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": _TEXT,
        "field": {**_TEXT, "description": "the header, option, limit or part of the body that it is about"},
        "rule": {**_TEXT, "description": "that does not hold"},
        "value": {**_TEXT, "description": "what was found; never content of the body"},
        "hint": {**_TEXT, "description": "what to do next"},
        "request_id": _TEXT,
    },
}
_PROBLEM["required"] = list(_PROBLEM["properties"])
_PROBLEMS = {
    "400": "An option or a header is malformed, unknown or without effect.",
    "401": "There is no key, or not one of this server's.",
    "403": "The key may not have it: `field` names the limit.",
    "404": "No such teacher, or no answer to any item where `status` would say so.",
    "408": "The body did not arrive in time.",
    "412": "The teacher is not the one that If-Match names.",
    "413": "Too many bytes, images or pixels.",
    "415": "The body is of a kind that is not taken.",
    "421": "Nobody needs a key here, and the request was meant for another machine.",
    "422": "The body is not what its kind says.",
    "429": "Your budget has no room; Retry-After says when it will have.",
    "500": "The teacher failed on these images, or its cache is not what was built.",
    "503": "We have no room, are not ready, or are on the way out.",
    "504": "The deadline passed, or would have before the answer was there.",
}
_RETRIED = ("429", "503")
_SENT = {
    "X-Request-Id": {"description": "that of the request, or a new one", "required": True, "schema": _TEXT},
    "Server-Timing": {"description": "where its time went, in ms", "required": True, "schema": _TEXT},
}


def describe(app: FastAPI, settings: Settings) -> None:
    """Has the document of an app say so."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        known = app.openapi_schema is not None
        document = generate()
        if not known:
            _complete(document, closed=settings.api_key is not None or settings.state is not None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way


def _complete(document: dict[str, Any], *, closed: bool) -> None:
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["schemas"] |= {"Problem": _PROBLEM, "Named": Named.model_json_schema(), **_inference()}
    if closed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete_operation(path, operation, closed and path not in OPEN_PATHS)


def _inference() -> dict[str, Any]:
    """The protocol's request, and what it is made of."""
    schema = Inference.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), "Inference": schema}


def _complete_operation(path: str, operation: dict[str, Any], closed: bool) -> None:
    found = {"503"} | ({"401", "403"} if closed else {"421"})
    headers = {"X-Request-Id": "names the request in the log, if it is plain"}
    if path in OPEN_PATHS:
        operation["security"] = []
    if "{name}" in path:
        found |= {"400", "404"}
    if path == "/v1/teachers/{name}":
        headers["If-None-Match"] = "digests that are known; 304 where it is one of them"
        operation["responses"]["304"] = {"description": "The card is the one that is known."}
    if path in _QUESTIONS:
        found |= set(_PROBLEMS) - {"401", "403", "421"}
        headers["If-Match"] = "the digest that the teacher must have"
        content = {naming.MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{_QUESTIONS[path]}"}}}
        operation["requestBody"] = {"required": True, "content": content}
    if path == PREDICT:
        operation["requestBody"]["content"] |= _content(wire.MEDIA_TYPE, *images.FORMATS)
        operation["responses"]["200"]["content"] |= _content(wire.MEDIA_TYPE)
    parameters = operation.setdefault("parameters", [])
    parameters += [_header(name, text, _TEXT) for name, text in headers.items()]
    if path in _QUESTIONS:
        schema = {**_TEXT, "pattern": f"^{MILLISECONDS}$"}
        parameters.append(_header("X-Deadline-Ms", "milliseconds that the client will still wait", schema))
    responses = operation["responses"]
    responses.pop("422", None)
    for status in sorted(found):
        responses[status] = _problem(status)
    for response in responses.values():
        response.setdefault("headers", {}).update(_SENT)


def _content(*media_types: str) -> dict[str, Any]:
    return {name: {"schema": _BINARY} for name in media_types}


def _header(name: str, text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": text, "schema": schema}


def _problem(status: str) -> dict[str, Any]:
    content = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    found = {"description": _PROBLEMS[status], "content": content}
    if status in _RETRIED:
        # Not required: after some of them waiting does not help.
        found["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
    return found
