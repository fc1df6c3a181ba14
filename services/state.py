"""What a running server holds: its teachers, their threads, and whether it is on its way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.batching import Batcher
from services.books import Books
from services.settings import Settings
from services.teachers import ServedTeacher
from teacher_cache.errors import SpecError


@dataclass
class Service:
    """Shared by all requests of one app."""

    settings: Settings
    teachers: Mapping[str, ServedTeacher]
    batchers: Mapping[str, Batcher]
    books: Books
    """Who may ask what, and what they have asked."""
    draining: bool = False
    """Set at SIGTERM: `readyz` turns 503 while requests are still answered."""

    def not_ready(self) -> list[str]:
        """Why no new traffic should be sent here; empty when ready."""
        reasons = ["draining"] if self.draining else []
        reasons += [f"{name} is not warm" for name, batcher in self.batchers.items() if not batcher.warm]
        return reasons + [f"{name} has a full queue" for name, batcher in self.batchers.items() if batcher.full]


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
    return Service(settings, dict(teachers), batchers, books or Books(settings))


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
