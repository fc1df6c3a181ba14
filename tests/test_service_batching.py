"""The batcher: what shares a batch, where it lies, what is dropped, and who survives a poison."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_batching import LOGITS, ME, batching, blocked, logits_of
from toy_service_models import POISON, ToyTeacher, open_gate, toy_logits, toy_served, views, wait_until

from services.batching import Batcher
from services.wire import identity_of
from services.work import Expired, QueueFull, TeacherFailed


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 9))
def test_every_request_gets_its_own_rows_whatever_shares_its_batches(sizes: list[int], micro_batch: int) -> None:
    teacher = open_gate(ToyTeacher())
    with batching(teacher, micro_batch=micro_batch) as batcher:
        asked = [views(size, seed) for seed, size in enumerate(sizes)]
        answers = [batcher.submit(images, LOGITS, ME) for images in asked]
        for images, answer in zip(asked, answers, strict=True):
            assert torch.equal(logits_of(answer), toy_logits(images))
        assert batcher.waiting == 0
    assert {len(batch) for batch in teacher.batches} == {micro_batch}
    rows = sum(int((batch != 0).flatten(1).any(1).sum()) for batch in teacher.batches)
    assert rows == sum(sizes)


def test_waiting_requests_share_a_batch_and_the_rest_is_zeros() -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        blocked(teacher, batcher)
        first, second = views(3, 1), views(2, 2)
        answers = [batcher.submit(first, LOGITS, ME), batcher.submit(second, LOGITS, ME)]
        teacher.gate.set()
        [logits_of(answer) for answer in answers]
    assert len(teacher.batches) == 2
    assert torch.equal(teacher.batches[1][:5], torch.cat([first, second]))
    assert not teacher.batches[1][5:].any()


def test_a_full_micro_batch_travels_alone_however_requests_are_mixed() -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        blocked(teacher, batcher)
        small, large = views(3, 1), views(19, 2)
        answers = [
            batcher.submit(small, LOGITS, ME),
            batcher.submit(large, LOGITS, ME),
            batcher.submit(small, LOGITS, ME),
        ]
        teacher.gate.set()
        [logits_of(answer) for answer in answers]
    # First fit: the tail of three joins the small request in front, and the full pieces stay as they are.
    _, mixed, first, second, last = teacher.batches
    assert torch.equal(mixed[:6], torch.cat([small, large[16:]]))
    assert torch.equal(first, large[:8])
    assert torch.equal(second, large[8:16])
    assert torch.equal(last[:3], small)


def test_only_the_fields_that_were_asked_for_come_back() -> None:
    with batching(open_gate(ToyTeacher())) as batcher:
        images = views(2)
        found = batcher.submit(images, ("feature:pixels",), ME).result(20)
        assert list(found) == ["feature:pixels"]
        assert torch.equal(found["feature:pixels"], images.float())


def test_cancelled_work_never_reaches_the_model() -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        blocked(teacher, batcher)
        dropped, kept = batcher.submit(views(8, 1), LOGITS, ME), batcher.submit(views(2, 2), LOGITS, ME)
        assert dropped.cancel()
        teacher.gate.set()
        logits_of(kept)
    assert not any(torch.equal(batch, views(8, 1)) for batch in teacher.batches)
    assert len(teacher.batches) == 2


def test_late_work_never_reaches_the_model() -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        blocked(teacher, batcher)
        late = batcher.submit(views(1, 1), LOGITS, ME, deadline=time.monotonic() + 0.01)
        kept = batcher.submit(views(2, 2), LOGITS, ME, deadline=time.monotonic() + 60)
        time.sleep(0.03)
        teacher.gate.set()
        logits_of(kept)
        with pytest.raises(Expired):
            late.result(20)
    present = (teacher.batches[1] != 0).flatten(1).any(1)
    assert torch.equal(teacher.batches[1][present], views(2, 2))


def test_the_queue_is_bounded_in_images_and_says_when_to_come_back() -> None:
    teacher = ToyTeacher()
    with batching(teacher, queue=10) as batcher:
        blocked(teacher, batcher)
        kept = batcher.submit(views(7), LOGITS, ME)
        assert not batcher.full
        with pytest.raises(QueueFull) as refused:
            batcher.submit(views(4), LOGITS, ME)
        assert refused.value.retry_after >= 1
        assert batcher.waiting == 7
        batcher.submit(views(3), LOGITS, ME)
        assert batcher.full
        teacher.gate.set()
        logits_of(kept)
        wait_until(lambda: batcher.waiting == 0)
        assert not batcher.full


@pytest.mark.parametrize("place", [0, 3, 6])
def test_the_neighbours_of_a_poison_get_their_answers_from_the_same_places(place: int) -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        blocked(teacher, batcher)
        asked = [views(1, seed) for seed in range(7)]
        asked[place][0, 0, 0, 0] = POISON
        answers = [batcher.submit(images, LOGITS, ME) for images in asked]
        teacher.gate.set()
        for number, (images, answer) in enumerate(zip(asked, answers, strict=True)):
            if number == place:
                with pytest.raises(TeacherFailed):
                    answer.result(20)
            else:
                assert torch.equal(logits_of(answer), toy_logits(images))
        # The thread goes on.
        assert torch.equal(logits_of(batcher.submit(views(2), LOGITS, ME)), toy_logits(views(2)))
    shared = teacher.batches[1]
    for batch in teacher.batches[2:-1]:
        present = (batch != 0).flatten(1).any(1)
        assert torch.equal(batch[present], shared[present])


def test_one_poisonous_piece_fails_its_whole_request_once() -> None:
    teacher = open_gate(ToyTeacher())
    images = views(20)
    images[9, 0, 0, 0] = POISON
    with batching(teacher) as batcher:
        with pytest.raises(TeacherFailed):
            logits_of(batcher.submit(images, LOGITS, ME))
        logits_of(batcher.submit(views(1), LOGITS, ME))


def test_a_teacher_that_cannot_run_is_never_warm() -> None:
    teacher = open_gate(ToyTeacher(broken=True))
    with batching(teacher) as batcher:
        with pytest.raises(TeacherFailed):
            logits_of(batcher.submit(views(1), LOGITS, ME))
        assert not batcher.warm


def test_an_answer_of_another_shape_is_a_failure() -> None:
    teacher = open_gate(ToyTeacher())
    with batching(teacher) as batcher:
        object.__setattr__(batcher._engine._served, "field_shapes", {"logits": (3,)})
        with pytest.raises(TeacherFailed):
            logits_of(batcher.submit(views(1), LOGITS, ME))


def test_the_model_runs_in_its_thread_with_its_number_of_torch_threads() -> None:
    before = torch.get_num_threads()
    teacher = open_gate(ToyTeacher())
    with batching(teacher, threads=before + 1) as batcher:
        logits_of(batcher.submit(views(1), LOGITS, ME))
    assert set(teacher.threads) == {before + 1}
    assert torch.get_num_threads() == before


def test_stopping_ends_the_batch_in_the_model_and_cancels_the_rest() -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        inside = blocked(teacher, batcher)
        waiting = batcher.submit(views(3), LOGITS, ME)
        teacher.gate.set()
        batcher.stop()
        assert torch.equal(logits_of(inside), toy_logits(views(1, 99)))
        assert waiting.cancelled()
        with pytest.raises(CancelledError):
            batcher.submit(views(1), LOGITS, ME).result(1)


class TestIdenticalQuestions:
    """Who asks what is asked already adds no work, and loses nothing by it."""

    def test_a_hundred_cost_one_forward_pass(self) -> None:
        teacher, images = ToyTeacher(), views(3, 1)
        with batching(teacher) as batcher:
            blocked(teacher, batcher)
            answers = [batcher.submit(images.clone(), LOGITS, ME, identity=identity_of(images)) for _ in range(100)]
            assert batcher.waiting == 3
            teacher.gate.set()
            assert all(torch.equal(logits_of(answer), toy_logits(images)) for answer in answers)
        assert len(teacher.batches) == 2

    def test_while_the_model_is_at_it_one_more_may_join(self) -> None:
        teacher, images = ToyTeacher(), views(1, 1)
        with batching(teacher) as batcher:
            first = batcher.submit(images, LOGITS, ME, identity=identity_of(images))
            assert teacher.entered.acquire(timeout=20)
            second = batcher.submit(images, LOGITS, ME, identity=identity_of(images))
            teacher.gate.set()
            assert torch.equal(logits_of(first), logits_of(second))
        assert len(teacher.batches) == 1

    def test_an_answered_question_is_asked_anew(self) -> None:
        """Nothing is kept: keeping answers is the cache's affair."""
        teacher, images = open_gate(ToyTeacher()), views(1, 1)
        with batching(teacher) as batcher:
            for _ in range(2):
                logits_of(batcher.submit(images, LOGITS, ME, identity=identity_of(images)))
        assert len(teacher.batches) == 2

    def test_other_fields_are_another_question(self) -> None:
        teacher, images = ToyTeacher(), views(1, 1)
        with batching(teacher) as batcher:
            blocked(teacher, batcher)
            one = batcher.submit(images, LOGITS, ME, identity=identity_of(images))
            other = batcher.submit(images, ("feature:pixels",), ME, identity=identity_of(images))
            teacher.gate.set()
            assert list(one.result(20)) == ["logits"]
            assert list(other.result(20)) == ["feature:pixels"]

    def test_the_one_who_came_first_may_leave(self) -> None:
        teacher, images = ToyTeacher(), views(2, 1)
        with batching(teacher) as batcher:
            blocked(teacher, batcher)
            first, second = (batcher.submit(images, LOGITS, ME, identity=identity_of(images)) for _ in range(2))
            assert first.cancel()
            teacher.gate.set()
            assert torch.equal(logits_of(second), toy_logits(images))

    def test_each_has_a_deadline_of_its_own(self) -> None:
        teacher, images = ToyTeacher(), views(2, 1)
        with batching(teacher) as batcher:
            blocked(teacher, batcher)
            soon, later = time.monotonic() + 0.01, time.monotonic() + 60
            late, kept = (batcher.submit(images, LOGITS, ME, when, identity_of(images)) for when in (soon, later))
            time.sleep(0.03)
            teacher.gate.set()
            assert torch.equal(logits_of(kept), toy_logits(images))
            with pytest.raises(Expired):
                late.result(20)

    def test_nobody_joins_what_was_given_up(self) -> None:
        teacher, images = ToyTeacher(), views(2, 1)
        with batching(teacher) as batcher:
            last = blocked(teacher, batcher)
            batcher.submit(images, LOGITS, ME, identity=identity_of(images)).cancel()
            kept = batcher.submit(views(1, 5), LOGITS, ME)
            teacher.gate.set()
            logits_of(last), logits_of(kept)
            again = batcher.submit(images, LOGITS, ME, identity=identity_of(images))
            assert torch.equal(logits_of(again), toy_logits(images))

    def test_a_failure_is_told_to_all_and_not_kept(self) -> None:
        teacher, images = ToyTeacher(), views(1, 1)
        images[0, 0, 0, 0] = POISON
        with batching(teacher) as batcher:
            blocked(teacher, batcher)
            answers = [batcher.submit(images, LOGITS, ME, identity=identity_of(images)) for _ in range(3)]
            teacher.gate.set()
            for answer in answers:
                with pytest.raises(TeacherFailed):
                    answer.result(20)
            assert not batcher._backlog._asked

    def test_stopping_cancels_all_who_wait(self) -> None:
        teacher, images = ToyTeacher(), views(1, 1)
        with batching(teacher) as batcher:
            blocked(teacher, batcher)
            answers = [batcher.submit(images, LOGITS, ME, identity=identity_of(images)) for _ in range(3)]
            threading.Timer(0.05, teacher.gate.set).start()
            batcher.stop()
            assert all(answer.cancelled() for answer in answers)

    @given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
    def test_whoever_stays_gets_the_right_answer(self, asked: list[tuple[int, bool]]) -> None:
        """Any questions in any order, some given up, each computed at most as often as it was asked alone."""
        teacher = ToyTeacher()
        with batching(teacher, micro_batch=4) as batcher:
            blocked(teacher, batcher)
            answers = []
            for number, stays in asked:
                images = views(1 + number, number)
                answers.append((images, batcher.submit(images, LOGITS, ME, identity=identity_of(images)), stays))
            for _, answer, stays in answers:
                if not stays:
                    answer.cancel()
            teacher.gate.set()
            for images, answer, stays in answers:
                if stays:
                    assert torch.equal(logits_of(answer), toy_logits(images))
            wait_until(lambda: batcher.waiting == 0)
        rows = sum(int((batch != 0).flatten(1).any(1).sum()) for batch in teacher.batches) - 1
        assert rows == sum(1 + number for number in {number for number, stays in asked if stays})


