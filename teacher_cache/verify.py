"""Verify: every byte against its receipt, every place against the plan, a sample against teacher and views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from teacher_cache.addition import Addition
from teacher_cache.errors import CacheError, CacheNotFoundError, CorruptionError, FormatError
from teacher_cache.manifest import MANIFEST, Manifest, read_manifest
from teacher_cache.problem import Problem, problem_of
from teacher_cache.reader import Cache
from teacher_cache.receipts import ANOTHERS, receipt_names
from teacher_cache.spec import SourceSpec
from teacher_cache.storage.root import Root, open_root
from teacher_cache.verify_bytes import Damage, find_damage
from teacher_cache.verify_recompute import recompute as ask_again
from teacher_cache.verify_structure import structure
from teacher_cache.verify_views import Progress, verify_views
from teacher_cache.views.philox import below, view_words


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what is wrong."""

    path: str
    files: int
    bytes: int
    views_checked: int
    rows_recomputed: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    """What has changed and does no harm, such as a library."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify(
    path: str | Path,
    recompute: int = 0,
    views: int | Literal["all"] = 0,
    source: SourceSpec | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Checks a cache.

    Structure, tables, every file's length and checksums at its place, holes and stray files, and what the manifest
    says of the rest, always; on request a seeded sample of views rendered again, and of rows asked of the teacher
    again.

    Args:
        path: the cache.
        recompute: how many rows to ask of the teacher again; compared after decoding, within the encoding's error
            and the rounding of another processor (see `agreement`).
        views: how many views to render again and compare with their digests, or `all`.
        source: where the data set is now, if not where the manifest says.
        progress: told how many of those views are done.

    Raises:
        CacheNotFoundError: there is no cache to check.
        StorageError: the disk or the store does not let itself be read; that is no problem of the cache.
    """
    root = open_root(path)
    try:
        cache = Cache(root, source)
    except CacheNotFoundError:
        raise
    except CacheError as error:
        return VerifyReport(root.url, 0, 0, 0, 0, tuple(_unopened(root, error)))
    damage = find_damage(cache)
    problems = list(structure(cache)) if not damage.tables and not damage.receipts else []
    problems += damage_problems(cache, damage)
    seen = asked = 0
    notes: tuple[str, ...] = ()
    if not problems and views:
        report = verify_views(cache, _all(cache) if views == "all" else _sample(cache, views, 1), progress)
        seen, notes = report.checked, report.notes
        problems += map(problem_of, report.problems)
    if not problems and recompute:
        answers = ask_again(cache, sampled_rows(cache, recompute))
        asked, notes = answers.rows, (*notes, *answers.notes)
        problems += answers.problems
    return VerifyReport(root.url, damage.files, damage.bytes, seen, asked, tuple(problems), notes)


def _unopened(root: Root, error: CacheError) -> Iterator[Problem]:
    """Why a cache cannot be opened."""
    try:
        manifest = read_manifest(root)
    except CacheError:
        place = MANIFEST if isinstance(error, FormatError) else error.field
        yield replace(problem_of(error), place=place)
        return
    if is_anothers(root, manifest, []):
        yield _ANOTHERS
    yield problem_of(error)


_ANOTHERS = Problem(
    MANIFEST,
    "is not the manifest of what is beside it, which belongs to another cache",
    "Restore it from a copy of this cache.",
)


def is_anothers(root: Root, manifest: Manifest, bad: Sequence[CacheError]) -> bool:
    """Whether it is rather the manifest that is in the wrong place than all that is beside it.

    Args:
        root: the cache.
        manifest: its manifest.
        bad: receipts that cannot be trusted.
    """
    foreign = [error for error in bad if isinstance(error, CorruptionError) and error.rule == ANOTHERS]
    if foreign and len(foreign) == len(receipt_names(root)):
        return True
    gone = [table.path for table in manifest.tables if not root.exists(table.path)]
    return any(next(root.names(f"{path.split('-')[0]}-"), None) is not None for path in gone)


def damage_problems(cache: Cache, damage: Damage) -> Iterator[Problem]:
    """What is said of damage, and what to do about it."""
    root = cache.path
    if is_anothers(cache.root, cache.manifest, damage.receipts):
        yield _ANOTHERS
    open_one = len(cache.indices) - 1 if cache.manifest.state == "building" else -1
    for place in damage.holes:
        todo = "Finish the build: teacher-cache build CONFIG."
        if place.addition != open_one:
            todo = f"It was sealed without it: restore {MANIFEST} and its tables from a copy, or build it again."
        yield Problem(str(place), "is not committed", todo)
    for place in damage.foreign:
        todo = f"Restore {MANIFEST} and its tables from a copy, or build it again."
        yield Problem(str(place), "its receipt names other files", todo)
    again = f"Run: teacher-cache repair {root}"
    yield from (problem_of(error, again) for error in damage.receipts)
    for errors in damage.shards.values():
        yield from (problem_of(error, again) for error in errors)
    yield from (Problem(name, "is missing or altered", again) for name in damage.metadata)
    yield from map(problem_of, damage.tables)
    for name in damage.strays:
        yield Problem(name, "belongs to no receipt", f"Remove it, or run: teacher-cache repair {root} --remove-strays")


def _all(cache: Cache) -> dict[int, list[int]]:
    """Every row that is alive of each view that is there."""
    found: dict[int, list[int]] = {}
    for addition in cache.manifest.additions:
        if addition.extent.proof:
            rows = (np.flatnonzero(cache.alive[slice(*_rows(addition))]) + addition.extent.first_row).tolist()
            for view in addition.view_numbers:
                found.setdefault(view, []).extend(rows)
    return dict(sorted(found.items()))


def _rows(addition: Addition) -> tuple[int, int]:
    return addition.extent.first_row, addition.extent.stop_row


def _sample(cache: Cache, count: int, salt: int) -> dict[int, list[int]]:
    """`count` seeded (view, row) pairs among the rows that are alive, grouped by view."""
    pairs: dict[int, list[int]] = {}
    for index, number in _share(cache, count, [item.extent.proof for item in cache.manifest.additions]):
        for view, rows in _pairs(cache, cache.manifest.additions[index], number, salt).items():
            pairs.setdefault(view, []).extend(rows)
    return dict(sorted(pairs.items()))


def sampled_rows(cache: Cache, count: int) -> dict[int, dict[int, list[int]]]:
    """`count` seeded (view, row) pairs, by the place of the addition that answered them."""
    additions = cache.manifest.additions
    return {i: _pairs(cache, additions[i], n, 2) for i, n in _share(cache, count, [True] * len(additions))}


def _share(cache: Cache, count: int, wanted: list[bool]) -> Iterator[tuple[int, int]]:
    """How many of `count` each addition gets: as many as it has answers, and one at least."""
    sizes = [item.rows * item.extent.views * want for item, want in zip(cache.manifest.additions, wanted, strict=True)]
    for place, size in enumerate(sizes):
        if size:
            yield place, max(1, round(count * size / sum(sizes)))


def _pairs(cache: Cache, addition: Addition, count: int, salt: int) -> dict[int, list[int]]:
    alive = np.flatnonzero(cache.alive[slice(*_rows(addition))]) + addition.extent.first_row
    if not len(alive):
        return {}
    words = view_words(np.arange(count, dtype=np.uint64), salt, 0, 1, 0)
    view_of = below(words[:, 0], addition.extent.views) + addition.extent.first_view
    row_of = alive[below(words[:, 1], len(alive))]
    return {view: np.unique(row_of[view_of == view]).tolist() for view in np.unique(view_of).tolist()}
