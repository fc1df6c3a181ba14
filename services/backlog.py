"""What waits for one teacher, how much of it there may be, and who is told at once that it would wait too long."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import count

from torch import Tensor

from services.estimate import Estimate
from services.lines import Lines
from services.work import Expired, Identity, Piece, QueueFull, Request

_SHARE = 4
"""A line may be so many times as long as what is left: one caller alone gets four fifths, two get four ninths each."""


class Backlog:
    """Not thread-safe: whoever calls it holds the batcher's lock."""

    def __init__(self, micro_batch: int, queue_images: int, queue_seconds: float) -> None:
        """Empty.

        Args:
            micro_batch: rows of a batch.
            queue_images: how many images may wait, not counting the batch in the model.
            queue_seconds: how long a request may have to wait before its own work begins, as far as can be told.
        """
        self._size, self.most, self._longest = micro_batch, queue_images, queue_seconds
        self._numbers = count()
        self._asked: dict[tuple[Identity, tuple[str, ...]], Request] = {}
        """Questions on their way, whose answers others may share."""
        self.lines, self.estimate = Lines(micro_batch), Estimate()
        self.placed = 0
        """Images that wait in the open batch."""
        self.closed = False
        """Whether nothing more is taken on."""

    @property
    def waiting(self) -> int:
        """Images that wait for the model."""
        return self.lines.rows + self.placed

    @property
    def full(self) -> bool:
        """Whether a caller who has work here already would be sent away: the high-water mark."""
        long = self.estimate.mean * self.waiting / self._size > self._longest
        return long or self.waiting * (_SHARE + 1) >= self.most * _SHARE

    def known(self, identity: Identity | None, fields: tuple[str, ...]) -> Request | None:
        """The same question, while it is on its way."""
        return None if identity is None else self._asked.get((identity, fields))

    def require_room(self, caller: str, images: int, deadline: float = math.inf) -> None:
        """Whether a request may wait.

        A deadline is held against the smoothed time of a batch, all that would go before the request, and its own
        batches: work that would be late is sent away before it makes others late. Only where the model is free and
        has not been timed for a while it is tried all the same, for no estimate may shut the door for ever.

        Raises:
            QueueFull: the images, the caller's share of them, the seconds, or the deadline leave no room.
            Expired: the deadline has passed.
        """
        left, free = deadline - time.monotonic(), self.most - self.waiting
        if left <= 0:
            raise Expired
        own = self.lines.rows_of(caller) + images
        # As many must go first as make room; each makes one place free and the line one shorter.
        over = max(images - free, (own - _SHARE * free) / (_SHARE + 1))
        if over > 0:
            raise self._come_back(self.estimate.mean * over / self._size)
        before = self._seconds(self.lines.load_before(caller, 0))
        if before > self._longest:
            raise self._come_back(before - self._longest)
        late = self._seconds(self.lines.load_before(caller, images)) - left
        if late > 0 and (self.waiting or self.estimate.busy or self.estimate.fresh):
            raise self._come_back(late)

    def require_place(self, images: int) -> None:
        """Whether so many more images may wait at all, whoever brings them.

        Raises:
            QueueFull: not now.
        """
        if (over := self.waiting + images - self.most) > 0:
            raise self._come_back(self.estimate.mean * over / self._size)

    def add(self, request: Request, caller: str, pieces: Sequence[Tensor]) -> None:
        """A new question at the end of a line; others may join it where it has an identity."""
        if request.identity is not None:
            self._asked[request.identity, request.fields] = request
        request.callers.add(caller)
        for index, images_BCHW in enumerate(pieces):
            piece = Piece(request, index, images_BCHW, next(self._numbers))
            request.queued[piece.number] = piece
            self.lines.add(caller, piece)

    def share(self, request: Request, caller: str) -> None:
        """What one caller waits for stands in another's line too: it must not wait as long as a flood does."""
        if caller not in request.callers:
            request.callers.add(caller)
            for piece in request.queued.values():
                self.lines.add(caller, piece, again=True)

    def take(self, room: int) -> Piece | None:
        """The next piece that fits and that somebody waits for.

        Where not all that waits has room, what would be late is left out, though it is not late yet: a model that has
        fallen behind would else compute one late answer after the other.
        """
        while (found := self.lines.take(room)) is not None:
            caller, piece = found
            del piece.request.queued[piece.number]
            others = self.lines.rows + piece.rows > room
            if not piece.request.dropped(time.monotonic() + self.estimate.seconds(1) if others else -math.inf):
                self.lines.charge(caller, piece.rows)
                return piece
            self.drop(piece.request)
        return None

    def close(self) -> set[Request]:
        """Takes everything out; nothing more comes in."""
        self.closed = True
        left = {piece.request for piece in self.lines.pieces()}
        for request in left:
            self.drop(request)
        return left

    def drop(self, request: Request) -> None:
        """Nobody waits for it any more, or it cannot be answered: none of it goes to the model, and nobody joins."""
        for piece in request.queued.values():
            self.lines.remove(piece)
        request.queued.clear()
        self.forget(request)

    def forget(self, request: Request) -> None:
        """From here on nobody joins: its answer, or that there is none, goes to those who wait now."""
        if request.identity is not None and self._asked.get((request.identity, request.fields)) is request:
            del self._asked[request.identity, request.fields]

    def _seconds(self, load: int) -> float:
        return self.estimate.seconds(math.ceil((self.placed + load) / self._size))

    @staticmethod
    def _come_back(seconds: float) -> QueueFull:
        return QueueFull(max(1, math.ceil(seconds)))