@given(st.integers(0, 5), st.integers(1, 4))
def test_identities_tell_pixels_order_and_shape_apart(seed: int, count: int) -> None:
    images = views(count, seed)
    assert identity_of(images) == identity_of(images.clone())
    other = images.clone()
    other[-1, 0, 0, 0] ^= 1
    assert identity_of(other) != identity_of(images)
    assert identity_of(images.flip(0)) != identity_of(images) or count == 1
    flat = images.reshape(count, 1, images.shape[1] * images.shape[2], images.shape[3])
    assert identity_of(flat) != identity_of(images)


def test_what_has_room_as_a_whole_is_let_in_part_by_part() -> None:
    """A request of many parts is asked about once: its first parts do not shut the door on its last."""
    teacher = ToyTeacher()
    batcher = Batcher(toy_served(teacher), 100, 1e-9)
    batcher.start()
    try:
        wait_until(lambda: batcher.warm)
        blocked(teacher, batcher)
        wait_until(lambda: batcher._backlog.estimate.seconds(0) == 0)
        batcher.require_room("you", 40, time.monotonic() + 60)
        answers = [batcher.submit(views(8, number), LOGITS, "you") for number in range(5)]
        teacher.gate.set()
        assert all(
            torch.equal(logits_of(answer), toy_logits(views(8, number))) for number, answer in enumerate(answers)
        )
    finally:
        teacher.gate.set()
        batcher.stop()
