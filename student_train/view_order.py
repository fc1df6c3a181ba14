"""Step 8, view order: which of its K cached views a row shows in its n-th showing."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.views.philox import view_words

ViewOrder = Literal["epoch", "cycle", "random"]
"""`epoch`: all rows show view n mod K, so that an epoch reads one view's shards. `cycle`: each row goes through the
views in their order, from a view of its own: every batch has all views in it. `random`: in an order of its own, another
in each round of K showings."""

_PURPOSE = 0x4F524452 << 32
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
            return (view_words(digests_B, 0, 0, 1, seed | _PURPOSE)[:, 0].astype(np.int64) + place) % views
        case "random":
            # The order of K random words is a random order; a tie has no part in any but the tied.
            drawn_BK = view_words(digests_B, turn, 0, -(-views // 4), seed | _PURPOSE)[:, :views]
            return np.argsort(drawn_BK, axis=1, kind="stable")[:, place].astype(np.int64)
