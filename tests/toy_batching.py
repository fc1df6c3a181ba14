"""What the batcher's tests share: one that is warm, and a model that is held."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from toy_service_models import ToyTeacher, toy_served, views, wait_until

from services.batching import Batcher
from services.work import Fields

LOGITS, ME = ("logits",), "me"


@contextmanager
def batching(teacher: ToyTeacher, *, queue: int = 1000, micro_batch: int = 8, threads: int = 1) -> Iterator[Batcher]:
    """A warm batcher, stopped at the end with the gate open."""
    batcher = Batcher(toy_served(teacher, micro_batch=micro_batch, threads=threads), queue, 60.0)
    batcher.start()
    wait_until(lambda: batcher.warm or teacher.broken)
    try:
        yield batcher
    finally:
        teacher.gate.set()
        batcher.stop()


def logits_of(answer: Future[Fields]) -> torch.Tensor:
    """Waits for an answer."""
    return answer.result(20)["logits"]


def blocked(teacher: ToyTeacher, batcher: Batcher) -> Future[Fields]:
    """Puts one image into the closed model, so that what follows must queue."""
    answer = batcher.submit(views(1, 99), LOGITS, ME)
    assert teacher.entered.acquire(timeout=20)
    return answer
