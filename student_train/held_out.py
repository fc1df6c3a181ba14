"""Rows that no step of training sees: what is chosen is chosen by them, and the test data stays unseen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from student_train.data import Rows
from teacher_cache.errors import SpecError
from teacher_cache.views.philox import view_words

_PURPOSE = 0x48454C44 << 32
"""Sets these draws apart from those of views and orders, which have the same seeds."""


def split(data: Rows, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows to train on, and those that are held out.

    A row is held out by its sample's key: adding, removing or reordering samples moves no other from one part to the
    other, so the held-out part has about, not exactly, this share.

    Args:
        data: all rows.
        share: 0 < share < 1.
        seed: another seed holds out others.

    Raises:
        SpecError: one of the parts would be empty.
    """
    digests_B = data.key_digests[data.alive]
    drawn_B = view_words(digests_B, 0, 0, 1, seed | _PURPOSE)[:, 0] / 2**32
    held_B = drawn_B < share
    if held_B.all() or not held_B.any():
        hint = "Choose another share or seed, or give more rows."
        raise SpecError("validation.share", f"must leave rows in both parts of {len(held_B)}", share, hint)
    return data.alive[~held_B], data.alive[held_B]
