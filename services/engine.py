"""The two threads of one teacher: one is always at the model, the other fills the next batch and delivers the last.

Whenever the model is free it takes the batch that is open; there is no timer. That stays open, and is filled, while
the model is at the one before; so a device that is kept busy waits neither for images to be copied nor for answers to
be handed out. A batch that is not full waits until the answers of the last one are out, for whoever asks in turn asks
again then, and a batch costs the same with one image as with all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from services.assistant import Assistant, Between
from services.backlog import Backlog
from services.batch import Batch
from services.forward import answers, forward
from services.load import Load
from services.pauses import own_threads
from services.request_log import log_failure
from services.teachers import ServedTeacher
from services.work import TeacherFailed

_log = logging.getLogger("services")


class Engine:
    """Takes from a backlog under its lock. The teacher is called in its own thread only."""

    def __init__(self, served: ServedTeacher, backlog: Backlog, changed: threading.Condition) -> None:
        """Nothing runs before `start`.

        Args:
            served: the teacher.
            backlog: what waits for it.
            changed: its lock; notified whenever something changes that a thread may wait for.
        """
        self._served, self._backlog, self._changed = served, backlog, changed
        batches = (Batch(served.micro_batch, served.view_shape, served.pinned) for _ in range(2))
        self._between, self._inside = Between(next(batches), backlog), next(batches)
        assistant = Assistant(self._between, backlog, changed)
        self._threads_before = 1
        self._model = threading.Thread(target=self._run, name=f"teacher-{served.name}", daemon=True)
        self._assistant = threading.Thread(target=assistant.run, name=f"batches-{served.name}", daemon=True)
        self.load = Load()
        """What the batches of the last seconds held."""
        self.warm = False
        """Whether the first batches have gone through the model."""
        self.ran: Callable[[int, float], None] = lambda _rows, _seconds: None
        """Called after each batch."""

    @property
    def dead(self) -> bool:
        """Whether one of the threads has ended; it never begins again."""
        threads = (self._model, self._assistant)
        return any(thread.ident is not None and not thread.is_alive() for thread in threads)

    def start(self) -> None:
        """Starts the threads; the model is warmed first."""
        self._threads_before = torch.get_num_threads()
        self._model.start()
        self._assistant.start()

    def stop(self) -> None:
        """Lets the batch in the model end, cancels what waits, and joins the threads."""
        self._cancel()
        self._model.join()
        self._assistant.join()

    def _cancel(self, *inside: Batch) -> None:
        with self._changed:
            # Looked at under the lock: the assistant may be moving a piece from its line to the open batch.
            placed = [one for batch in (self._between.open, *inside) for one in batch.placed]
            left = self._backlog.close() | {one.request for one in placed}
            self._changed.notify_all()
        for waiter in [waiter for request in left for waiter in request.waiters]:
            waiter.answer.cancel()

    # ---------------------------------------------------------------- at the model

    def _run(self) -> None:
        own_threads(self._served.threads)
        try:
            self._warm_up()
            while (batch := self._next()) is not None:
                rows, started = sum(placed.stop - placed.start for placed in batch.placed), time.monotonic()
                for placed in batch.placed:
                    placed.request.entered = min(placed.request.entered, started)
                found = list(answers(self._served, batch))
                self.load.add(rows)
                self.ran(rows, time.monotonic() - started)
                whole = not any(isinstance(one, TeacherFailed) for _, one in found)
                with self._changed:
                    self._backlog.estimate.stop(count=whole)
                    self._between.answered.append(found)
                    batch.clear()
                    self._changed.notify_all()
        except BaseException as error:
            # A model that calls sys.exit(), or a defect here.
            log_failure(f"the thread of teacher {self._served.name} has died", error)
        finally:
            # Nobody waits for what will not come.
            self._cancel(self._inside)
            with self._changed:
                self._between.over = True
                self._changed.notify_all()
            torch.set_num_threads(self._threads_before)

    def _warm_up(self) -> None:
        views_BCHW = torch.zeros_like(self._inside.views_BCHW)
        if self._served.example_CHW is not None:
            views_BCHW[:] = self._served.example_CHW
        try:
            forward(self._served, views_BCHW, ())
            # The first call allocates and chooses kernels; how long a batch takes, the second one shows.
            started = time.monotonic()
            forward(self._served, views_BCHW, self._served.field_shapes)
            with self._changed:
                self._backlog.estimate.note(time.monotonic() - started)
            self.warm = True
        except Exception:
            # Requests will meet the same error and say so; `readyz` stays 503.
            _log.exception("teacher %s cannot run", self._served.name)

    def _next(self) -> Batch | None:
        """Waits until there is work, and takes the open batch; None when stopped."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog.closed or self._between.ready())
                if self._backlog.closed:
                    return None
                self._inside, self._between.open = self._between.open, self._inside
                batch, self._backlog.placed = self._inside, 0
                dropped = [placed for placed in batch.placed if placed.request.dropped()]
                for placed in dropped:
                    self._backlog.drop(placed.request)
                self._backlog.estimate.start()
                self._changed.notify_all()
            batch.drop(dropped)
            batch.close()
            if batch.placed:
                return batch
            with self._changed:
                self._backlog.estimate.stop(count=False)
