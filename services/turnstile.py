"""Turns questions away before they are parsed, where only a model could answer them and it has no room.

Under overload most requests are refused: what a refusal costs, the model loses. So it comes before the framework's
routing and validation, which take longer than everything else in it; `Desk.require_room` refuses what needs to be
looked at first.
"""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import Scope

from services.admission import require
from services.headers import deadline_in
from services.policy import Asked
from services.problems import no_room
from services.routes import PREDICT
from services.state import Service
from services.teachers import ServedTeacher
from services.visit import Visit
from services.work import Expired, QueueFull

_WITHOUT_MODEL = b"cache=only"


class Turnstile:
    """Stands behind the door: who asks is known."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._teachers = {PREDICT.format(name=name): (name, one) for name, one in service.teachers.items()}

    def require_room(self, scope: Scope, headers: Headers, visit: Visit) -> None:
        """Lets a request pass, unless it is a question for which not even one image would be taken.

        Raises:
            Problem: 503 where there is no room; 400 for a deadline that is none; 403 for another's teacher.
        """
        found = self._teachers.get(scope["path"]) if scope["method"] == "POST" else None
        if found is None or visit.caller is None:
            return
        name, served = found
        if self._has_answers(served) or _WITHOUT_MODEL in scope["query_string"]:
            return
        deadline = deadline_in(headers.get("x-deadline-ms"), time.monotonic())
        require(self._service.books, visit, Asked(teacher=name))
        try:
            self._service.batchers[name].require_room(visit.caller.name, 1, deadline)
        except Expired:
            # It has passed since: whoever parses the question says so.
            return
        except QueueFull as full:
            visit.teacher, visit.route = name, PREDICT
            raise no_room(full.retry_after) from None

    def _has_answers(self, served: ServedTeacher) -> bool:
        """Whether a cache or a journal may have the answer: a library of samples alone has none."""
        return self._service.kept is not None or (served.library is not None and bool(served.library.held))


__all__ = ["Turnstile"]
