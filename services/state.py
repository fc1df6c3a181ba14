"""What a running server holds: its teachers, their threads, and whether it is on its way out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from services.batching import Batcher
from services.books import Books
from services.kept_answers import KeptAnswers
from services.problems import Problem
from services.settings import Settings
from services.teachers import ServedTeacher
from teacher_cache.errors import SpecError, TeacherCacheError

_log = logging.getLogger("services")
T = TypeVar("T")


@dataclass
class Service:
    """Shared by all requests of one app."""

    settings: Settings
    teachers: Mapping[str, ServedTeacher]
    batchers: Mapping[str, Batcher]
    books: Books
    """Who may ask what, and what they have asked."""
    kept: KeptAnswers | None = None
    """Where computed answers are kept, if they are."""
    readers: Mapping[str, ThreadPoolExecutor] = field(default_factory=dict)
    """The threads in which data sets and caches are read, by teacher."""
    unreadable: set[str] = field(default_factory=set)
    """The teachers whose cache or data set could not be read when they were last looked into."""
    draining: bool = False
    """Set at SIGTERM: `readyz` turns 503 while requests are still answered."""

    def not_ready(self) -> list[str]:
        """Why no new traffic should be sent here; empty when ready."""
        reasons = ["draining"] if self.draining else []
        reasons += [f"{name} is not warm" for name, batcher in self.batchers.items() if not batcher.warm]
        reasons += [f"the cache of {name} cannot be read" for name in sorted(self.unreadable)]
        return reasons + [f"{name} has a full queue" for name, batcher in self.batchers.items() if batcher.full]

    async def read(self, teacher: str, look: Callable[[], T]) -> T:
        """Looks into a teacher's data set and cache, in the one thread that does.

        Raises:
            Problem: 500 where they are not what was built; `readyz` says so until they can be read again.
        """
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.readers[teacher], look)
        except TeacherCacheError as error:
            self.unreadable.add(teacher)
            _log.error("the cache or the data set of %s cannot be read: %s", teacher, error)
            hint = "Send images, with cache=bypass. Whoever runs the service finds the reason in its log."
            raise Problem(500, "cache", "must be what was built", "it is not", hint) from None
        self.unreadable.discard(teacher)
        return found

    def start(self) -> None:
        """Starts all threads."""
        self.books.start()
        if self.kept is not None:
            self.kept.start()
        for batcher in self.batchers.values():
            batcher.start()

    def stop(self) -> None:
        """Ends them; what waits for a model is cancelled."""
        self.draining = True
        for batcher in self.batchers.values():
            batcher.stop()
        for reader in self.readers.values():
            reader.shutdown(cancel_futures=True)
        if self.kept is not None:
            self.kept.close()
        self.books.close()


def make_service(teachers: Mapping[str, ServedTeacher], settings: Settings, books: Books | None = None) -> Service:
    """Puts a thread, not yet started, behind each teacher.

    Raises:
        SpecError: there is no teacher, or one whose micro-batch no request may carry; or the books cannot be opened.
    """
    if not teachers:
        raise SpecError("teachers", "must name at least one teacher", "none", "Give a configuration.")
    for served in teachers.values():
        _require_room(served, settings)
    batchers = {
        name: Batcher(served, _queue_images(served, settings), settings.queue_seconds)
        for name, served in teachers.items()
    }
    readers = {name: ThreadPoolExecutor(1, f"reader-{name}") for name in teachers}
    kept = None if settings.journal is None else KeptAnswers(settings.journal, settings.journal_bytes)
    return Service(settings, dict(teachers), batchers, books or Books(settings), kept, readers)


def _require_room(served: ServedTeacher, settings: Settings) -> None:
    if served.micro_batch > settings.max_images:
        rule = f"must allow a whole micro-batch of {served.name} ({served.micro_batch})"
        raise SpecError("max_images", rule, settings.max_images, "Raise it, or lower micro_batch.")
    largest = min(settings.max_images, settings.max_body_bytes // served.view_bytes)
    if _queue_images(served, settings) < max(largest, served.micro_batch):
        rule = f"must hold the largest request to {served.name} ({largest} images of {served.view_bytes} bytes)"
        raise SpecError("queue_bytes", rule, settings.queue_bytes, "Raise it, or lower max_images.")


def _queue_images(served: ServedTeacher, settings: Settings) -> int:
    """All inputs of a teacher are of one size, so a limit in bytes is one in images."""
    return min(settings.queue_images, settings.queue_bytes // served.view_bytes)
