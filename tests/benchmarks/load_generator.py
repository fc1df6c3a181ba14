"""Load from a process of its own: in a closed or an open loop, with the requests of `load_requests.py`."""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from load_requests import Pool, Question

Ask = Callable[[float], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Closed:
    """So many callers; each asks again as soon as it has its answer, for so long, or so often all together."""

    callers: int
    seconds: float = float("inf")
    most: int | None = None


@dataclass(frozen=True)
class Open:
    """Poisson arrivals, whether or not the server keeps up."""

    rate: float
    """Requests a second."""
    seconds: float
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One that came. Seconds since the load began."""

    scheduled: float
    """When it should have been asked: in an open loop a slow server cannot delay it, in a closed one it was."""
    done: float
    status: int

    @property
    def seconds(self) -> float:
        """From the time it was due."""
        return self.done - self.scheduled


async def drive(question: Question, how: Closed | Open, numbers: itertools.count[int]) -> list[Answer]:
    """Asks until the time is over, and waits for what is under way.

    Raises:
        OSError: the server is gone.
        asyncio.IncompleteReadError: it hung up on a request.
    """
    pool, head, answers = Pool(question.port), question.head(), list[Answer]()
    started = time.perf_counter()

    async def ask(scheduled: float) -> None:
        status = await pool.ask(head, question.stamped(numbers))
        answers.append(Answer(scheduled, time.perf_counter() - started, status))

    await (_closed(ask, how, started) if isinstance(how, Closed) else _open(ask, how, started))
    await pool.close()
    return answers


async def _closed(ask: Ask, how: Closed, started: float) -> None:
    left = itertools.count() if how.most is None else iter(range(how.most))

    async def caller() -> None:
        for _ in left:
            now = time.perf_counter() - started
            if now >= how.seconds:
                return
            await ask(now)

    async with asyncio.TaskGroup() as group:
        for _ in range(how.callers):
            group.create_task(caller())


async def _open(ask: Ask, how: Open, started: float) -> None:
    drawn, due = random.Random(how.seed), 0.0
    async with asyncio.TaskGroup() as group:
        while (due := due + drawn.expovariate(how.rate)) < how.seconds:
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - started)))
            group.create_task(ask(due))


def _serve(asked: Connection) -> None:
    # A full collection walks over all that torch's modules are: a tenth of a second in which nothing is sent or read.
    gc.collect()
    gc.freeze()
    numbers = itertools.count()
    while (job := asked.recv()) is not None:
        asked.send(asyncio.run(drive(*job, numbers)))


class LoadGenerator:
    """The process; one load at a time."""

    def __init__(self) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)

    def __enter__(self) -> LoadGenerator:
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join()

    def run(self, question: Question, how: Closed | Open) -> list[Answer]:
        """Every answer, in the order in which they came.

        Args:
            question: what is asked.
            how: by whom and when.
        """
        self._ours.send((question, how))
        while not self._ours.poll(0.1):
            if not self._process.is_alive():
                raise RuntimeError("the load generator has died; its error is above")
        answers: list[Answer] = self._ours.recv()
        return answers
