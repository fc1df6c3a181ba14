"""Verify: every byte against its receipt, every place against the plan, a sample against teacher and views."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from teacher_cache.errors import CacheError, CacheNotFoundError, CorruptionError, FormatError
from teacher_cache.manifest import MANIFEST, Manifest, read_manifest
from teacher_cache.problem import Problem, problem_of
from teacher_cache.reader import Cache
from teacher_cache.receipts import ANOTHERS, read_receipt, receipt_names
from teacher_cache.spec import SourceSpec
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
    """
    root = Path(path)
    try:
        cache = Cache(root, source)
    except CacheNotFoundError:
        raise
    except CacheError as error:
        return VerifyReport(str(root), 0, 0, 0, 0, tuple(_unopened(root, error)))
    problems = [*structure(cache), *damage_problems(cache, find_damage(cache))]
    seen = asked = 0
    notes: tuple[str, ...] = ()
    if not problems and views:
        report = verify_views(cache, _all(cache) if views == "all" else _sample(cache, views, 1), progress)
        seen, notes = report.checked, report.notes
        problems += map(problem_of, report.problems)
    if not problems and recompute:
        answers = ask_again(cache, _sample(cache, recompute, 2))
        asked, notes = answers.rows, (*notes, *answers.notes)
        problems += answers.problems
    records = [record for files in cache.files.values() for record in files.values()]
    size = sum(record.size for record in records)
    return VerifyReport(str(root), len(records), size, seen, asked, tuple(problems), notes)


def _unopened(root: Path, error: CacheError) -> Iterator[Problem]:
    """Why a cache cannot be opened: of receipts all that are bad, not the first alone."""
    try:
        manifest = read_manifest(root)
    except CacheError:
        place = MANIFEST if isinstance(error, FormatError) else error.field
        yield replace(problem_of(error), place=place)
        return
    bad = bad_receipts(root, manifest)
    if is_anothers(root, manifest, bad):
        what = "is not the manifest of what is beside it, which belongs to another cache"
        yield Problem(MANIFEST, what, "Restore it from a copy of this cache.")
    if not any(problem.field == error.field for problem in bad):
        yield problem_of(error)
    for problem in bad:
        yield problem_of(problem, f"Run: teacher-cache repair {root}")


def is_anothers(root: Path, manifest: Manifest, bad: list[CacheError]) -> bool:
    """Whether it is rather the manifest that is in the wrong place than all that is beside it.

    Args:
        root: the cache.
        manifest: its manifest.
        bad: what `bad_receipts` gives.
    """
    foreign = [error for error in bad if isinstance(error, CorruptionError) and error.rule == ANOTHERS]
    if foreign and len(foreign) == len(receipt_names(root)):
        return True
    gone = [table for table in manifest.tables if not os.path.lexists(root / table.path)]
    return any(any(root.glob(f"{table.path.split('-')[0]}-*.parquet")) for table in gone)


def bad_receipts(root: Path, manifest: Manifest) -> list[CacheError]:
    """The receipts of a cache that is being built which cannot be trusted; none of one that is sealed."""
    bad: list[CacheError] = []
    for name in receipt_names(root) if manifest.state == "building" else ():
        try:
            read_receipt(root, f"receipts/{name}", manifest)
        except CacheError as error:
            bad.append(error)
    return bad


def damage_problems(cache: Cache, damage: Damage) -> Iterator[Problem]:
    """What is said of damage, and what to do about it."""
    root = cache.path
    building = cache.manifest.state == "building"
    for view, shard in damage.holes:
        todo = "Finish the build: teacher-cache build CONFIG."
        if not building:
            todo = f"It was sealed without it: restore {MANIFEST} and its tables from a copy, or build it again."
        yield Problem(f"view {view}, shard {shard}", "is not committed", todo)
    for view, shard in damage.foreign:
        todo = f"Restore {MANIFEST} and its tables from a copy, or build it again."
        yield Problem(f"view {view}, shard {shard}", "its receipt names other files", todo)
    again = f"Run: teacher-cache repair {root}"
    for errors in damage.shards.values():
        yield from (problem_of(error, again) for error in errors)
    yield from (Problem(name, "is missing or altered", again) for name in damage.metadata)
    yield from map(problem_of, damage.tables)
    for name in damage.strays:
        yield Problem(name, "belongs to no receipt", f"Remove it, or run: teacher-cache repair {root} --remove-strays")


def _all(cache: Cache) -> dict[int, list[int]]:
    alive = np.flatnonzero(cache.alive).tolist()
    return dict.fromkeys(range(cache.views), alive)


def _sample(cache: Cache, count: int, salt: int) -> dict[int, list[int]]:
    """`count` seeded (view, row) pairs among the rows that are alive, grouped by view."""
    alive = np.flatnonzero(cache.alive)
    words = view_words(np.arange(count, dtype=np.uint64), salt, 0, 1, 0)
    view_of, row_of = below(words[:, 0], cache.views), alive[below(words[:, 1], len(alive))]
    return {view: np.unique(row_of[view_of == view]).tolist() for view in np.unique(view_of).tolist()}
