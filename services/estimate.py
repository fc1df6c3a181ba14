"""How long a batch takes, and so how long who comes now would wait."""

from __future__ import annotations

import math
import time

_MEAN, _DEVIATION = 1 / 8, 1 / 4
_CAUTION = 2.0
_FRESH = 10.0


class Estimate:
    """The smoothed time of a batch and its smoothed deviation, with the weights of RFC 6298, section 2.

    Not thread-safe: whoever calls it holds the batcher's lock.
    """

    def __init__(self) -> None:
        self.mean = 0.0
        """Seconds of a batch; 0 before the first was measured."""
        self._deviation = 0.0
        self._measured = -math.inf
        self._started: float | None = None

    @property
    def busy(self) -> bool:
        """Whether a batch is in the model."""
        return self._started is not None

    @property
    def fresh(self) -> bool:
        """Whether the last measurement is young enough to refuse somebody for it though the model is free."""
        return time.monotonic() - self._measured < _FRESH

    def start(self) -> None:
        """A batch goes into the model."""
        self._started = time.monotonic()

    def stop(self, *, count: bool = True) -> None:
        """It has come out; `count` is false where the time says nothing about the next, as after a failure."""
        assert self._started is not None, "a batch was started"
        seconds, self._started = time.monotonic() - self._started, None
        if count:
            self.note(seconds)

    def note(self, seconds: float) -> None:
        """A batch has taken so long."""
        if not self.mean:
            self.mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += _DEVIATION * (abs(seconds - self.mean) - self._deviation)
            self.mean += _MEAN * (seconds - self.mean)
        self._measured = time.monotonic()

    def seconds(self, batches: float) -> float:
        """Until so many batches are done, with the one in the model; somewhat more than the mean says.

        Whoever is taken on in spite of its deadline wastes the work of all who wait behind it, so a doubt counts
        against it. A queue that is a little shorter costs nothing while there is one.
        """
        each = self.mean + _CAUTION * self._deviation
        rest = 0.0 if self._started is None else max(0.0, self._started + each - time.monotonic())
        return rest + batches * each
