"""A shuffle without a permutation in memory: place to row in O(1), the same for any number of workers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teacher_cache.views.philox import philox4x32

_ROUNDS = 4


def shuffled(places: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The rows that stand at some places of an epoch's order: a bijection of 0..count−1.

    A Feistel network of four Philox rounds over the smallest even number of bits that holds `count`; values that
    fall outside walk on until they fall inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002).

    Args:
        places: int64 [B], each in 0..count−1.
        count: how many rows there are.
        seed: 32-bit seed of the run.
        epoch: another epoch has another order.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    rows = places.astype(np.uint64)
    outside = np.ones(len(rows), np.bool_)
    while outside.any():
        rows[outside] = _feistel(rows[outside], half, (seed & 0xFFFFFFFF, epoch & 0xFFFFFFFF))
        outside = rows >= count
    return rows.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, key: tuple[int, int]) -> NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    counter = np.zeros((len(values), 4), np.uint32)
    for number in range(_ROUNDS):
        counter[:, 0], counter[:, 1] = right & np.uint64(0xFFFFFFFF), number
        mixed = philox4x32(counter, key)[:, 0].astype(np.uint64) & mask
        left, right = right, left ^ mixed
    return (left << shift) | right
