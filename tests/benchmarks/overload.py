"""Open loops for `bench_service.py`: below capacity, and ten times above it."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from bench_views import Rows
from contenders import Ours
from load_generator import Answer, LoadGenerator, Open
from service_cases import Rate
from torch import Tensor

SHARE, TIMES = 0.8, 10
BATCHES, MARGIN = 5, 0.010


def latency(load: LoadGenerator, ours: Ours, views_BCHW: Tensor, capacity: float, batch: float, seconds: float) -> Rows:
    """How long answers take below capacity.

    Args:
        load: where it comes from.
        ours: who answers.
        views_BCHW: of one request.
        capacity: images a second of a closed loop.
        batch: seconds of a batch.
        seconds: how long.
    """
    answers = load.run(ours.question(views_BCHW), Open(SHARE * capacity / len(views_BCHW), seconds))
    good = [answer.seconds for answer in answers if answer.status == 200]
    label = f"p99 at {SHARE:.0%} load, open loop, {len(views_BCHW)} images a request"
    goal = BATCHES * batch + MARGIN
    came = f"{len(good)} of {len(answers)} answered"
    shown = f"{_ms(good, 0.99)}, goal ≤ {goal * 1e3:.0f} ms; median {_ms(good, 0.5)}, {came}"
    return {label: f"{(percentile(good, 0.99) - MARGIN) / batch:.1f} batch times + 10 ms ({shown})"}


def overload(load: LoadGenerator, ours: Ours, views_BCHW: Tensor, closed: Rate, batch: float, seconds: float) -> Rows:
    """What becomes of ten times the load; other arguments as `latency` has them.

    Args:
        closed: capacity, in images a second of a closed loop; measured just before and just after.
    """
    images, deadline = len(views_BCHW), math.ceil(10 * batch * 10) / 10
    with Resident(ours) as before:
        capacity = closed(seconds / 3)
    shares = list[float]()
    with Resident(ours) as during, ours.busy(shares):
        answers = load.run(ours.question(views_BCHW, deadline), Open(TIMES * capacity / images, seconds))
    given = [answer for answer in answers if answer.status == 200]
    good = [answer for answer in given if answer.seconds <= deadline]
    inside = sum(answer.done <= seconds for answer in good) * images / seconds
    around = (capacity + closed(seconds / 3)) / 2
    refused = [answer.seconds for answer in answers if answer.status == 503]
    label = f"{TIMES} × overload for {seconds:.0f} s, {images} images a request, deadline {deadline:.1f} s"
    by_status = ", ".join(f"{count} × {status}" for status, count in sorted(statuses(answers).items()))
    return {
        f"{label}: goodput / capacity, goal ≥ 0.95": f"{inside / around:.3f} of {around:.0f} images/s ({by_status})",
        f"{label}: share of the time in the model, as long as answers came": f"{shares[0]:.3f}",
        f"{label}: answers inside their deadline, goal ≥ 99 %": f"{len(good) / max(1, len(given)):.2%}",
        f"{label}: p99 of refusals, goal ≤ 50 ms": f"{_ms(refused, 0.99)} (median {_ms(refused, 0.5)})",
        f"{label}: growth of memory, goal ≤ 64 MB": f"{(during.most - before.most) / 2**20:.0f} MB",
    }


class Resident:
    """The most memory that a server has had; what a batch needs while it is in the model is there under any load."""

    def __init__(self, ours: Ours) -> None:
        self._ours, self._over, self.most = ours, threading.Event(), 0
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, self._ours.resident())


def statuses(answers: Sequence[Answer]) -> Counter[int]:
    """How many of each."""
    return Counter(answer.status for answer in answers)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed; NaN of none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else math.nan


def _ms(values: Sequence[float], share: float) -> str:
    return f"{percentile(values, share) * 1e3:.0f} ms"
