"""One teacher behind a queue: requests in, batches of a fixed size through the model, answers out.

A request is cut at multiples of the micro-batch from its own start, and a piece is never cut again: so a full
micro-batch travels alone and lies in the batch exactly as in a precompute job, whoever else is asking. Smaller pieces
share a batch, first fit in the order of `lines`, which is fair to all callers; the rest of a batch is zeros, as there.
Whoever asks what is asked already, waits for the same answer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from services.backlog import Backlog
from services.engine import Engine
from services.load import Load
from services.teachers import ServedTeacher
from services.work import Awaited, Fields, Identity, Request


class Batcher:
    """Thread-safe; the teacher is called in its own thread only."""

    def __init__(self, served: ServedTeacher, queue_images: int, queue_seconds: float) -> None:
        """Nothing runs before `start`.

        Args:
            served: the teacher.
            queue_images: how many images may wait, not counting the batch in the model.
            queue_seconds: how long a request may have to wait before its own work begins, as far as can be told.
        """
        self._size = served.micro_batch
        self._backlog = Backlog(self._size, queue_images, queue_seconds)
        self._changed = threading.Condition()
        self._engine = Engine(served, self._backlog, self._changed)

    @property
    def warm(self) -> bool:
        """Whether the first batches have gone through the model."""
        return self._engine.warm

    @property
    def load(self) -> Load:
        """What the batches of the last seconds held."""
        return self._engine.load

    @property
    def dead(self) -> bool:
        """Whether a thread of it has ended; it never begins again."""
        return self._engine.dead

    def on_batch(self, ran: Callable[[int, float], None]) -> None:
        """Has a function called after each batch, in the model's thread: rows that were asked for, and seconds."""
        self._engine.ran = ran

    @property
    def queue_images(self) -> int:
        """How many images may wait."""
        return self._backlog.most

    @property
    def waiting(self) -> int:
        """Images that wait for the model."""
        return self._backlog.waiting

    @property
    def full(self) -> bool:
        """Whether the queue has reached its high-water mark."""
        return self._backlog.full

    def start(self) -> None:
        """Starts the threads; the model is warmed first."""
        self._engine.start()

    def stop(self) -> None:
        """Lets the batch in the model end, cancels what waits, and joins the threads."""
        self._engine.stop()

    def require_room(self, caller: str, images: int, deadline: float = math.inf) -> None:
        """Whether all that a caller is about to ask for may wait; to be asked once, before the first is submitted.

        Raises:
            QueueFull: too much waits, or so much that the deadline would pass (`Backlog.require_room`).
            Expired: the deadline has passed.
        """
        with self._changed:
            self._backlog.require_room(caller, images, deadline)

    def submit(
        self,
        images_BCHW: Tensor,
        fields: Sequence[str],
        caller: str,
        deadline: float = math.inf,
        identity: Identity | None = None,
    ) -> Awaited:
        """Queues a request.

        Args:
            images_BCHW: uint8 [N, C, H, W] in the teacher's view shape, N ≥ 1.
            fields: which of the teacher's fields to keep.
            caller: in whose line it waits.
            deadline: on the monotonic clock; work that is late, or would take the place of others and be late, is
                dropped before it reaches the model.
            identity: of these images (`wire.identity_of`); while they are on their way, whoever brings them again
                adds no work, and always has room. Not shared where None.

        Returns:
            A future of float32 [N, ...] values on the CPU; cancelling it drops the work that is not in the model.

        Raises:
            QueueFull: too many images wait. A caller's share, seconds and deadlines are for `require_room`: what is
                asked for in several parts is let in, or not, as a whole.
        """
        kept = tuple(fields)
        with self._changed:
            request = self._backlog.known(identity, kept)
            if request is None:
                self._backlog.require_place(len(images_BCHW))
                cut = torch.split(images_BCHW, self._size)
                request = Request(kept, identity, [None] * len(cut))
                if not self._backlog.closed:
                    self._backlog.add(request, caller, cut)
                    self._changed.notify_all()
            else:
                self._backlog.share(request, caller)
            answer = request.join(deadline)
            closed = self._backlog.closed
        answer.add_done_callback(partial(self._done, request))
        if closed:
            answer.cancel()
        return answer

    def _done(self, request: Request, answer: Future[Fields]) -> None:
        """Whoever leaves makes room at once."""
        if answer.cancelled():
            with self._changed:
                if request.dropped():
                    self._backlog.drop(request)
                    self._changed.notify_all()
