"""`shuffled` is a bijection of 0..n−1 that looks random, and any part of it can be had alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from student_train.shuffle import shuffled

SEEDS = st.integers(0, 2**32 - 1)


@given(count=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 1000))
def test_every_row_comes_once(count: int, seed: int, epoch: int) -> None:
    rows = shuffled(np.arange(count), count, seed, epoch)
    assert sorted(rows.tolist()) == list(range(count))


@given(count=st.integers(2, 500), seed=SEEDS, data=st.data())
def test_a_part_equals_the_part_of_the_whole(count: int, seed: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1)))
    assert shuffled(places, count, seed, 3).tolist() == shuffled(np.arange(count), count, seed, 3)[places].tolist()


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(shuffled(np.arange(50), 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_places_spread_evenly() -> None:
    """Chi-square of where row 0..9 land in tenths of the order, 400 orders: 9 × 10 degrees of freedom."""
    tenths = np.zeros((10, 10))
    for epoch in range(400):
        rows = shuffled(np.arange(100), 100, 7, epoch)
        for place, row in enumerate(rows):
            if row < 10:
                tenths[row, place // 10] += 1
    chi_square = ((tenths - 40) ** 2 / 40).sum()
    # 99.9 % of such tables of fair orders lie between 53 and 140.
    assert 53 < chi_square < 140


def test_the_order_is_frozen() -> None:
    """A checkpoint stores a place, not an order: a change here would silently change what is left."""
    assert shuffled(np.arange(10), 10, 1, 2).tolist() == FROZEN


FROZEN = [3, 6, 1, 7, 5, 4, 9, 0, 2, 8]
