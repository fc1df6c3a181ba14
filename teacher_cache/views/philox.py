"""Philox4x32-10: random words that are a pure function of an address.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. Integer
arithmetic only, vectorised over addresses; tested against the known answers of the Random123 distribution.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_AT_ONCE = 2048
"""Addresses in one pass: their words stay in the processor's cache, and so do the repeated constants."""
_FIXED = 2**16


@lru_cache(maxsize=64)
def _constants(key: tuple[int, int], count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Multipliers [2·B] of (c0, c2), and the keys [rounds, 2·B] of (c2, c0), each repeated for every address."""
    multipliers = np.repeat(np.array(_MULTIPLIERS, np.uint64), count)
    keys = [[key[place] + number * _WEYL[place] & 0xFFFFFFFF for place in (1, 0)] for number in range(_ROUNDS)]
    return multipliers, np.repeat(np.array(keys, np.uint64), count, axis=1)


def philox4x32(counter_B4: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32.

    Args:
        counter_B4: uint32 [B, 4], the addresses.
        key: two 32-bit words.

    Returns:
        uint32 [B, 4]: four random words for each address.
    """
    if len(counter_B4) <= _AT_ONCE:
        return _rounds(counter_B4, key)
    parts = [_rounds(counter_B4[i : i + _AT_ONCE], key) for i in range(0, len(counter_B4), _AT_ONCE)]
    return np.concatenate(parts)


def _rounds(counter_B4: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    # Halves of a round in one array, in place, nothing broadcast: NumPy's calls are what a small batch costs.
    # Rounded up to a power of two: the constants of a few sizes serve every batch, and every rejection round.
    rows, count = len(counter_B4), 1 << max(6, (len(counter_B4) - 1).bit_length())
    even, product = np.empty(2 * count, np.uint64), np.empty(2 * count, np.uint64)
    even[:rows], even[count : count + rows] = counter_B4[:, 0], counter_B4[:, 2]
    even[rows:count] = even[count + rows :] = 0
    odd, low = np.empty(2 * count, np.uint64), np.empty(2 * count, np.uint64)
    odd[count : count + rows], odd[:rows] = counter_B4[:, 1], counter_B4[:, 3]
    odd[rows:count] = odd[count + rows :] = 0
    multipliers, rounds = _constants(key, count)
    for keys in rounds:
        np.multiply(even, multipliers, product)
        np.bitwise_and(product, _LOW, low)
        np.right_shift(product, _SHIFT, product)
        np.bitwise_xor(product, odd, odd)
        np.bitwise_xor(odd, keys, odd)
        # `odd` holds (c2, c0) of the next round and `low` (c3, c1): one swap of halves sets both right.
        even[:count], even[count:] = odd[count:], odd[:count]
        odd, low = low, odd
    words_B4 = np.empty((rows, 4), np.uint32)
    words_B4[:, 0], words_B4[:, 2] = even[:rows], even[count : count + rows]
    words_B4[:, 1], words_B4[:, 3] = odd[count : count + rows], odd[:rows]
    return words_B4


def _counters(
    digests_B: NDArray[np.uint64], view: int | NDArray[np.uint32], operation: int, first: int, blocks: int
) -> NDArray[np.uint32]:
    """Counters [B, blocks, 4]: (digest low, digest high, view, operation · 2¹⁶ + block)."""
    counter = np.empty((len(digests_B), blocks, 4), np.uint32)
    counter[:, :, 0] = (digests_B & _LOW)[:, None]
    counter[:, :, 1] = (digests_B >> _SHIFT)[:, None]
    counter[:, :, 2] = view if isinstance(view, int) else view[:, None]
    counter[:, :, 3] = (operation << 16) + np.arange(first, first + blocks)
    return counter


def _require_address(view: int, operation: int, blocks: int, seed: int) -> None:
    if not (0 <= view < 2**32 and 0 <= operation < 2**16 and 0 <= blocks < 2**16 and 0 <= seed < 2**64):
        raise ValueError(f"address outside its range: {view=} {operation=} {blocks=} {seed=}")


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
    _require_address(view, operation, blocks, seed)
    return Words(digests_B, view, operation, seed).blocks(0, blocks).reshape(len(digests_B), 4 * blocks)


def first_blocks(
    digests_B: NDArray[np.uint64], view: int | NDArray[np.uint32], operations: range, seed: int
) -> NDArray[np.uint32]:
    """Block 0 of several operations of one view [operations, B, 4], at the cost of about one."""
    _require_address(view if isinstance(view, int) else 0, operations.stop, 0, seed)
    counter = np.empty((len(operations), len(digests_B), 4), np.uint32)
    counter[:, :, 0] = digests_B & _LOW
    counter[:, :, 1] = digests_B >> _SHIFT
    counter[:, :, 2] = view
    counter[:, :, 3] = np.array(operations, np.uint32)[:, None] << np.uint32(16)
    return philox4x32(counter.reshape(-1, 4), (seed & 0xFFFFFFFF, seed >> 32)).reshape(counter.shape)


class Words:
    """The random words of one operation of one view of many samples, made block by block as they are asked for."""

    def __init__(
        self,
        digests_B: NDArray[np.uint64],
        view: int | NDArray[np.uint32],
        operation: int,
        seed: int,
        first_B4: NDArray[np.uint32] | None = None,
    ) -> None:
        """Names the addresses.

        Args:
            digests_B: uint64 [B], digests of the samples' stable keys.
            view: one view number for all samples, or uint32 [B], one for each.
            operation: the operation's place in the recipe.
            seed: 64-bit root seed of the recipe.
            first_B4: block 0, where `first_blocks` has made it already.
        """
        _require_address(view if isinstance(view, int) else 0, operation, 0, seed)
        self._first = first_B4
        self._digests, self._view, self._operation = digests_B, view, operation
        self._key = (seed & 0xFFFFFFFF, seed >> 32)

    def __len__(self) -> int:
        return len(self._digests)

    def block(self, number: int, rows: NDArray[np.intp] | None = None) -> NDArray[np.uint32]:
        """Four words [B, 4] of each sample, or of the samples at these places only."""
        if number == 0 and self._first is not None:
            return self._first if rows is None else self._first[rows]
        return self.blocks(number, 1, rows)[:, 0]

    def blocks(self, first: int, count: int, rows: NDArray[np.intp] | None = None) -> NDArray[np.uint32]:
        """Several blocks [B, count, 4] at once, at little more than the cost of one."""
        digests, view = self._digests, self._view
        if rows is not None:
            digests, view = digests[rows], view if isinstance(view, int) else view[rows]
        counters = _counters(digests, view, self._operation, first, count)
        return philox4x32(counters.reshape(-1, 4), self._key).reshape(counters.shape)


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


def fixed_point(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers that are no integers are kept as multiples of 2⁻¹⁶, halves to even."""
    return np.rint(values * _FIXED).astype(np.int64)


def number(fixed: int) -> float:
    """The number behind a stored multiple of 2⁻¹⁶, exactly."""
    return fixed / _FIXED
