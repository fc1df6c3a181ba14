"""A request as the model's thread sees it: pieces of at most a micro-batch, and a future for each who waits for it."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

Fields = dict[str, Tensor]
Identity = bytes


class QueueFull(Exception):  # noqa: N818 - a state, not a defect
    """There is no room, or not enough time; `retry_after` is in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(retry_after)


class Expired(Exception):  # noqa: N818 - a state, not a defect
    """The deadline passed before the model was free, or would have passed before it was done."""


class TeacherFailed(Exception):  # noqa: N818 - told to the client as a problem
    """The model raised on this request alone, or answered another shape."""


class Awaited(Future[Fields]):
    """What a call of `Batcher.submit` waits for. Its times are on the monotonic clock."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.entered = self.left = time.monotonic()
        """When it was asked; and, once there is a result, when its first piece went into the model, and its last out.

        The pieces that it waited for in between are not told apart.
        """

    def clocked(self, entered: float) -> Awaited:
        """Notes when it was in the model, for a request that is answered now."""
        # Who joined later did not wait for the part that was over.
        self.entered, self.left = max(entered, self.asked), time.monotonic()
        return self


@dataclass(frozen=True, eq=False)
class Waiter:
    """One call of `Batcher.submit`."""

    answer: Awaited
    deadline: float
    """On the monotonic clock; inf where there is none."""

    def fail(self, error: Exception) -> None:
        """Ends the waiting with an error, unless it has ended."""
        if not self.answer.done() and self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


@dataclass(eq=False)
class Request:
    """A question, and all who have asked it while it was on its way.

    Parts are changed by the thread that delivers only, the rest by whoever holds the batcher's lock.
    """

    fields: tuple[str, ...]
    identity: Identity | None
    """What makes two questions one; None where this one is answered for itself."""
    parts: list[Fields | None]
    """One for each piece."""
    waiters: list[Waiter] = field(default_factory=list)
    entered: float = math.inf
    """When its first piece went into the model, on the monotonic clock."""
    callers: set[str] = field(default_factory=set)
    """In whose lines its pieces stand."""
    queued: dict[int, Piece] = field(default_factory=dict)
    """Its pieces that still stand there, by number."""
    failed: bool = False
    """Whether it has been told to all that it cannot be answered."""

    def join(self, deadline: float) -> Awaited:
        """One more who waits for the same answer."""
        waiter = Waiter(Awaited(), deadline)
        self.waiters.append(waiter)
        return waiter.answer

    def dropped(self, ready: float = -math.inf) -> bool:
        """Whether nobody waits any more: answered, failed, cancelled or too late.

        Args:
            ready: when its answer would be there, on the monotonic clock: where that is too late for everyone who
                waits, they are told now.
        """
        now, waiting = time.monotonic(), [waiter for waiter in self.waiters if not waiter.answer.done()]
        in_vain = all(ready > waiter.deadline for waiter in waiting)
        for waiter in waiting:
            if in_vain or now > waiter.deadline:
                waiter.fail(Expired())
        return all(waiter.answer.done() for waiter in self.waiters)

    def fail(self, error: Exception) -> None:
        """Ends the request with an error, unless it has ended."""
        self.failed = True
        for waiter in self.waiters:
            waiter.fail(error)

    @property
    def complete(self) -> bool:
        """Whether every piece has its answer."""
        return not self.failed and all(part is not None for part in self.parts)

    def finish(self) -> None:
        """Gives the joined answer to everyone who waits."""
        whole = [part for part in self.parts if part is not None]
        joined = {name: torch.cat([part[name] for part in whole]) for name in self.fields}
        for waiter in self.waiters:
            if not waiter.answer.done() and waiter.answer.set_running_or_notify_cancel():
                waiter.answer.clocked(self.entered).set_result(joined)


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a request that is never cut again."""

    request: Request
    index: int
    """Its place in `request.parts`."""
    images_BCHW: Tensor
    """At most a micro-batch of them."""
    number: int
    """Counts the pieces of a batcher, in the order of arrival."""

    @property
    def rows(self) -> int:
        """How many images."""
        return len(self.images_BCHW)
