"""Lines: fair between callers, first come first served within one, first fit, and nobody passed for ever."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import torch
from hypothesis import given
from hypothesis import strategies as st

from services.lines import Lines
from services.work import Piece, Request

SIZE = 8
NAMES = st.sampled_from("abcd")
ROWS = st.integers(1, SIZE)


@dataclass
class Queue:
    """Lines, and what a batcher does with them."""

    lines: Lines = field(default_factory=lambda: Lines(SIZE))
    numbers: count[int] = field(default_factory=count)
    callers: dict[int, str] = field(default_factory=dict)

    def add(self, caller: str, rows: int) -> Piece:
        """A piece of its own request, at the end of a line."""
        images_BCHW = torch.empty((rows, 1, 1, 1), dtype=torch.uint8)
        piece = Piece(Request(("logits",), None, [None]), 0, images_BCHW, next(self.numbers))
        self.callers[piece.number] = caller
        self.lines.add(caller, piece)
        return piece

    def batch(self) -> list[Piece]:
        """What the next batch would hold."""
        pieces: list[Piece] = []
        while (found := self.lines.take(SIZE - sum(piece.rows for piece in pieces))) is not None:
            caller, piece = found
            assert caller == self.callers[piece.number]
            self.lines.charge(caller, piece.rows)
            pieces.append(piece)
        return pieces

    def rows(self, batch: list[Piece], caller: str) -> int:
        """Of one caller in a batch."""
        return sum(piece.rows for piece in batch if self.callers[piece.number] == caller)


@given(st.lists(st.tuples(NAMES, ROWS), max_size=60))
def test_everything_comes_out_once_and_batches_are_never_too_full(asked: list[tuple[str, int]]) -> None:
    queue = Queue()
    added = [queue.add(caller, rows) for caller, rows in asked]
    batches = []
    while queue.lines.rows:
        batches.append(queue.batch())
    assert sorted(piece.number for batch in batches for piece in batch) == [piece.number for piece in added]
    assert all(0 < sum(piece.rows for piece in batch) <= SIZE for batch in batches)
    assert not queue.lines.fits(SIZE)
    assert queue.batch() == []


@given(st.lists(st.tuples(NAMES, ROWS), min_size=1, max_size=60))
def test_within_a_line_only_what_did_not_fit_is_passed(asked: list[tuple[str, int]]) -> None:
    queue = Queue()
    for caller, rows in asked:
        queue.add(caller, rows)
    taken: list[Piece] = []
    while batch := queue.batch():
        room = SIZE
        for piece in batch:
            later = [*queue.lines.pieces(), *batch[batch.index(piece) + 1 :]]
            line = [one for one in later if queue.callers[one.number] == queue.callers[piece.number]]
            passed = [one for one in line if one.number < piece.number]
            assert all(one.rows > room for one in passed)
            room -= piece.rows
        taken += batch
    assert len(taken) == len(asked)


@given(st.lists(ROWS, min_size=40, max_size=80), st.lists(ROWS, min_size=1, max_size=20))
def test_a_flood_in_front_of_a_caller_costs_it_no_more_than_its_own_share(flood: list[int], mine: list[int]) -> None:
    """Whatever has queued before: once it asks, nobody else gets more than it gets, but for two pieces."""
    queue = Queue()
    for rows in flood:
        queue.add("flood", rows)
    queue.batch()
    pieces = {queue.add("me", rows).number for rows in mine}
    theirs = ours = 0
    while pieces:
        batch = queue.batch()
        pieces -= {piece.number for piece in batch}
        if pieces:
            theirs, ours = theirs + queue.rows(batch, "flood"), ours + queue.rows(batch, "me")
            assert theirs <= ours + 2 * SIZE


@given(st.lists(st.tuples(NAMES, ROWS), min_size=30, max_size=60), st.integers(1, 3), NAMES)
def test_a_large_piece_is_not_passed_for_ever(before: list[tuple[str, int]], small: int, caller: str) -> None:
    """Though small ones go on coming in every line, its own too, and always fit."""
    queue = Queue()
    for name, rows in before:
        queue.add(name, min(rows, small))
    large = queue.add(caller, SIZE)
    for _ in range(len(before) + 8):
        if any(piece is large for piece in queue.batch()):
            return
        for name in "abcd":
            for _ in range(SIZE):
                queue.add(name, small)
    raise AssertionError("it still waits")


def test_who_comes_back_has_not_saved_up_time() -> None:
    queue = Queue()
    for _ in range(20):
        queue.add("a", SIZE)
    for _ in range(10):
        queue.batch()
    for _ in range(20):
        queue.add("b", SIZE)
    assert [queue.callers[queue.batch()[0].number] for _ in range(6)] == ["a", "b", "a", "b", "a", "b"]


def test_a_line_that_is_empty_for_a_moment_is_known() -> None:
    """Asking for one large piece at a time, each when the last is taken, gets no more than half."""
    queue = Queue()
    for _ in range(100):
        queue.add("a", 1)
    given = {"a": 0, "b": 0}
    while given["a"] < 50:
        if not queue.lines.rows_of("b"):
            queue.add("b", 4)
        found = queue.lines.take(SIZE)
        assert found is not None
        caller, piece = found
        queue.lines.charge(caller, piece.rows)
        given[caller] += piece.rows
    assert 40 <= given["b"] <= 60


def test_what_was_given_up_costs_nothing() -> None:
    queue = Queue()
    for piece in [queue.add("a", SIZE) for _ in range(10)]:
        queue.lines.remove(piece)
    for _ in range(3):
        queue.add("b", 1)
    piece = queue.add("a", 1)
    assert piece in queue.batch()[:2]


def test_a_piece_in_two_lines_goes_from_the_first_and_counts_once() -> None:
    queue = Queue()
    for _ in range(5):
        queue.add("a", SIZE)
    shared = queue.add("a", 2)
    queue.lines.add("b", shared, again=True)
    assert queue.lines.rows == 5 * SIZE + 2
    queue.callers[shared.number] = "b"
    queue.batch()
    assert shared in queue.batch()
    assert queue.lines.rows_of("b") == 0
    assert queue.lines.rows == queue.lines.rows_of("a") == 4 * SIZE


def test_what_goes_before_is_told_by_how_batches_fill() -> None:
    queue = Queue()
    assert [queue.lines.load(rows) for rows in (1, 4, 5, 8, 9, 13)] == [1, 4, 8, 8, 9, 16]
    for _ in range(10):
        queue.add("flood", SIZE)
    queue.add("few", 1)
    # One's own, as much again of the flood, and the little that another has.
    assert queue.lines.load_before("me", SIZE) == SIZE + SIZE + 1
    assert queue.lines.load_before("flood", 0) == 10 * SIZE + 1
    assert queue.lines.load_before("nobody", 0) == 0
