"""Whose piece is next: a line for each caller, FIFO within it, and images shared evenly between those who wait.

Each caller has a count of the images that were taken from its line, and the smallest count has the turn, so a caller
that floods delays itself. Who comes back after a pause starts from the present turn: time in which nothing was asked
is not saved up. This is start-time fair queueing (Goyal, Vin and Cheng 1996, section 2) with equal weights, its tags
given when a piece is taken, so that work which was given up costs its caller nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.work import Piece


@dataclass(eq=False)
class _Line:
    """What one caller waits for."""

    pieces: dict[int, OrderedDict[int, Piece]] = field(default_factory=dict)
    """By number of rows, then by number of arrival: the oldest that fits is found without looking at all."""
    rows: int = 0
    load: int = 0
    """Rows as they fill batches: a piece of more than half a batch is likely to have it alone."""

    def oldest(self, room: int) -> Piece | None:
        """The first to come of those that fit."""
        firsts = (next(iter(lane.values())) for rows, lane in self.pieces.items() if rows <= room)
        return min(firsts, key=lambda piece: piece.number, default=None)


class Lines:
    """Not thread-safe: whoever calls it holds the batcher's lock."""

    def __init__(self, micro_batch: int) -> None:
        self._size = micro_batch
        self._lines: dict[str, _Line] = {}
        """Of those who wait for something."""
        self._served: dict[str, int] = {}
        """Images taken, on a common count. Kept while anybody waits: a line that was empty for a moment is known."""
        self._promised: tuple[str, Piece] | None = None
        """Whose turn it was when it did not fit: it goes first into the next batch, so nobody is passed for ever."""
        self.rows = 0
        """Images that wait, each counted once."""

    def add(self, caller: str, piece: Piece, *, again: bool = False) -> None:
        """A piece at the end of a line; `again` where it stands in another's line already and may go from either."""
        if caller not in self._lines:
            present = min((self._served[other] for other in self._lines), default=0)
            self._served[caller] = max(self._served.get(caller, 0), present)
        line = self._lines.setdefault(caller, _Line())
        line.pieces.setdefault(piece.rows, OrderedDict())[piece.number] = piece
        line.rows += piece.rows
        line.load += self.load(piece.rows)
        self.rows += 0 if again else piece.rows

    def load(self, rows: int) -> int:
        """Rows as they fill batches, the pieces of a request together."""
        whole, rest = divmod(rows, self._size)
        return whole * self._size + (rest if 2 * rest <= self._size else self._size)

    def take(self, room: int) -> tuple[str, Piece] | None:
        """Takes the next piece out: of those that fit, the oldest of whoever has had the least; None where none fits.

        Args:
            room: rows that are free in the batch; the micro-batch for a new one, into which every piece fits.

        Returns:
            The caller whose turn it was, to be charged with `charge` where the piece is used, and the piece.
        """
        found = self._promised if room == self._size else None
        if found is None:
            self._promise(room)
            found = self._next(room)
        if found is not None:
            self.remove(found[1])
        return found

    def charge(self, caller: str, rows: int) -> None:
        """So many images of a caller's go to the model."""
        if self._lines:
            self._served[caller] += rows

    def fits(self, room: int) -> bool:
        """Whether anything that waits has at most so many rows."""
        return any(rows <= room for line in self._lines.values() for rows in line.pieces)

    def remove(self, piece: Piece) -> None:
        """Takes a piece out of every line that it stands in."""
        self.rows -= piece.rows
        for caller, line in list(self._lines.items()):
            lane = line.pieces.get(piece.rows)
            if lane is None or lane.pop(piece.number, None) is None:
                continue
            line.rows -= piece.rows
            line.load -= self.load(piece.rows)
            if not lane:
                del line.pieces[piece.rows]
            if not line.pieces:
                del self._lines[caller]
        if self._promised is not None and self._promised[1] is piece:
            self._promised = None
        if not self._lines:
            self._served = {}

    def pieces(self) -> Iterator[Piece]:
        """All that wait; what stands in several lines comes several times."""
        for line in self._lines.values():
            for lane in line.pieces.values():
                yield from lane.values()

    def rows_of(self, caller: str) -> int:
        """Images that wait in one line."""
        return self._lines[caller].rows if caller in self._lines else 0

    def load_before(self, caller: str, rows: int) -> int:
        """Rows, as they fill batches, that go before and with so many more of this caller's.

        Nobody else has more than as much again taken meanwhile, whatever waits in other lines.
        """
        own = self._lines[caller].load if caller in self._lines else 0
        own += self.load(rows)
        return own + sum(min(line.load, own) for other, line in self._lines.items() if other != caller)

    def _promise(self, room: int) -> None:
        first = self._next(self._size) if self._promised is None else None
        if first is not None and first[1].rows > room:
            self._promised = first

    def _next(self, room: int) -> tuple[str, Piece] | None:
        found = [(caller, piece) for caller, line in self._lines.items() if (piece := line.oldest(room)) is not None]
        return min(found, key=lambda one: (self._served[one[0]], one[1].number), default=None)
