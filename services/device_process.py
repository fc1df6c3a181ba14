"""A process for each device: its teachers, each in a thread of its own, so that HTTP and models share no interpreter.

A model of many small operations asks for its interpreter after each of them. Beside an event loop it would wait there,
and the event loop for it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import torch.multiprocessing
from torch import Tensor

from services.device_worker import Failed, Known, attend_all
from services.request_log import Apart
from services.work import Fields
from teacher_cache.errors import TeacherError
from teacher_cache.spec import BuildSpec
from teacher_cache.teachers import Teacher, resolve_device
from teacher_cache.views import Recipe

Load = Callable[[BuildSpec, Recipe], Teacher]
"""What `open_parts` calls for a teacher."""
_END_SECONDS = 5.0
"""That a process may take to end by itself, between two batches; nothing is lost with it."""


class TeacherGone(BaseException):
    """The process of a teacher has ended."""


class ProcessTeacher:
    """Implements `Teacher` for one that another process of this machine has loaded.

    Views and answers lie in memory that both see; through the connection go a word when they are there, errors, and,
    when their shape changes, that memory's handle.
    """

    def __init__(self, asked: Connection) -> None:
        """Waits until it is loaded.

        Args:
            asked: to the thread that has it.

        Raises:
            TeacherGone: the process has ended.
            Exception: whatever loading it has raised.
        """
        self._asked, self._views, self._answer = asked, torch.empty(0, dtype=torch.uint8), Fields()
        known = self._said()
        assert isinstance(known, Known), "a worker begins with what it has"
        self.fingerprint, self.fields = known.fingerprint, known.fields
        self.device, self.threads = known.device, known.threads

    def __call__(self, views_BCHW: Tensor, labels_B: Tensor | None = None) -> Fields:
        """uint8 views to float32 fields on the CPU, as the teacher itself answers.

        Raises:
            TeacherGone: the process has ended.
            Exception: whatever the teacher has raised; its cause says where.
        """
        fresh = self._views.shape != views_BCHW.shape
        if fresh:
            self._views = torch.empty(views_BCHW.shape, dtype=views_BCHW.dtype).share_memory_()  # type: ignore[no-untyped-call]
        self._views.copy_(views_BCHW)
        with _still_there():
            self._asked.send((self._views if fresh else None, labels_B))
        answer = self._said()
        if answer is not None:
            assert isinstance(answer, dict), "a worker answers with fields"
            self._answer = answer
        # The worker writes there again at the next call.
        return {name: values.clone() for name, values in self._answer.items()}

    def _said(self) -> object:
        with _still_there():
            said = self._asked.recv()
        if isinstance(said, Failed):
            raise said.error from Apart(said.at)
        return said


@contextlib.contextmanager
def _still_there() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise TeacherGone("the process of the teacher has ended") from error


@contextlib.contextmanager
def teachers_apart(specs: Sequence[BuildSpec]) -> Iterator[list[Load]]:
    """One process for each device that the configurations name; all load while this one goes on.

    Args:
        specs: of the teachers.

    Yields:
        For each configuration what waits for its teacher, as `ProcessTeacher` does.

    Raises:
        TeacherError: a device is not there; or, while this context lasts, `TeacherGone` was raised in it.
    """
    by_device: dict[str, list[tuple[BuildSpec, Connection]]] = {}
    asking = list[Connection]()
    for spec in specs:
        ours, theirs = torch.multiprocessing.Pipe()
        asking.append(ours)
        by_device.setdefault(resolve_device(spec.compute.device), []).append((spec, theirs))
    processes = list[BaseProcess]()
    try:
        with contextlib.ExitStack() as open_ones:
            for ours in asking:
                open_ones.enter_context(ours)
            processes += _started(by_device)
            yield [_waiting(ours) for ours in asking]
    except TeacherGone as gone:
        for process in processes:
            process.join(_END_SECONDS)
        codes = ", ".join(f"{process.name} with {process.exitcode}" for process in processes)
        hint = "The kernel's log says whether it took too much memory; -9 is a kill."
        raise TeacherError("teacher.model", "must load and run, and its process has ended", codes, hint) from gone
    except BaseException:
        # Nobody waits for what is being loaded.
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            _end(process)


def _started(by_device: Mapping[str, Sequence[tuple[BuildSpec, Connection]]]) -> list[BaseProcess]:
    context = torch.multiprocessing.get_context("spawn")
    found: list[BaseProcess] = []
    # The first `start` would start it, and unblock on its way.
    resource_tracker.ensure_running()
    # A signal to the whole group, such as Ctrl-C, is for this process: it drains, and needs the others until then.
    with _blocked(signal.SIGINT, signal.SIGTERM):
        for device, given in by_device.items():
            found.append(context.Process(target=attend_all, args=(given,), name=f"device-{device}"))
            found[-1].start()
            for _, theirs in given:
                theirs.close()
    return found


def _waiting(ours: Connection) -> Load:
    return lambda _spec, _recipe: ProcessTeacher(ours)


@contextlib.contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    """What is started meanwhile never sees them; here they come afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: BaseProcess) -> None:
    process.join(_END_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


__all__ = ["ProcessTeacher", "TeacherGone", "teachers_apart"]
