"""The threads of a teacher: what is ready before the model is free, what is left out, whose thread does what."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_batching import LOGITS, ME, batching, blocked, logits_of
from toy_service_models import (
    CLASSES,
    SHAPE,
    ToyTeacher,
    WideNet,
    open_gate,
    toy_logits,
    toy_served,
    views,
    wait_until,
)

from services.assistant import Assistant, Between
from services.batching import Batcher
from services.wire import identity_of
from services.work import Fields, QueueFull, Request, TeacherFailed
from teacher_cache.spec import FieldSpec
from teacher_cache.teachers.torch_teacher import TorchTeacher


def between(batcher: Batcher) -> Between:
    """What passes between its threads."""
    return batcher._engine._between


def ready(batcher: Batcher, rows: int) -> None:
    """Waits until so many rows lie in the open batch."""
    wait_until(lambda: between(batcher).open.used == rows and not between(batcher).filling)


# ---------------------------------------------------------------- the next batch


def test_the_next_batch_is_put_together_while_the_model_is_busy() -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        blocked(teacher, batcher)
        first, second = views(3, 1), views(4, 2)
        answers = [batcher.submit(first, LOGITS, ME)]
        ready(batcher, 3)
        # What comes later still finds a place.
        answers.append(batcher.submit(second, LOGITS, ME))
        ready(batcher, 7)
        prepared = between(batcher).open.views_BCHW
        assert torch.equal(prepared[:7], torch.cat([first, second]))
        assert batcher.waiting == 7
        teacher.gate.set()
        assert [len(logits_of(answer)) for answer in answers] == [3, 4]
    assert torch.equal(teacher.batches[1][:7], torch.cat([first, second]))


def test_what_is_given_up_after_it_was_placed_does_not_reach_the_model() -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        blocked(teacher, batcher)
        dropped, kept = batcher.submit(views(3, 1), LOGITS, ME), batcher.submit(views(2, 2), LOGITS, ME)
        late = batcher.submit(views(2, 3), LOGITS, ME, time.monotonic() + 0.2)
        ready(batcher, 7)
        dropped.cancel()
        time.sleep(0.25)
        teacher.gate.set()
        assert torch.equal(logits_of(kept), toy_logits(views(2, 2)))
        assert late.exception(20) is not None
    assert len(teacher.batches) == 2
    assert torch.equal(teacher.batches[1][3:5], views(2, 2))
    assert not teacher.batches[1][:3].any()
    assert not teacher.batches[1][5:].any()


def test_a_batch_that_all_have_given_up_is_left_out() -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        inside = blocked(teacher, batcher)
        dropped = batcher.submit(views(8, 1), LOGITS, ME)
        ready(batcher, 8)
        dropped.cancel()
        teacher.gate.set()
        logits_of(inside), logits_of(batcher.submit(views(2, 2), LOGITS, ME))
    assert len(teacher.batches) == 2


def test_memory_is_used_again_without_a_trace() -> None:
    """Full batches and almost empty ones in turn: each is its own rows and zeros."""
    teacher = open_gate(ToyTeacher())
    with batching(teacher) as batcher:
        for number, rows in enumerate((8, 8, 3, 1, 5, 1, 8, 2)):
            logits_of(batcher.submit(views(rows, number), LOGITS, ME))
    for number, rows in enumerate((8, 8, 3, 1, 5, 1, 8, 2)):
        assert torch.equal(teacher.batches[number][:rows], views(rows, number))
        assert not teacher.batches[number][rows:].any()


def test_whoever_leaves_the_queue_makes_room_at_once() -> None:
    teacher = ToyTeacher()
    with batching(teacher, queue=24) as batcher:
        blocked(teacher, batcher)
        batcher.submit(views(8, 1), LOGITS, ME)
        ready(batcher, 8)
        waits = batcher.submit(views(16, 2), LOGITS, ME)
        with pytest.raises(QueueFull):
            batcher.submit(views(1, 3), LOGITS, "you")
        waits.cancel()
        assert batcher.waiting == 8
        batcher.submit(views(1, 3), LOGITS, "you")


def test_images_that_cannot_be_placed_are_their_own_requests_trouble() -> None:
    with batching(open_gate(ToyTeacher())) as batcher:
        with pytest.raises(TeacherFailed):
            logits_of(batcher.submit(torch.ones((2, 3, 9, 9), dtype=torch.uint8), LOGITS, ME))
        assert torch.equal(logits_of(batcher.submit(views(2), LOGITS, ME)), toy_logits(views(2)))


# ---------------------------------------------------------------- between callers


def test_a_flood_starves_nobody() -> None:
    teacher = ToyTeacher()
    with batching(teacher) as batcher:
        blocked(teacher, batcher)
        flood = [batcher.submit(views(8, number), LOGITS, "flood") for number in range(20)]
        ready(batcher, 8)
        mine = batcher.submit(views(8, 77), LOGITS, ME)
        teacher.gate.set()
        [logits_of(answer) for answer in (*flood, mine)]
    place = next(number for number, batch in enumerate(teacher.batches) if torch.equal(batch, views(8, 77)))
    # One image was in the model and one batch was ready; then the flood and the caller take turns.
    assert place in (2, 3)


def test_who_asks_what_a_flood_asks_too_does_not_wait_as_long() -> None:
    teacher, images = ToyTeacher(), views(8, 77)
    with batching(teacher) as batcher:
        blocked(teacher, batcher)
        flood = [batcher.submit(views(8, number), LOGITS, "flood") for number in range(20)]
        flood.append(batcher.submit(images, LOGITS, "flood", identity=identity_of(images)))
        mine = batcher.submit(images, LOGITS, ME, identity=identity_of(images))
        assert batcher.waiting == 21 * 8
        teacher.gate.set()
        [logits_of(answer) for answer in (*flood, mine)]
    assert len(teacher.batches) == 22
    assert any(torch.equal(batch, images) for batch in teacher.batches[:4])


# ---------------------------------------------------------------- threads


def test_teachers_beside_each_other_keep_their_threads_and_their_bits() -> None:
    before = torch.get_num_threads()
    alone, together = {}, {}
    fields = {"logits": FieldSpec()}
    served = {
        threads: replace(
            toy_served(TorchTeacher(WideNet(), {"wide": threads}, fields), threads=threads, name=f"wide-{threads}"),
            field_shapes={"logits": (CLASSES,)},
        )
        for threads in (1, 2, 3)
    }
    images = views(8, 5)
    for threads in served:
        torch.set_num_threads(threads)
        alone[threads] = served[threads].teacher(images)["logits"]
    torch.set_num_threads(before)
    assert not torch.equal(alone[1], alone[2])
    batchers = {threads: Batcher(one, 100, 60.0) for threads, one in served.items()}
    for batcher in batchers.values():
        batcher.start()
    try:
        for _ in range(5):
            asked = {threads: batcher.submit(images, LOGITS, ME) for threads, batcher in batchers.items()}
            together = {threads: logits_of(answer) for threads, answer in asked.items()}
            assert all(torch.equal(together[threads], alone[threads]) for threads in served)
    finally:
        for batcher in batchers.values():
            batcher.stop()
    assert torch.get_num_threads() == before


class Meddled(ToyTeacher):
    """Beside it another thread sets a number of threads of its own."""

    def __call__(self, views_BCHW: Tensor) -> dict[str, Tensor]:
        other = threading.Thread(target=torch.set_num_threads, args=(5,))
        other.start()
        other.join()
        return super().__call__(views_BCHW)


def test_a_number_that_another_thread_sets_is_not_taken_over() -> None:
    before = torch.get_num_threads()
    teacher = open_gate(Meddled())
    with batching(teacher, threads=3) as batcher:
        logits_of(batcher.submit(views(1), LOGITS, ME))
    assert set(teacher.threads) == {3}
    assert torch.get_num_threads() == before


@dataclass
class Example(ToyTeacher):
    """Notes what it is warmed with."""

    warmed: list[Tensor] = field(default_factory=list)

    def __call__(self, views_BCHW: Tensor) -> dict[str, Tensor]:
        self.warmed.append(views_BCHW.clone())
        return super().__call__(views_BCHW)


def test_a_teacher_is_warmed_with_its_own_example() -> None:
    teacher, example_CHW = open_gate(Example()), views(1, 3)[0]
    batcher = Batcher(replace(toy_served(teacher), example_CHW=example_CHW), 100, 60.0)
    batcher.start()
    wait_until(lambda: batcher.warm)
    batcher.stop()
    assert len(teacher.warmed) == 2
    assert all(torch.equal(batch, example_CHW.expand(8, *SHAPE)) for batch in teacher.warmed)


class Ends(ToyTeacher):
    """Ends its thread at the first image."""

    def __call__(self, views_BCHW: Tensor) -> dict[str, Tensor]:
        answer = super().__call__(views_BCHW)
        if views_BCHW.any():
            raise SystemExit
        return answer


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended() -> None:
    teacher = Ends()
    with batching(teacher) as batcher:
        inside = blocked(teacher, batcher)
        placed = batcher.submit(views(3, 1), LOGITS, ME)
        ready(batcher, 3)
        waits = batcher.submit(views(8, 1), LOGITS, ME)
        teacher.gate.set()
        for answer in (inside, placed, waits, batcher.submit(views(1), LOGITS, ME)):
            with pytest.raises(CancelledError):
                answer.result(20)


def test_answers_are_delivered_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining parts and waking those who wait costs the model no time."""
    where: list[str] = []
    finish = Request.finish

    def noted(request: Request) -> None:
        where.append(threading.current_thread().name)
        finish(request)

    monkeypatch.setattr(Request, "finish", noted)
    with batching(open_gate(ToyTeacher())) as batcher:
        logits_of(batcher.submit(views(20), LOGITS, ME))
    assert where == ["batches-toy"]


def test_a_part_of_a_batch_waits_until_the_last_answers_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks one after the other shares batches with the others who do."""
    teacher, out = ToyTeacher(), threading.Event()
    deliver = Assistant._deliver

    def held(assistant: Assistant, placed: Any, found: Any) -> None:
        deliver(assistant, placed, found)
        assert out.wait(20)

    with batching(teacher) as batcher:
        inside = blocked(teacher, batcher)
        monkeypatch.setattr(Assistant, "_deliver", held)
        answers: list[Future[Fields]] = [batcher.submit(views(1, 1), LOGITS, ME)]
        ready(batcher, 1)
        teacher.gate.set()
        logits_of(inside)
        answers.append(batcher.submit(views(1, 2), LOGITS, ME))
        out.set()
        [logits_of(answer) for answer in answers]
    assert len(teacher.batches) == 2
