"""The thread beside a model: it fills the next batch, and delivers the answers of the last."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from services.backlog import Backlog
from services.batch import Batch, Placed
from services.request_log import log_failure
from services.work import Fields, Request, TeacherFailed


@dataclass
class Between:
    """What passes between the two threads of a teacher, under the batcher's lock."""

    open: Batch
    """What goes to the model next. Of its memory only the assistant writes."""
    backlog: Backlog
    filling: bool = False
    """Whether images are being copied to it."""
    answered: deque[list[tuple[Placed, Fields | TeacherFailed]]] = field(default_factory=deque)
    """By batch; delivered in the same order."""
    delivering: bool = False
    """Whether answers are being handed out."""
    over: bool = False
    """Whether the model's thread has ended."""

    def fillable(self) -> bool:
        """Whether something that waits has a place in the open batch."""
        return self.open.room > 0 and self.backlog.lines.fits(self.open.room)

    def work(self) -> bool:
        """Whether the assistant has something to do."""
        return bool(self.answered) or self.fillable()

    def ready(self) -> bool:
        """Whether the open batch is to go when the model is free."""
        if self.filling or not self.open.placed:
            return False
        return not self.open.room or not (self.delivering or self.work())


class Assistant:
    """Takes from a backlog under its lock, copies and delivers without it."""

    def __init__(self, between: Between, backlog: Backlog, changed: threading.Condition) -> None:
        """Called by `Engine`, which runs it."""
        self._between, self._backlog, self._changed = between, backlog, changed

    def run(self) -> None:
        """Until the model's thread has ended and all is delivered."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._between.work() or self._between.over)
                if not self._between.work():
                    return
                self._between.delivering = bool(self._between.answered)
                found = self._between.answered.popleft() if self._between.answered else None
            if found is None:
                self._fill()
                continue
            for placed, answer in found:
                self._deliver(placed, answer)
            with self._changed:
                self._between.delivering = False
                self._changed.notify_all()

    def _fill(self) -> None:
        """All that fits into the open batch now."""
        with self._changed:
            # It stays the open one until this is done.
            batch, self._between.filling = self._between.open, True
            placed = []
            while batch.room and (piece := self._backlog.take(batch.room)) is not None:
                placed.append((batch.place(piece), piece.images_BCHW))
            self._backlog.placed = batch.used
        broken = [one.request for one, images_BCHW in placed if not self._written(batch, one, images_BCHW)]
        with self._changed:
            self._between.filling = False
            self._changed.notify_all()
        for request in broken:
            self._fail(request, TeacherFailed())

    def _written(self, batch: Batch, placed: Placed, images_BCHW: Tensor) -> bool:
        try:
            batch.write(placed, images_BCHW)
        except Exception as error:
            # Another shape, or no memory: this request's trouble, not the thread's.
            log_failure("images could not be put into a batch", error)
            return False
        return True

    def _deliver(self, placed: Placed, found: Fields | TeacherFailed) -> None:
        request = placed.request
        if isinstance(found, TeacherFailed):
            self._fail(request, found)
            return
        try:
            request.parts[placed.index] = found
            if request.complete:
                with self._changed:
                    self._backlog.forget(request)
                request.finish()
        except Exception as error:
            # Out of memory while joining: as above.
            log_failure("an answer could not be put together", error)
            self._fail(request, TeacherFailed())

    def _fail(self, request: Request, error: TeacherFailed) -> None:
        with self._changed:
            self._backlog.drop(request)
            self._changed.notify_all()
        request.fail(error)
