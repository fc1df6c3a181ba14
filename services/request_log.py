"""One line for each request: who asked what, what became of it, how long it took. Never a payload."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

from services.identity import OPEN_PATHS
from services.visit import UNROUTED, Visit

_log, _defects = logging.getLogger("services.requests"), logging.getLogger("services")


def log_visit(visit: Visit) -> None:
    """Logs a request that is over.

    What a stranger chose is not among the facts: the route is its template, the method one of the known ones, the
    teacher one that is served, the key its name, and the request id well-formed.
    """
    # Whoever watches a server asks its probes and its load every second: a good answer is not worth a line each time.
    watches = visit.route in OPEN_PATHS or not visit.listed
    level = logging.DEBUG if watches and visit.answered else logging.INFO
    if not _log.isEnabledFor(level):
        return
    parts = " ".join(f"{part}={seconds * 1000:.1f}" for part, seconds in visit.spent.parts.items())
    _log.log(
        level,
        "%s %s %s %.1f ms%s",
        visit.method,
        visit.route or UNROUTED,
        "no answer" if visit.status is None else visit.status,
        visit.spent.total * 1000,
        f" ({parts})" if parts else "",
        extra={"facts": facts(visit)},
    )


def facts(visit: Visit) -> dict[str, Any]:
    """What the log knows of a request; what does not apply is None."""
    return {
        "request_id": visit.request_id,
        "key": None if visit.caller is None else visit.caller.name,
        "teacher": visit.teacher,
        "method": visit.method,
        "route": visit.route,
        "status": visit.status,
        "limit": visit.limit,
        "images": visit.images,
        "bytes_in": visit.bytes_in,
        "bytes_out": visit.bytes_out,
        "seconds": round(visit.spent.total, 6),
        "parts": {part: round(seconds, 6) for part, seconds in visit.spent.parts.items()},
        "cache_hits": visit.cache_hits,
        "cache_misses": visit.cache_misses,
    }


class Apart(Exception):  # noqa: N818 - never raised, only a cause
    """Where in another process an error was raised, as `frames_of` tells it there."""

    def __init__(self, at: tuple[str, ...]) -> None:
        self.at = at
        super().__init__(*at)


def frames_of(error: BaseException) -> list[str]:
    """Where an error was raised: file, line and function, outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


def log_failure(what: str, error: BaseException) -> None:
    """Logs an error that a request met: its type, and where. Its message, which may quote the request, at `debug`."""
    at = frames_of(error)
    if isinstance(error.__cause__, Apart):
        at += error.__cause__.at
    _defects.error("%s: %s in %s", what, type(error).__name__, at[-1], extra={"facts": {"at": at}})
    _defects.debug("%s: %r", what, error)


__all__ = ["Apart", "facts", "frames_of", "log_failure", "log_visit"]
