"""Turns questions away before they are parsed, where only a model could answer them and it has no room.

Under overload most requests are refused: what a refusal costs, the model loses. So it comes before the framework's
routing and validation, which take longer than everything else in it; `Desk.require_room` refuses what needs to be
looked at first.
"""

from __future__ import annotations

import time

from starlette.datastructures import Headers

from services.admission import require
from services.headers import deadline_in
from services.policy import Asked
from services.problems import no_room
from services.routes import PREDICT
from services.state import Service
from services.visit import Visit
from services.work import Expired, QueueFull


class Turnstile:
    """Stands behind the door: who asks is known."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # A cache or a journal may have the answer.
        alone = [name for name, one in service.teachers.items() if one.library is None and service.kept is None]
        self._batchers = {PREDICT.format(name=name): (name, service.batchers[name]) for name in alone}

    def require_room(self, method: str, path: str, headers: Headers, visit: Visit) -> None:
        """Lets a request pass, unless it is a question for which not even one image would be taken.

        Raises:
            Problem: 503 where there is no room; 400 for a deadline that is none; 403 for another's teacher.
        """
        found = self._batchers.get(path) if method == "POST" else None
        if found is None or visit.caller is None:
            return
        name, batcher = found
        deadline = deadline_in(headers.get("x-deadline-ms"), time.monotonic())
        require(self._service.books, visit, Asked(teacher=name))
        try:
            batcher.require_room(visit.caller.name, 1, deadline)
        except Expired:
            # It has passed since: whoever parses the question says so.
            return
        except QueueFull as full:
            visit.teacher, visit.route = name, PREDICT
            raise no_room(full.retry_after) from None


__all__ = ["Turnstile"]
