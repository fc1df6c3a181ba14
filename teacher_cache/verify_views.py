"""Verify, views: rendered again from their stored parameters, drawn again, and compared with the kept digests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import StorageError, TeacherCacheError
from teacher_cache.manifest import library_versions
from teacher_cache.proof import check
from teacher_cache.reader import Cache

_AT_ONCE = 256

Progress = Callable[[int, int], None]
"""Told after each batch: (views done, views in all)."""


@dataclass(frozen=True)
class ViewsReport:
    """What rendering views again has shown."""

    checked: int
    """Views that were rendered."""
    redrawn: int
    """Views whose parameters would be drawn otherwise today."""
    problems: tuple[TeacherCacheError, ...]
    """One for each batch in which something is not what the teacher saw."""
    notes: tuple[str, ...]
    """What changed and does no harm."""


def verify_views(cache: Cache, sample: dict[int, list[int]], progress: Progress | None = None) -> ViewsReport:
    """Renders views again.

    Args:
        cache: an open cache.
        sample: for each view, row numbers that are alive.
        progress: told how far it is.
    """
    problems: list[TeacherCacheError] = []
    try:
        _ = cache.source, cache.recipe
    except TeacherCacheError as error:
        return ViewsReport(0, 0, (error,), ())
    total = sum(len(rows) for rows in sample.values())
    done = redrawn = 0
    for view, rows in _batches(sample):
        try:
            redrawn += _verify(cache, view, rows)
        except StorageError:
            # Every other batch would wait for it as long.
            raise
        except TeacherCacheError as error:
            problems.append(error)
        done += len(rows)
        if progress is not None:
            progress(done, total)
    return ViewsReport(done, redrawn, tuple(problems), tuple(_notes(cache, done, redrawn, bool(problems))))


def _batches(sample: dict[int, list[int]]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for view, rows in sample.items():
        for first in range(0, len(rows), _AT_ONCE):
            yield view, np.array(rows[first : first + _AT_ONCE], np.int64)


def _verify(cache: Cache, view: int, rows: NDArray[np.int64]) -> int:
    """Raises where pixels differ; returns how many rows would draw other parameters today."""
    decoded = cache.decode(rows)
    check(cache, view, rows, cache.render_views(view, decoded), "exact")
    return int((cache.params(view, rows) != cache.draw(view, decoded)).any(axis=1).sum())


def _notes(cache: Cache, checked: int, redrawn: int, differ: bool) -> Iterator[str]:
    then, now = cache.manifest.first.versions, library_versions()
    changed = [f"{name} {then.get(name)} → {now[name]}" for name in now if then.get(name) != now[name]]
    if differ or not checked:
        return
    if changed:
        yield (
            f"Libraries have changed ({', '.join(changed)}), and stored parameters still give the teacher's views, "
            f"pixel for pixel: {checked} of {checked} that were checked."
        )
    if redrawn:
        yield (
            f"{redrawn} of {checked} views would be drawn with other parameters today; rendered from the stored "
            "ones they are what the teacher saw."
        )
