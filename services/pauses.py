"""Keeps the threads of a serving process from holding each other up."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

import torch

SWITCH_SECONDS = 0.0002
"""After which a thread that runs Python gives way to one that waits; Python's own default is 0.005."""


def set_aside() -> None:
    """Has no garbage collection look again at what is there now, such as teachers.

    A full one walks over all that is there, which with torch is a quarter of a second in which nobody is answered.
    """
    gc.collect()
    gc.freeze()


def own_threads(count: int) -> None:
    """Has torch compute with so many threads in this thread, whatever others set for theirs."""
    # torch gives a thread that has never asked whatever number was set last, by any thread: so ask, then set.
    torch.get_num_threads()
    torch.set_num_threads(count)


@contextlib.contextmanager
def short_pauses() -> Iterator[None]:
    """For as long as a server runs in this process; what it will keep, such as its teachers, is there already.

    That is set aside. And a model of many small operations asks for the interpreter after each of them, as an event
    loop does after each wait: whoever has it gives it up soon.
    """
    before = sys.getswitchinterval()
    set_aside()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()


__all__ = ["SWITCH_SECONDS", "own_threads", "set_aside", "short_pauses"]
