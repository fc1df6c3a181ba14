"""Where work is done that blocks: beside the event loop, or on it where to hand it over would take longer.

A thread has to be woken for it, and the loop to be told; on busy cores, and more so beside a model that asks for the
same interpreter after each of its operations, that is a good part of a millisecond, at each of a request's steps. A few
images are parsed in a tenth of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

SMALL = 2**15
"""Bytes of tensors; work on no more of them takes less than a millisecond."""
_JSON = 8
"""JSON takes so many times as long."""

T = TypeVar("T")


async def beside(work: Callable[[], T], size: float, *, as_json: bool = False) -> T:
    """What the work returns or raises; the event loop is not held up for longer than a millisecond.

    Args:
        work: blocks for no longer than it takes to go over so many bytes a few times.
        size: bytes; inf for what a size says nothing of, such as compressed files or a disk.
        as_json: whether they are written as text.
    """
    return work() if size * (_JSON if as_json else 1) <= SMALL else await asyncio.to_thread(work)


__all__ = ["SMALL", "beside"]
