"""Where the time of one request went; what `Server-Timing`, the log and the metrics say of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Part = Literal["body", "decode", "cache", "queue", "model", "encode", "record"]
"""Its body arrives, becomes views, is looked up, waits, is computed, becomes an answer, and is written in the books."""
PARTS: tuple[Part, ...] = get_args(Part)


class Spent:
    """Seconds of one request, by part, on the monotonic clock. Used on the event loop only."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: dict[Part, float] = {}
        self._computed: tuple[float, float, float] | None = None

    @contextmanager
    def on(self, part: Part) -> Iterator[None]:
        """Counts what is in here for a part, whether it succeeds or not."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - started)

    def add(self, part: Part, seconds: float) -> None:
        """Counts what was measured elsewhere."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def computing(self, asked: float, entered: float, left: float) -> None:
        """Counts a question's way through the queue and the model; of several side by side, from first to last."""
        first = self._computed or (asked, entered, left)
        asked, entered, left = min(first[0], asked), min(first[1], entered), max(first[2], left)
        self._computed = asked, entered, left
        self._seconds |= {"queue": entered - asked, "model": left - entered}

    @property
    def parts(self) -> dict[Part, float]:
        """Those that there were, in the order in which they happen."""
        return {part: self._seconds[part] for part in PARTS if part in self._seconds}

    @property
    def total(self) -> float:
        """Since the request came."""
        return time.monotonic() - self._started

    def header(self) -> str:
        """The value of `Server-Timing`, in milliseconds."""
        shown = [*self.parts.items(), ("total", self.total)]
        return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in shown)


__all__ = ["Part", "Spent"]
