"""A request as the model's thread sees it: pieces of at most a micro-batch, and one future for all of them."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

Fields = dict[str, Tensor]


class QueueFull(Exception):  # noqa: N818 - a state, not a defect
    """Too many images wait; `retry_after` is in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(retry_after)


class Expired(Exception):  # noqa: N818 - a state, not a defect
    """The deadline passed before the model was free."""


class TeacherFailed(Exception):  # noqa: N818 - told to the client as a problem
    """The model raised on this request alone, or answered another shape."""


@dataclass(eq=False)
class Request:
    """One call of `Batcher.submit`. Changed by the model's thread only."""

    fields: tuple[str, ...]
    deadline: float
    """On the monotonic clock; inf where there is none."""
    answer: Future[Fields]
    parts: list[Fields | None]
    """One for each piece."""

    def dropped(self) -> bool:
        """Whether nobody waits any more: answered, failed, cancelled or too late."""
        if not self.answer.done() and time.monotonic() > self.deadline:
            self.fail(Expired())
        return self.answer.done()

    def fail(self, error: Exception) -> None:
        """Ends the request with an error, unless it has ended."""
        if not self.answer.done() and self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)

    def keep(self, index: int, part: Fields) -> None:
        """Stores a piece's answer; the last one completes the request."""
        self.parts[index] = part
        whole = [part for part in self.parts if part is not None]
        if len(whole) < len(self.parts) or self.answer.done():
            return
        joined = {name: torch.cat([part[name] for part in whole]) for name in self.fields}
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_result(joined)


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a request that is never cut again."""

    request: Request
    index: int
    """Its place in `request.parts`."""
    images_BCHW: Tensor
    """At most a micro-batch of them."""


@dataclass(frozen=True)
class Placed:
    """A piece and where it lies in a batch."""

    piece: Piece
    start: int
    """First row of the piece in the batch."""

    @property
    def stop(self) -> int:
        """The row after its last."""
        return self.start + len(self.piece.images_BCHW)
