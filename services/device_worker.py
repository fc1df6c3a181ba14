"""What runs in a device's process: each of its teachers in a thread, asked over a connection."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from services.pauses import own_threads, set_aside
from services.request_log import frames_of
from services.work import Fields
from teacher_cache.plan import load_here
from teacher_cache.spec import BuildSpec
from teacher_cache.teachers import Teacher
from teacher_cache.views import open_recipe


@dataclass(frozen=True)
class Known:
    """The first word: a teacher is loaded."""

    fingerprint: str
    fields: tuple[str, ...]
    device: str
    threads: int | None


@dataclass(frozen=True)
class Failed:
    """In place of an answer."""

    error: BaseException
    at: tuple[str, ...]
    """Where it was raised: file, line and function, outermost first."""

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """An error that can be sent; one that cannot is told by its type and words."""
        sent: BaseException = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            # A user's exception may hold anything.
            sent = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(sent, tuple(frames_of(error)))


def attend_all(given: Sequence[tuple[BuildSpec, Connection]]) -> None:
    """Until every connection is closed at the other end, as it is when whoever asks has ended, however that was.

    Args:
        given: the teachers' configurations, and who asks them.
    """
    loading = threading.Lock()
    threads = [
        threading.Thread(target=_attend, args=(spec, asked, loading), name=f"teacher-{spec.teacher.name}")
        for spec, asked in given
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _attend(spec: BuildSpec, asked: Connection, loading: threading.Lock) -> None:
    """One teacher, from loading to the last question."""
    own_threads(spec.compute.threads)
    # Where the other end is closed nobody is left to answer, or to tell.
    with asked, contextlib.suppress(EOFError, OSError):
        try:
            # One after the other: what a model draws when it is made comes from a generator that all share.
            with loading:
                teacher = load_here(spec, open_recipe(spec.views))
        except BaseException as error:
            asked.send(Failed.of(error))
            return
        asked.send(Known(teacher.fingerprint, teacher.fields, teacher.device, teacher.threads))
        set_aside()
        _answer(teacher, asked)


def _answer(teacher: Teacher, asked: Connection) -> None:
    views_BCHW, shared = torch.empty(0, dtype=torch.uint8), Fields()
    while True:
        fresh, labels_B = asked.recv()
        views_BCHW = views_BCHW if fresh is None else fresh
        try:
            said: object = _into(shared, teacher(views_BCHW) if labels_B is None else teacher(views_BCHW, labels_B))
        except BaseException as error:
            said = Failed.of(error)
        asked.send(said)
        if not isinstance(said, Failed):
            continue
        if not isinstance(said.error, Exception):
            # A model that calls sys.exit() has ended its thread, here as there.
            return
        # The error holds the tensors of the attempt; whoever asks may go on with less memory.
        del said
        torch.cuda.empty_cache()


def _into(shared: Fields, outputs: Fields) -> Fields | None:
    """Puts an answer where the other process sees it; gives that memory where it is new."""
    alike = shared.keys() == outputs.keys() and all(
        (shared[name].shape, shared[name].dtype) == (values.shape, values.dtype) for name, values in outputs.items()
    )
    if not alike:
        shared.clear()
        for name, values in outputs.items():
            shared[name] = torch.empty_like(values, device="cpu").share_memory_()  # type: ignore[no-untyped-call]
    for name, values in outputs.items():
        shared[name].copy_(values)
    return None if alike else shared
