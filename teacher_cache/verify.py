"""Verify: every byte against its receipt, every place against the plan, a sample against teacher and views."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from teacher_cache.encodings import Target
from teacher_cache.errors import CorruptionError, FormatError, TeacherCacheError
from teacher_cache.manifest import MANIFEST
from teacher_cache.plan import open_parts
from teacher_cache.reader import Cache
from teacher_cache.samples import read_checked
from teacher_cache.shard_job import Job, answer_again, open_job
from teacher_cache.spec import SourceSpec
from teacher_cache.storage import Store, open_store
from teacher_cache.verify_views import Progress, verify_views
from teacher_cache.views.philox import below, view_words

_REBUILD = "Remove the cache's folder and build again, or restore the file from a copy."
_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    place: str
    """A file, a shard, or a sample."""
    what: str
    todo: str


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

    Structure, tables, every file's length and checksums at its place, holes and stray files, always; on request a
    seeded sample of views rendered again, and of rows asked of the teacher again.

    Args:
        path: the cache.
        recompute: how many rows to ask of the teacher again; compared after encoding and decoding, up
            to the rounding of another processor (2⁻⁸ of the largest value).
        views: how many views to render again and compare with their digests, or `all`.
        source: where the data set is now, if not where the manifest says.
        progress: told how many of those views are done.

    Raises:
        CacheNotFoundError: there is no cache to check.
    """
    root = Path(path)
    try:
        cache = Cache(root, source)
    except (CorruptionError, FormatError) as error:
        return VerifyReport(str(root), 0, 0, 0, 0, (_problem(error),))
    manifest = cache.manifest
    store = open_store(manifest.store.kind, manifest.grid)
    metadata = store.metadata([group for view in range(manifest.views) for group in manifest.groups(view)])
    problems = [*_missing_shards(cache, store), *_damaged(cache, store, metadata), *_strays(cache, metadata)]
    seen = asked = 0
    notes: tuple[str, ...] = ()
    if not problems and views:
        report = verify_views(cache, _all(cache) if views == "all" else _sample(cache, views, 1), progress)
        seen, notes = report.checked, report.notes
        problems += map(_problem, report.problems)
    if not problems and recompute:
        sample = _sample(cache, recompute, 2)
        asked = sum(map(len, sample.values()))
        problems += _recompute(cache, sample)
    records = [record for files in cache.files.values() for record in files.values()]
    size = sum(record.size for record in records)
    return VerifyReport(str(root), len(records), size, seen, asked, tuple(problems), notes)


def _problem(error: TeacherCacheError) -> Problem:
    return Problem(error.field, f"{error.rule} (found: {error.value})", error.hint)


def _missing_shards(cache: Cache, store: Store) -> Iterator[Problem]:
    manifest = cache.manifest
    for view in range(manifest.views):
        for shard in range(manifest.grid.shards):
            committed = cache.files.get((view, shard))
            planned = {path for group in manifest.groups(view) for path in store.paths(group, shard)}
            if committed is None:
                todo = "Finish the build: teacher-cache build CONFIG."
                yield Problem(f"view {view}, shard {shard}", "is not committed", todo)
            elif set(committed) != planned:
                yield Problem(f"view {view}, shard {shard}", "its receipt names other files", _REBUILD)


def _damaged(cache: Cache, store: Store, metadata: Mapping[str, bytes]) -> Iterator[Problem]:
    for (view, shard), files in cache.files.items():
        for group in cache.manifest.groups(view):
            if files.keys() >= set(store.paths(group, shard)):
                yield from map(_problem, store.damage(cache.path, group, shard, files))
    for name, data in metadata.items():
        path = cache.path / name
        if not path.is_file() or path.read_bytes() != data:
            yield Problem(name, "is missing or altered", _REBUILD)
    if cache.manifest.references is not None:
        try:
            read_checked(cache.path, cache.manifest.references)
        except CorruptionError as error:
            yield _problem(error)


def _strays(cache: Cache, metadata: Mapping[str, bytes]) -> Iterator[Problem]:
    manifest = cache.manifest
    known = {MANIFEST, manifest.samples.path, *metadata}
    known |= {table.path for table in (manifest.receipts, manifest.references) if table is not None}
    known |= {path for files in cache.files.values() for path in files}
    for path in sorted(cache.path.rglob("*")):
        name = path.relative_to(cache.path).as_posix()
        building = manifest.state == "building" and name.startswith("receipts/")
        if path.is_file() and name not in known and not building:
            yield Problem(name, "belongs to no receipt", "Remove it.")


def _all(cache: Cache) -> dict[int, list[int]]:
    alive = np.flatnonzero(cache.alive).tolist()
    return dict.fromkeys(range(cache.views), alive)


def _sample(cache: Cache, count: int, salt: int) -> dict[int, list[int]]:
    """`count` seeded (view, row) pairs among the rows that are alive, grouped by view."""
    alive = np.flatnonzero(cache.alive)
    words = view_words(np.arange(count, dtype=np.uint64), salt, 0, 1, 0)
    view_of, row_of = below(words[:, 0], cache.views), alive[below(words[:, 1], len(alive))]
    return {view: np.unique(row_of[view_of == view]).tolist() for view in np.unique(view_of).tolist()}


def _recompute(cache: Cache, sample: dict[int, list[int]]) -> Iterator[Problem]:
    """Asks the teacher again, in the micro-batch in which each row was first computed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cache.spec.compute.threads)
    try:
        opened = open_parts(cache.spec)
        if opened.teacher.fingerprint != cache.manifest.identity.teacher:
            yield Problem("teacher", "is not the one that made this cache", "Point it at the same weights.")
            return
        job = open_job(cache.path, cache.manifest, opened)
        for view, rows in sample.items():
            yield from _recompute_view(cache, job, view, rows)
    finally:
        torch.set_num_threads(threads)


def _recompute_view(cache: Cache, job: Job, view: int, sampled: list[int]) -> Iterator[Problem]:
    left = set(sampled)
    while left:
        row = min(left)
        again = answer_again(job, view, row)
        for broken in sorted(left & again.broken):
            what = "could be decoded when the cache was built"
            yield Problem(cache.samples.keys[broken], what, "Restore the data set.")
        asked = [place for place, number in enumerate(again.rows) if number in left]
        left -= {*again.rows, *again.broken}
        for field, columns in again.columns.items() if asked else ():
            stored = _plain(cache.read(field, view, [again.rows[place] for place in asked]))
            decoded = job.encodings[field].decode({name: values[asked] for name, values in columns.items()})
            fresh = _plain(decoded)
            # Equal infinities (masked classes) differ by NaN.
            error = torch.where(stored == fresh, 0.0, (stored - fresh).abs()).max().item()
            # Other processors round otherwise: a few units in the last place of the stored type are no fault.
            if not error <= _ROUNDING * max(1.0, stored.abs().max().item()):
                name = f"view {view}, {field}, near {cache.samples.keys[row]}"
                what = f"the teacher answers otherwise now (largest difference {error:.3g})"
                yield Problem(name, what, "Check the teacher's weights, and the libraries' versions.")


def _plain(target: Target) -> torch.Tensor:
    """What two answers are compared by: values, or of a sample its weights."""
    if target.drawn_at is not None:
        return target.log_probs(target.drawn_at)
    return target.dense().values.float()
