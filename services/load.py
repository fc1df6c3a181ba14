"""How busy a teacher is: what its last batches held, in a memory that does not grow with their number."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = 10
"""What counts as the last batches."""
_TICKS = 10
"""In a second: batches of one tick are counted together."""


@dataclass(frozen=True)
class Pace:
    """What went through the model in the last `SECONDS`."""

    batches: int
    images: int

    @property
    def images_per_second(self) -> float:
        """Over the whole time, also where the teacher has not run for so long."""
        return self.images / SECONDS

    def fill(self, micro_batch: int) -> float | None:
        """The share of rows that were images, from 0 to 1; None where there was no batch."""
        return self.images / (self.batches * micro_batch) if self.batches else None


@dataclass
class _Tick:
    number: int
    batches: int = 0
    images: int = 0


class Load:
    """Thread-safe: the model's thread adds, requests read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing has run.

        Args:
            clock: seconds that never go back.
        """
        self._clock, self._lock = clock, threading.Lock()
        self._ticks: deque[_Tick] = deque()

    def add(self, images: int) -> None:
        """A batch of so many images, not counting the rows that fill it up, has been through the model."""
        with self._lock:
            now = self._now()
            if not self._ticks or self._ticks[-1].number != now:
                self._ticks.append(_Tick(now))
            self._ticks[-1].batches += 1
            self._ticks[-1].images += images

    def pace(self) -> Pace:
        """Of the last `SECONDS`."""
        with self._lock:
            self._now()
            return Pace(sum(tick.batches for tick in self._ticks), sum(tick.images for tick in self._ticks))

    def _now(self) -> int:
        """The tick it is, once those that are too old are forgotten."""
        now = int(self._clock() * _TICKS)
        while self._ticks and self._ticks[0].number <= now - SECONDS * _TICKS:
            self._ticks.popleft()
        return now
