"""Step 8, view order: which of its K cached views a row shows in its n-th showing."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.views.philox import philox4x32

ViewOrder = Literal["epoch", "cycle", "random"]
"""`epoch`: all rows show view n mod K, so that an epoch reads one view's shards. `cycle`: each row goes through the
views in their order, from a view of its own: every batch has all views in it. `random`: in an order of its own, another
in each round of K showings."""

_PURPOSE = 0x4F524452
"""Sets these draws apart from those of views and of other purposes, which have the same seeds."""


def numbers(order: ViewOrder, showing: int, digests_B: NDArray[np.uint64], views: int, seed: int) -> NDArray[np.int64]:
    """The view that each row shows; in K showings, from a multiple of K on, each view once.

    A pure function of the sample's key: no row's order depends on which others there are.

    Args:
        order: see `ViewOrder`.
        showing: n, how often the rows have been shown before.
        digests_B: of the rows' keys, uint64.
        views: K.
        seed: of the run.

    Returns:
        int64 [B], each in 0..K−1.
    """
    turn, place = divmod(showing, views)
    match order:
        case "epoch":
            return np.full(len(digests_B), place, np.int64)
        case "cycle":
            return (_words(digests_B, 0, 1, seed)[:, 0].astype(np.int64) + place) % views
        case "random":
            # The order of K random words is a random order; a tie has no part in any but the tied.
            drawn_BK = _words(digests_B, turn, views, seed)
            return np.argsort(drawn_BK, axis=1, kind="stable")[:, place].astype(np.int64)


def _words(digests_B: NDArray[np.uint64], turn: int, count: int, seed: int) -> NDArray[np.uint32]:
    """At least `count` random words for each row, uint32 [B, …], cut to count."""
    blocks = -(-count // 4)
    counter = np.empty((len(digests_B), blocks, 4), np.uint32)
    counter[:, :, 0] = (digests_B & np.uint64(0xFFFFFFFF))[:, None]
    counter[:, :, 1] = (digests_B >> np.uint64(32))[:, None]
    counter[:, :, 2] = turn & 0xFFFFFFFF
    counter[:, :, 3] = np.arange(blocks)
    words = philox4x32(counter.reshape(-1, 4), (seed & 0xFFFFFFFF, _PURPOSE))
    return words.reshape(len(digests_B), 4 * blocks)[:, :count]
