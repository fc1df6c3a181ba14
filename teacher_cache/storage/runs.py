"""Rows that follow one another: found among those asked for, and copied in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_LONG_RUN = 1024
"""Rows of a stretch, on average, from which a copy of each stretch is faster than one gather of all rows."""


def runs_of(places_N: NDArray[np.int64]) -> list[int] | None:
    """Where stretches of places that rise by one begin, and N; None where a gather of single places is faster.

    Args:
        places_N: in any order, repeats allowed; at least one.
    """
    count = len(places_N)
    # Of a random batch nothing more than its ends is looked at.
    if places_N[-1] - places_N[0] == count - 1 and _rises(places_N):
        return [0, count]
    if count < 2 * _LONG_RUN:
        return None
    breaks = places_N[1:] - places_N[:-1] != 1
    if count < _LONG_RUN * (1 + np.count_nonzero(breaks)):
        return None
    return [0, *(np.flatnonzero(breaks) + 1).tolist(), count]


def _rises(places_N: NDArray[np.int64]) -> bool:
    """Every place is above the one before: with ends as far apart as places are many, all rise by one."""
    return bool(np.count_nonzero(places_N[1:] > places_N[:-1]) == len(places_N) - 1)


def copy_bytes(target: NDArray[Any], source: NDArray[np.uint8]) -> None:
    """Copies bytes between arrays of one shape, whatever their addresses.

    NumPy copies arrays of one type by `memmove`, which on AMD's Zen 3 and 4 falls to a tenth of its speed where
    source and target lie almost alike in their pages (glibc, bug 30994), as chunks with their checksums do. Between
    signed and unsigned bytes it copies by vectors.
    """
    np.copyto(target.view(np.int8), source, casting="unsafe")
