"""One teacher, one thread: requests in, batches of a fixed size through the model, answers out.

The thread takes what waits whenever the model is free; there is no timer. A request is cut at multiples of the
micro-batch from its own start, and a piece is never cut again: so a full micro-batch travels alone and lies in
the batch exactly as in a precompute job, whoever else is asking. Smaller pieces share a batch, first fit in the
order of arrival; the rest of a batch is zeros, as there. Whoever asks what is asked already, waits for the same answer.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from services.load import Load
from services.request_log import log_failure
from services.teachers import ServedTeacher
from services.work import Awaited, Fields, Identity, Piece, Placed, QueueFull, Request, TeacherFailed

_log = logging.getLogger("services")


class Batcher:
    """Thread-safe; the teacher is called in its own thread only."""

    def __init__(self, served: ServedTeacher, queue_images: int) -> None:
        """Nothing runs before `start`.

        Args:
            served: the teacher.
            queue_images: how many images may wait, not counting the batch in the model.
        """
        self._served, self._most = served, queue_images
        self._pieces: deque[Piece] = deque()
        self._asked: dict[tuple[Identity, tuple[str, ...]], Request] = {}
        """Questions on their way, whose answers others may share."""
        self._changed = threading.Condition()
        self._waiting = 0
        self._stopping = False
        self._batch_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name=f"teacher-{served.name}", daemon=True)
        self.warm = False
        """Whether a first, empty batch has gone through the model."""
        self.ran: Callable[[int, float], None] = lambda _rows, _seconds: None
        """Called in the thread after each batch: how many rows were asked for in it, and the seconds it took."""
        self.load = Load()
        """What the batches of the last seconds held."""

    @property
    def waiting(self) -> int:
        """Images that wait for the model."""
        return self._waiting

    @property
    def full(self) -> bool:
        """Whether not even one image more would be taken."""
        return self._waiting >= self._most

    @property
    def dead(self) -> bool:
        """Whether its thread has ended; it never begins again."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread, which warms the model first."""
        self._thread.start()

    def stop(self) -> None:
        """Lets the batch in the model end, cancels what waits, and joins the thread."""
        self._abandon([])
        self._thread.join()

    def _abandon(self, inside: list[Placed]) -> None:
        """Cancels what waits and what is inside, and takes nothing more."""
        with self._changed:
            self._stopping = True
            pieces = [*self._pieces, *(placed.piece for placed in inside)]
            left = [waiter for piece in pieces for waiter in piece.request.waiters]
            self._pieces.clear()
            self._asked.clear()
            self._waiting = 0
            self._changed.notify()
        for waiter in left:
            waiter.answer.cancel()

    def require_room(self, images: int) -> None:
        """Raises `QueueFull` where so many images would not be taken now."""
        if self._waiting + images > self._most:
            batches = self._waiting / self._served.micro_batch
            raise QueueFull(max(1, math.ceil(batches * self._batch_seconds)))

    def submit(
        self,
        images_BCHW: Tensor,
        fields: Sequence[str],
        deadline: float = math.inf,
        identity: Identity | None = None,
    ) -> Awaited:
        """Queues a request.

        Args:
            images_BCHW: uint8 [N, C, H, W] in the teacher's view shape, N ≥ 1.
            fields: which of the teacher's fields to keep.
            deadline: on the monotonic clock; work that is late is dropped before it reaches the model.
            identity: of these images (`wire.identity_of`); while they are on their way, whoever brings them again
                adds no work. Not shared where None.

        Returns:
            A future of float32 [N, ...] values on the CPU; cancelling it drops the work that is not in the model.

        Raises:
            QueueFull: too many images wait.
        """
        cut = torch.split(images_BCHW, self._served.micro_batch)
        request = Request(tuple(fields), identity, [None] * len(cut))
        with self._changed:
            if identity is not None and (known := self._asked.get((identity, request.fields))) is not None:
                return known.join(deadline)
            self.require_room(len(images_BCHW))
            answer = request.join(deadline)
            if self._stopping:
                answer.cancel()
                return answer
            if identity is not None:
                self._asked[identity, request.fields] = request
            self._pieces.extend(Piece(request, index, images) for index, images in enumerate(cut))
            self._waiting += len(images_BCHW)
            self._changed.notify()
        return answer

    def _forget(self, request: Request) -> None:
        """From here on nobody joins: its answer, or that there is none, goes to those who wait now."""
        if request.identity is not None and self._asked.get((request.identity, request.fields)) is request:
            del self._asked[request.identity, request.fields]

    def _run(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self._served.threads)
        batch: list[Placed] = []
        try:
            self._warm_up()
            while batch := self._next():
                started = time.monotonic()
                for placed in batch:
                    placed.piece.request.entered = min(placed.piece.request.entered, started)
                self._answer(batch)
                self._batch_seconds = time.monotonic() - started
                self.load.add(batch[-1].stop)
                self.ran(batch[-1].stop, self._batch_seconds)
        except BaseException as error:
            # A model that calls sys.exit(), or a defect here: nobody may wait for a thread that is no more.
            log_failure(f"the thread of teacher {self._served.name} has died", error)
            self._abandon(batch)
        finally:
            torch.set_num_threads(before)

    def _warm_up(self) -> None:
        try:
            self._forward([])
            self.warm = True
        except Exception:
            # Requests will meet the same error and say so; `readyz` stays 503.
            _log.exception("teacher %s cannot run", self._served.name)

    def _next(self) -> list[Placed]:
        """Waits for work; empty when stopped."""
        with self._changed:
            while True:
                batch = self._take()
                if batch or self._stopping:
                    return batch
                self._changed.wait()

    def _take(self) -> list[Placed]:
        batch: list[Placed] = []
        kept: deque[Piece] = deque()
        used = 0
        for piece in self._pieces:
            rows = len(piece.images_BCHW)
            if piece.request.dropped():
                self._forget(piece.request)
                self._waiting -= rows
            elif used + rows <= self._served.micro_batch:
                batch.append(Placed(piece, used))
                used += rows
                self._waiting -= rows
            else:
                kept.append(piece)
        self._pieces = kept
        return batch

    def _answer(self, batch: list[Placed]) -> None:
        """Answers every piece; halves a failing batch until the piece that breaks it is alone.

        The rows of the other half become zeros, so that every piece stays where it was.
        """
        try:
            outputs = self._forward(batch)
        except Exception as error:
            # Whatever a user's model raises belongs to somebody's request; the thread goes on.
            if len(batch) == 1:
                log_failure(f"teacher {self._served.name} failed on one request", error)
                self._fail(batch[0].piece.request)
                return
            half = len(batch) // 2
            self._answer(batch[:half])
            self._answer(batch[half:])
            return
        for placed in batch:
            self._deliver(placed, outputs)

    def _forward(self, batch: list[Placed]) -> Fields:
        size = self._served.micro_batch
        views_BCHW = torch.zeros((size, *self._served.view_shape), dtype=torch.uint8)
        for placed in batch:
            views_BCHW[placed.start : placed.stop] = placed.piece.images_BCHW
        outputs = self._served.teacher(views_BCHW)
        for name, shape in self._served.field_shapes.items():
            if tuple(outputs[name].shape) != (size, *shape):
                raise ValueError(f"{name} must be {(size, *shape)}, found {tuple(outputs[name].shape)}")
        return outputs

    def _deliver(self, placed: Placed, outputs: Fields) -> None:
        request, rows = placed.piece.request, slice(placed.start, placed.stop)
        try:
            request.parts[placed.piece.index] = {name: outputs[name][rows].cpu() for name in request.fields}
            if request.complete:
                with self._changed:
                    self._forget(request)
                request.finish()
        except Exception as error:
            # Out of memory while copying or joining: this request's trouble, not the thread's.
            log_failure("an answer could not be put together", error)
            self._fail(request)

    def _fail(self, request: Request) -> None:
        with self._changed:
            self._forget(request)
        request.fail(TeacherFailed())
