"""The bounds of a queue: images, each caller's share, seconds, deadlines; and what it says of the time to come."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_service_models import SHAPE, ToyTeacher, toy_served, views

from services.backlog import Backlog
from services.estimate import Estimate
from services.settings import Settings
from services.state import make_service
from services.work import Expired, QueueFull, Request
from teacher_cache.errors import SpecError

SIZE = 8


class Clock:
    """The monotonic clock, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def batch(self, estimate: Estimate, seconds: float, times: int = 40) -> None:
        """Batches of one length, until their mean is known."""
        for _ in range(times):
            estimate.start()
            self.now += seconds
            estimate.stop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def ask(backlog: Backlog, caller: str, images: int, deadline: float = math.inf) -> Request:
    """A request that is let in."""
    backlog.require_room(caller, images, deadline)
    request = Request(("logits",), None, [None] * math.ceil(images / SIZE))
    request.join(deadline)
    backlog.add(request, caller, torch.split(views(images), SIZE))
    return request


def refused(asking: Callable[[], object]) -> int:
    """Retry-After of a refusal."""
    with pytest.raises(QueueFull) as full:
        asking()
    return full.value.retry_after


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), max_size=40), st.integers(1, 200))
def test_no_more_images_wait_than_may(asked: list[tuple[str, int]], most: int) -> None:
    backlog = Backlog(SIZE, most, 60)
    for caller, images in asked:
        before = backlog.waiting
        try:
            ask(backlog, caller, images)
        except QueueFull:
            assert backlog.waiting == before
            # Whoever has nothing there is sent away only where there is no room at all.
            assert backlog.lines.rows_of(caller) or before + images > most
        else:
            assert backlog.waiting == before + images <= most


def test_one_caller_leaves_room_for_others_and_two_get_the_same() -> None:
    backlog = Backlog(SIZE, 100, 60)
    for _ in range(80):
        ask(backlog, "flood", 1)
    assert refused(lambda: ask(backlog, "flood", 1)) >= 1
    for _ in range(16):
        ask(backlog, "me", 1)
    while backlog.lines.rows_of("flood") > 44:
        assert backlog.take(SIZE) is not None
    while True:
        try:
            ask(backlog, "me", 1)
        except QueueFull:
            break
    assert abs(backlog.lines.rows_of("me") - backlog.lines.rows_of("flood")) <= 4


def test_the_seconds_before_ones_own_work_are_bounded(clock: Clock) -> None:
    backlog = Backlog(SIZE, 1000, 3.5)
    clock.batch(backlog.estimate, 1.0)
    ask(backlog, "flood", 3 * SIZE)
    ask(backlog, "flood", SIZE)
    assert refused(lambda: ask(backlog, "flood", SIZE)) == 1
    backlog.estimate.start()
    assert refused(lambda: ask(backlog, "flood", SIZE)) == 2
    # Who does not queue behind the flood does not wait for it.
    ask(backlog, "me", SIZE)


def test_a_large_request_finds_an_empty_queue_however_long_it_takes(clock: Clock) -> None:
    backlog = Backlog(SIZE, 1000, 1.0)
    clock.batch(backlog.estimate, 1.0)
    ask(backlog, "me", 100 * SIZE)


def test_a_deadline_that_cannot_be_met_is_refused_at_once(clock: Clock) -> None:
    backlog = Backlog(SIZE, 1000, 60)
    clock.batch(backlog.estimate, 1.0)
    ask(backlog, "me", 4 * SIZE)
    backlog.require_room("me", SIZE, clock.now + 5.1)
    assert refused(lambda: backlog.require_room("me", SIZE, clock.now + 4.9)) == 1
    assert refused(lambda: backlog.require_room("me", SIZE, clock.now + 2.5)) == 3
    backlog.require_room("you", SIZE, clock.now + 2.1)
    backlog.estimate.start()
    assert refused(lambda: backlog.require_room("you", SIZE, clock.now + 2.1)) == 1
    clock.now += 1
    backlog.require_room("you", SIZE, clock.now + 2.1)
    with pytest.raises(Expired):
        backlog.require_room("you", SIZE, clock.now - 0.1)


def test_an_old_estimate_does_not_shut_the_door_of_a_free_model(clock: Clock) -> None:
    backlog = Backlog(SIZE, 1000, 60)
    clock.batch(backlog.estimate, 30.0)
    assert refused(lambda: backlog.require_room("me", 1, clock.now + 1)) >= 29
    clock.now += 11
    backlog.require_room("me", 1, clock.now + 1)
    ask(backlog, "you", 1)
    assert refused(lambda: backlog.require_room("me", 1, clock.now + 1)) >= 29


