"""How a request waits on the event loop: for much at once, and for what other threads will give."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from services.problems import Problem

_AT_ONCE = 8
"""Begun one after the other, each in a tenth of a millisecond."""

T = TypeVar("T")


async def together(work: Iterable[Awaitable[T]]) -> list[T]:
    """All results in order; where one fails the others are cancelled, and have ended, before that is told.

    Args:
        work: taken from, and begun, a few at a time, so that others of the event loop have their turns in between.
    """
    tasks = list[asyncio.Future[T]]()
    try:
        for each in work:
            tasks.append(asyncio.ensure_future(each))
            if len(tasks) % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def unless_stopped(asked: Future[T]) -> T:
    """A future's result; cancelled with whoever waits. Where the service has cancelled it, a 503 `Problem`."""
    answer: asyncio.Future[Any] = asyncio.wrap_future(asked)
    try:
        found: T = await answer
        return found
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        headers = {"Retry-After": "1"}
        raise Problem(503, "server", "must be running", "stopping", "Try again.", headers) from None
    finally:
        answer.cancel()


__all__ = ["together", "unless_stopped"]
