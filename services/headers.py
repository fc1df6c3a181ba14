"""The request headers that the service reads, each parsed or refused."""

from __future__ import annotations

import math
import re

from fastapi import Request

from services import images, naming, wire
from services.problems import Problem

_ETAG = re.compile(r'(?:W/)?"([\x21\x23-\x7e]*)"')
MILLISECONDS = r"[1-9][0-9]{0,8}"
"""What a deadline may be written as."""


def media_type_of(request: Request, *, named: bool) -> str:
    """The kind of the body, one that the service takes; raises a 415 `Problem`.

    Args:
        request: whose header it is.
        named: whether samples may be named, in JSON.
    """
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    taken = (wire.MEDIA_TYPE, *images.FORMATS, *([naming.MEDIA_TYPE] if named else []))
    if found not in taken:
        rule = f"must be {', '.join(taken)}"
        raise Problem(415, "Content-Type", rule, found or "none", "Send one of them.")
    return found


def answers_tensors(request: Request, media_type: str) -> bool:
    """What `Accept` names; where it names neither kind, the kind of the request."""
    accepted = [item.partition(";")[0].strip().lower() for item in request.headers.get("accept", "").split(",")]
    if wire.MEDIA_TYPE in accepted or "application/json" in accepted:
        return wire.MEDIA_TYPE in accepted
    return media_type == wire.MEDIA_TYPE


def names_digest(field: str, header: str, digest: str, *, weak: bool) -> bool:
    """Whether a list of entity tags names the digest (RFC 9110, 13.1); a weak tag never does for If-Match.

    Raises:
        Problem: 400, the header is neither a list of quoted tags nor `*`.
    """
    if header.strip() == "*":
        return True
    tags = [item.strip() for item in header.split(",")]
    if not all(_ETAG.fullmatch(tag) for tag in tags):
        raise Problem(400, field, "must be quoted digests, or *", header, f'For example {field}: "{digest}".')
    return any(tag.removeprefix("W/" if weak else "") == f'"{digest}"' for tag in tags)


def deadline_of(request: Request, arrived: float) -> float:
    """When the answer is of no use any more, on the clock of `arrived` (seconds); inf where it always is.

    Raises:
        Problem: 400, the header is not a number of milliseconds.
    """
    return deadline_in(request.headers.get("x-deadline-ms"), arrived)


def deadline_in(header: str | None, arrived: float) -> float:
    """The same, of the header alone."""
    if header is None:
        return math.inf
    if not re.fullmatch(MILLISECONDS, header):
        hint = "Send the time that you will still wait, for example 500."
        raise Problem(400, "X-Deadline-Ms", "must be whole milliseconds above 0", header, hint)
    return arrived + int(header) / 1000
