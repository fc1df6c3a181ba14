"""A thread that keeps something on the disk: jobs in order, and one commit for all that wait together."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

_log = logging.getLogger("services")
T = TypeVar("T")
_MOST = 256
"""Jobs of one commit: the first of them should not wait for ever."""
RETRY_SECONDS = 10
"""How long nobody should come after a commit that failed."""


class Kept(Protocol):
    """What a scribe keeps. Both are called in its thread only, as the jobs are."""

    def commit(self) -> None:
        """Makes what the jobs have done since the last commit survive a power failure."""

    def rollback(self) -> None:
        """Undoes what they have done since; never raises."""


@dataclass(frozen=True, eq=False)
class _Job:
    work: Callable[[], Any]
    durable: bool
    done: Future[Any]


class Scribe:
    """Thread-safe; the event loop waits for it without being blocked."""

    def __init__(self, name: str, kept: Kept) -> None:
        """Nothing runs before `start`."""
        self.name, self._kept = name, kept
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._failed: float | None = None
        """When the last commit failed, on the monotonic clock; None where it did not."""
        self.wrote: Callable[[str, float], None] = lambda _name, _seconds: None
        """Called in the thread after each commit that succeeded, with the seconds it took."""

    @property
    def failing(self) -> bool:
        """Whether the last commit failed, a short while ago.

        Later it counts as whole again: whoever stays away from a server that is not ready never makes it try.
        """
        return self._failed is not None and time.monotonic() - self._failed < RETRY_SECONDS

    @property
    def dead(self) -> bool:
        """Whether its thread has ended; it never begins again."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it once everything submitted so far is done."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def submit(self, work: Callable[[], T], *, durable: bool) -> Future[T]:
        """Queues a job.

        Args:
            work: called in the thread, after all that were submitted before it.
            durable: whether it writes: then the future is done after the commit, and if that or another such job of
                the same commit fails, it fails too, and nothing of it is kept.

        Returns:
            A future; cancelling it drops a job that has not begun.
        """
        job = _Job(work, durable, Future())
        self._jobs.put(job)
        return job.done

    def _run(self) -> None:
        while self._together():
            pass

    def _together(self) -> bool:
        """Does what is there now and commits once; false where there will be no more."""
        written: list[tuple[_Job, Any]] = []
        failure: Exception | None = None
        job = self._jobs.get()
        while job is not None:
            try:
                if job.done.set_running_or_notify_cancel():
                    result = job.work()
                    if job.durable:
                        written.append((job, result))
                    else:
                        job.done.set_result(result)
            except Exception as error:
                if job.durable:
                    written.append((job, None))
                    failure = error
                else:
                    job.done.set_exception(error)
            if self._jobs.empty() or len(written) == _MOST:
                break
            job = self._jobs.get()
        self._commit(written, failure)
        return job is not None

    def _commit(self, written: list[tuple[_Job, Any]], failure: Exception | None) -> None:
        if written and failure is None:
            started = time.monotonic()
            try:
                self._kept.commit()
                self.wrote(self.name, time.monotonic() - started)
            except Exception as error:
                failure = error
        if written:
            self._failed = None if failure is None else time.monotonic()
        if failure is not None:
            _log.error("%s: nothing was kept: %r", self.name, failure)
            self._kept.rollback()
        for job, result in written:
            if failure is None:
                job.done.set_result(result)
            else:
                job.done.set_exception(failure)