def test_what_would_be_late_leaves_its_place_to_others_before_it_is_late(clock: Clock) -> None:
    """A model that has fallen behind catches up, in place of giving late answers from there on."""
    backlog = Backlog(SIZE, 1000, 60)
    clock.batch(backlog.estimate, 1.0)
    late, later, last = (ask(backlog, "me", SIZE, clock.now + seconds) for seconds in (3.5, 4.5, 5.5))
    backlog.estimate.start()
    # Two batches' time and more, where one was expected: the first has half a second left, and a batch takes one.
    clock.now += 3
    backlog.estimate.stop(count=False)
    taken = backlog.take(SIZE)
    assert taken is not None
    assert taken.request is later
    assert isinstance(late.waiters[0].answer.exception(0), Expired)
    assert backlog.lines.rows == SIZE
    # The last one is in nobody's way: an estimate may be wrong.
    clock.now += 2
    taken = backlog.take(SIZE)
    assert taken is not None
    assert taken.request is last
    assert not last.waiters[0].answer.done()


def test_the_batch_in_the_model_counts_for_what_would_be_late(clock: Clock) -> None:
    backlog = Backlog(SIZE, 1000, 60)
    clock.batch(backlog.estimate, 1.0)
    first, second = (ask(backlog, "me", SIZE, clock.now + seconds) for seconds in (2.5, 3.5))
    clock.now += 1
    backlog.estimate.start()
    taken = backlog.take(SIZE)
    assert taken is not None
    assert taken.request is second
    assert isinstance(first.waiters[0].answer.exception(0), Expired)


def test_who_joined_with_more_time_still_gets_the_answer(clock: Clock) -> None:
    backlog = Backlog(SIZE, 1000, 60)
    clock.batch(backlog.estimate, 1.0)
    shared = ask(backlog, "me", SIZE, clock.now + 1.5)
    patient = shared.join(clock.now + 60)
    ask(backlog, "me", SIZE)
    clock.now += 1
    taken = backlog.take(SIZE)
    assert taken is not None
    assert taken.request is shared
    assert not any(waiter.answer.done() for waiter in shared.waiters), "the other may be in time yet"
    assert shared.waiters[1].answer is patient


def test_the_estimate_follows_and_doubts(clock: Clock) -> None:
    estimate = Estimate()
    assert estimate.seconds(10) == 0
    clock.batch(estimate, 1.0)
    assert estimate.seconds(10) == pytest.approx(10, rel=1e-3)
    clock.batch(estimate, 2.0, times=1)
    assert 1 < estimate.mean < 2
    assert estimate.seconds(10) > 10 * estimate.mean
    clock.batch(estimate, 2.0)
    assert estimate.mean == pytest.approx(2, rel=0.01)
    estimate.start()
    clock.now += 50
    estimate.stop(count=False)
    assert estimate.mean == pytest.approx(2, rel=0.01)


def test_the_mark_is_where_callers_are_sent_away(clock: Clock) -> None:
    backlog = Backlog(SIZE, 100, 5.0)
    ask(backlog, "a", 79)
    assert not backlog.full
    ask(backlog, "b", 1)
    assert backlog.full
    slow = Backlog(SIZE, 10_000, 5.0)
    clock.batch(slow.estimate, 1.0)
    ask(slow, "a", 5 * SIZE)
    assert not slow.full
    ask(slow, "b", 1)
    assert slow.full


def test_bytes_bound_the_images_of_each_teacher() -> None:
    one = 3 * 8 * 8
    assert toy_served(ToyTeacher()).view_bytes == one == math.prod(SHAPE)
    few = Settings(max_images=8, queue_images=100, queue_bytes=20 * one)
    batcher = make_service({"toy": toy_served(ToyTeacher())}, few).batchers["toy"]
    batcher.require_room("me", 20)
    assert refused(lambda: batcher.require_room("me", 21)) == 1
    with pytest.raises(SpecError, match="queue_bytes"):
        make_service({"toy": toy_served(ToyTeacher())}, Settings(max_images=8, queue_bytes=8 * one - 1))
    # A body holds less than max_images.
    body = Settings(max_images=1024, max_body_bytes=9 * one, queue_bytes=9 * one)
    make_service({"toy": toy_served(ToyTeacher())}, body)
