"""Keeps the threads of a serving process from holding each other up."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

SWITCH_SECONDS = 0.0002
"""After which a thread that runs Python gives way to one that waits; Python's own default is 0.005."""


@contextlib.contextmanager
def short_pauses() -> Iterator[None]:
    """For as long as a server runs in this process; what it will keep, such as its teachers, is there already.

    A full garbage collection walks over all that is there, which with torch is a quarter of a second in which nobody is
    answered: that is set aside. And a model of many small operations asks for the interpreter after each of them, as an
    event loop does after each wait: whoever has it gives it up soon.
    """
    before = sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()


__all__ = ["SWITCH_SECONDS", "short_pauses"]
