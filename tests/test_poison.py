"""Bisection: exactly the samples that kill alone, within the bound of probes; everything else is an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_builds import addition_of

from teacher_cache.errors import BuildError, CorruptionError
from teacher_cache.poison import KILLED, MOST, find_poison, is_current, is_note, known_poison, note_poison
from teacher_cache.receipts import Receipt
from teacher_cache.storage.local_root import LocalRoot


class Probes:
    """Counts, and dies where the rows hold poison."""

    def __init__(self, dies: Callable[[Sequence[int]], bool]) -> None:
        self.dies, self.asked = dies, []  # type: ignore[var-annotated]

    def __call__(self, rows: Sequence[int]) -> bool:
        self.asked.append(tuple(rows))
        return self.dies(rows)


@given(st.data())
def test_every_poison_row_is_found_and_no_other(data: st.DataObject) -> None:
    """Rows with gaps, as they are where some are left out already."""
    rows = sorted(data.draw(st.sets(st.integers(100, 400), min_size=2, max_size=200)))
    poison = data.draw(st.sets(st.sampled_from(rows), min_size=1, max_size=min(MOST, len(rows) - 1)))
    attempts = data.draw(st.integers(1, 4))
    probes = Probes(lambda asked: bool(poison.intersection(asked)))
    assert find_poison("here", rows, probes, attempts) == tuple(sorted(poison))
    assert len(probes.asked) <= 1 + (MOST + 1) * (2 * math.ceil(math.log2(len(rows))) + attempts)
    for row in poison:
        assert probes.asked.count((row,)) == attempts, "each is seen to kill alone, as often as it may"


def test_a_shard_of_one_row() -> None:
    assert find_poison("here", [7], Probes(lambda rows: 7 in rows), 3) == (7,)


@pytest.mark.parametrize(
    ("dies", "message"),
    [
        (lambda rows: True, "without a sample"),
        (lambda rows: len(rows) > 3, "neither half alone"),
        (lambda rows: {3, 12} <= set(rows), r"no single sample.*rows 0\.\.15"),
        (lambda rows: False, "neither half alone"),
        (lambda rows: len(rows) > 0, f"more than {MOST}"),
    ],
)
def test_where_no_sample_is_to_blame(dies: Callable[[Sequence[int]], bool], message: str) -> None:
    """The machine, the size, two samples together, chance, the model."""
    with pytest.raises(BuildError, match=f"view 1, shard 2: killed its worker 3 times.*{message}") as caught:
        find_poison("view 1, shard 2", range(16), Probes(dies), 3)
    assert "serial" in caught.value.hint


def test_every_row_of_a_small_shard() -> None:
    """Eight of eight are not more than `MOST`, and still it is not the samples."""
    with pytest.raises(BuildError, match="every one of its samples"):
        find_poison("here", range(MOST), Probes(lambda rows: len(rows) > 0), 1)


def test_a_row_that_kills_now_and_then() -> None:
    """A worker killed from outside while a probe ran is no reason for a tombstone."""
    probes = Probes(lambda rows: 5 in rows and probes.asked.count((5,)) < 2)
    with pytest.raises(BuildError, match="row 5 alone kills now and then only"):
        find_poison("here", range(16), probes, 3)


def test_what_is_noted_is_known(built: Path, tmp_path: Path) -> None:
    """The rows that kill, whichever view they killed in; a note of another cache is refused."""
    root, addition = LocalRoot(tmp_path), addition_of(built)
    note_poison(root, addition, 0, 2, [17])
    note_poison(root, addition, 1, 2, [18, 17])
    note_poison(root, addition, 1, 0, [3])
    assert known_poison(root, addition) == {0: (3,), 2: (17, 18)}
    assert all(is_note(name) for name in root.names())
    note_poison(root, addition, 1, 1, [3])
    with pytest.raises(CorruptionError, match="must be of this cache and of its shard"):
        known_poison(root, addition)
    stranger = addition.model_copy(update={"identity": addition.identity.model_copy(update={"teacher": "x"})})
    with pytest.raises(CorruptionError, match="poison/v0000-s000002"):
        known_poison(root, stranger)


def test_what_must_be_made_again() -> None:
    """A shard is done when it was made without every row of its range that kills in any view."""
    broken = (20, "cannot be decoded")
    made = {
        ((17, KILLED), (18, KILLED), broken): True,
        ((17, "no such file"), (18, KILLED), broken): True,
        ((17, KILLED), broken): False,
        (broken,): False,
    }
    for tombstones, done in made.items():
        receipt = Receipt("", 0, 2, (), tombstones, np.zeros(8, np.uint64), 0, 0, {})
        assert is_current(receipt, (17, 18)) == done
        assert is_current(receipt, ())
