"""Philox4x32-10: random words that are a pure function of an address.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. Integer
arithmetic only, vectorised over addresses; tested against the known answers of the Random123 distribution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter_B4: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32.

    Args:
        counter_B4: uint32 [B, 4], the addresses.
        key: two 32-bit words.

    Returns:
        uint32 [B, 4]: four random words for each address.
    """
    c0, c1, c2, c3 = (counter_B4[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def view_words(digests_B: NDArray[np.uint64], view: int, operation: int, blocks: int, seed: int) -> NDArray[np.uint32]:
    """The random words of one operation of one view, for many samples at once.

    The counter is (sample digest low, high, view, operation · 2¹⁶ + block); the key is the recipe's seed.

    Args:
        digests_B: uint64 [B], digests of the samples' stable keys.
        view: view number, below 2³².
        operation: the operation's place in the recipe, below 2¹⁶.
        blocks: how many blocks of four words, below 2¹⁶.
        seed: 64-bit root seed of the recipe.

    Returns:
        uint32 [B, 4 · blocks].
    """
    if not (0 <= view < 2**32 and 0 <= operation < 2**16 and 0 <= blocks < 2**16 and 0 <= seed < 2**64):
        raise ValueError(f"address outside its range: {view=} {operation=} {blocks=} {seed=}")
    count = len(digests_B)
    counter = np.empty((count, blocks, 4), np.uint32)
    counter[:, :, 0] = (digests_B & _LOW)[:, None]
    counter[:, :, 1] = (digests_B >> _SHIFT)[:, None]
    counter[:, :, 2] = view
    counter[:, :, 3] = (operation << 16) + np.arange(blocks)
    return philox4x32(counter.reshape(-1, 4), (seed & 0xFFFFFFFF, seed >> 32)).reshape(count, 4 * blocks)


def below(words: NDArray[np.uint32], bound: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Integers in [0, bound) from 32-bit words by multiply-and-shift (Lemire 2019, without rejection).

    The probability of each value is off by less than bound / 2³², far below what pixels can show.
    """
    product = words.astype(np.uint64) * np.asarray(bound, np.uint64)
    return (product >> _SHIFT).astype(np.int64)


def unit(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Floats in [0, 1), exact multiples of 2⁻³²."""
    return words.astype(np.float64) * 2.0**-32


def chance(words: NDArray[np.uint32], p: float) -> NDArray[np.bool_]:
    """True with probability p, exact to 2⁻³²; p = 0 is never and p = 1 is always true."""
    return words.astype(np.uint64) < np.uint64(round(p * 2**32))
