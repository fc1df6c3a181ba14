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
from services.scribe import Scribe
from services.settings import Settings
from services.teachers import ServedTeacher
from teacher_cache.errors import SpecError, TeacherCacheError

_log = logging.getLogger("services")
T = TypeVar("T")
_LOOK_SECONDS = 1.0
"""That a probe waits for the thread that reads a cache."""


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
    """The teachers whose cache could not be opened when it was last looked at."""
    draining: bool = False
    """Set at SIGTERM: `readyz` turns 503 while requests are still answered."""

    def dead(self) -> list[str]:
        """What only a new process can mend; empty while it is alive."""
        threads = [f"the thread of {name}" for name, batcher in self.batchers.items() if batcher.dead]
        return threads + [f"the thread of the {scribe.name}" for scribe in self.scribes if scribe.dead]

    @property
    def scribes(self) -> tuple[Scribe, ...]:
        """Who writes what must be on the disk before an answer leaves."""
        return self.books.scribes if self.kept is None else (*self.books.scribes, self.kept.scribe)

    def not_ready(self) -> list[str]:
        """Why no new traffic should be sent here; empty when ready."""
        reasons = ["draining"] if self.draining else []
        reasons += [f"{what} has died" for what in self.dead()]
        reasons += [f"the {scribe.name} cannot be written" for scribe in self.scribes if scribe.failing]
        reasons += [f"{name} is not warm" for name, batcher in self.batchers.items() if not batcher.warm]
        reasons += [f"the cache of {name} cannot be read" for name in sorted(self.unreadable)]
        return reasons + [f"{name} has a full queue" for name, batcher in self.batchers.items() if batcher.full]

    async def read(self, teacher: str, look: Callable[[], T]) -> T:
        """Looks into a teacher's data set and cache, in the one thread that does.

        What a build, a repair or somebody else has changed meanwhile is opened anew, and looked at once more.

        Raises:
            Problem: 503 where they are not what was built.
        """
        library = self.teachers[teacher].library

        def attempt() -> T:
            try:
                return look()
            except TeacherCacheError:
                if library is None:
                    raise
            library.reopen()
            return look()

        try:
            found = await asyncio.get_running_loop().run_in_executor(self.readers[teacher], attempt)
        except TeacherCacheError as error:
            _log.error("the cache or the data set of %s cannot be read: %s", teacher, error)
            hint = "Send images, with cache=bypass. Whoever runs the service finds the reason in its log."
            raise Problem(503, "cache", "must be what was built", "it is not", hint, {"Retry-After": "30"}) from None
        return found

    async def look_again(self) -> None:
        """Sees whether caches can be opened, which may have been mended; for `not_ready`."""
        for name, served in self.teachers.items():
            if served.library is None:
                continue
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self.read(name, served.library.refresh)
            except TimeoutError:
                # It is at work, on what it could open.
                continue
            except Problem:
                self.unreadable.add(name)
            else:
                self.unreadable.discard(name)

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
