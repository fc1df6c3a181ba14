"""A problem: what `verify` finds and `repair` may leave, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from teacher_cache.errors import StorageError, TeacherCacheError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    place: str
    """A file, a shard, or a sample."""
    what: str
    todo: str


def problem_of(error: TeacherCacheError, todo: str | None = None) -> Problem:
    """What an error says; `todo` stands in the place of its own hint.

    Raises:
        StorageError: it is one: a store that does not answer says nothing of what is kept there.
    """
    if isinstance(error, StorageError):
        raise error
    return Problem(error.field, f"{error.rule} (found: {error.value})", error.hint if todo is None else todo)
