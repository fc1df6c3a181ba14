"""A batch while it is put together, and while it is in the model: memory of a fixed size, and what lies where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.work import Piece, Request


@dataclass(frozen=True, eq=False)
class Placed:
    """A piece that lies in a batch; its own images are not needed any more."""

    request: Request
    index: int
    """Of the piece, in `request.parts`."""
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Where it lies."""
        return slice(self.start, self.stop)


class Batch:
    """Used again and again. Not thread-safe: it has one owner at a time."""

    def __init__(self, micro_batch: int, view_shape: tuple[int, int, int], pinned: bool) -> None:
        self.views_BCHW = torch.zeros((micro_batch, *view_shape), dtype=torch.uint8, pin_memory=pinned)
        """Zeros where nothing lies."""
        self.placed: list[Placed] = []
        self._dirty = 0

    @property
    def room(self) -> int:
        """Rows that are free."""
        return len(self.views_BCHW) - self.used

    @property
    def used(self) -> int:
        """Rows that are taken."""
        return self.placed[-1].stop if self.placed else 0

    def place(self, piece: Piece) -> Placed:
        """Gives a piece its rows; they are written by `write`."""
        placed = Placed(piece.request, piece.index, self.used, self.used + piece.rows)
        self.placed.append(placed)
        self._dirty = max(self._dirty, placed.stop)
        return placed

    def write(self, placed: Placed, images_BCHW: Tensor) -> None:
        """Copies a piece's images to its rows."""
        self.views_BCHW[placed.rows] = images_BCHW

    def drop(self, dropped: list[Placed]) -> None:
        """Takes pieces out; their rows become zeros, and nothing else moves."""
        for placed in dropped:
            self.placed.remove(placed)
            self.views_BCHW[placed.rows] = 0

    def only(self, kept: list[Placed]) -> Tensor:
        """A copy in which everything but these is zeros."""
        views_BCHW = torch.zeros_like(self.views_BCHW)
        for placed in kept:
            views_BCHW[placed.rows] = self.views_BCHW[placed.rows]
        return views_BCHW

    def close(self) -> None:
        """The rest becomes zeros, as in a precompute job."""
        self.views_BCHW[self.used : self._dirty] = 0
        self._dirty = self.used

    def clear(self) -> None:
        """Makes room for the next; what lies there now is written over, or becomes zeros when that is closed."""
        self.placed = []
