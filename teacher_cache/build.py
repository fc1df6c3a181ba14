"""`build`: begin or go on, run what is missing, seal; alone, or sharing the work with other builders."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Literal

import torch

from teacher_cache.begin import Beginning, begin, found_manifest, prepare
from teacher_cache.build_report import BuildReport, report_of
from teacher_cache.builder import Builder
from teacher_cache.claims import Claims
from teacher_cache.errors import BuildError, CorruptionError, SpecError
from teacher_cache.lease import LEAD, Lease, at_work
from teacher_cache.manifest import Manifest, read_manifest
from teacher_cache.plan import Opened, open_parts, worker_count
from teacher_cache.poison import committed, known_poison
from teacher_cache.receipts import Receipt, read_receipts
from teacher_cache.seal import clear_superseded, require_fidelity, seal
from teacher_cache.shard_job import Work, open_job, run_work
from teacher_cache.spec import BuildSpec
from teacher_cache.storage import remove_temporary
from teacher_cache.storage.files import file_errors

__all__ = ["BuildReport", "Executor", "Progress", "build"]

_POLL = 0.5
"""Seconds between two looks at what other builders have done."""
_MOST_HELD = 2**30
"""Bytes of finished rows that a worker may hold because several views are made from one decoding."""

Executor = Literal["ray", "serial"]
Progress = Callable[[int, int, int], None]
"""Called after each shard with (rows done, rows in all, rows that this run has computed)."""


def build(
    spec: BuildSpec, executor: Executor = "ray", progress: Progress | None = None, join: bool = False
) -> BuildReport:
    """Runs the teacher over every view that the cache does not hold yet, and seals the cache.

    Killed at any moment, the same call goes on; a sealed cache is left as it is.

    Args:
        spec: what to build, and where.
        executor: `ray` for one worker on each device, `serial` for a plain loop; both write the same bytes.
        progress: told after each shard.
        join: share the work where others build the same cache; without it that is an error.

    Raises:
        RequestError: the spec names something impossible; nothing was written.
        MismatchError: the folder holds a cache of something else.
        WorkError: a shard could not be made, another process builds this cache, or the disk is full or gone; what
            was committed stays.
    """
    if executor not in ("ray", "serial"):
        raise SpecError("executor", "must be ray or serial", executor, "Choose one of them.")
    root = Path(spec.cache)
    threads = torch.get_num_threads()
    # The number of threads can change the last bit of a logit: it is part of the identity and set everywhere.
    torch.set_num_threads(spec.compute.threads)
    try:
        with file_errors(root):
            opened = open_parts(spec)
            beginning = prepare(root, opened)
            if beginning.found is None or beginning.found.state == "building":
                with Lease(root, join) as lease:
                    return _build(root, opened, beginning, lease, executor, progress)
            remove_temporary(root)
            clear_superseded(root, beginning.found)
            rows = beginning.found.rows * beginning.found.views
            _Counter(progress, beginning.found).at(rows)
            return report_of(root, beginning.found, 0, 0, 0.0)
    finally:
        torch.set_num_threads(threads)


def _build(
    root: Path, opened: Opened, beginning: Beginning, lease: Lease, executor: Executor, progress: Progress | None
) -> BuildReport:
    manifest = _enlist(root, opened, beginning, lease)
    counter = _Counter(progress, manifest)
    seconds = 0.0
    if manifest.state == "building":
        claims = Claims(root, manifest, lease)
        claims.tidy()
        together = _together(opened.spec, manifest, executor)
        started = time.perf_counter()
        while missing := _missing(root, manifest, together, counter):
            if not _run(root, opened, manifest, missing, executor, counter, claims):
                time.sleep(_POLL)
        seconds = time.perf_counter() - started
        manifest = _finish(root, opened.spec, manifest, lease, claims)
    return report_of(root, manifest, counter.shards, counter.built, seconds)


def _enlist(root: Path, opened: Opened, beginning: Beginning, lease: Lease) -> Manifest:
    """Becomes the one that leads the build, or one of those that share it; the cache is then begun."""
    while True:
        leader = lease.claim(LEAD)
        if not lease.me.joined:
            _require_alone(root, lease, leader)
        # Whoever led before may have begun or sealed it since we looked.
        if found_manifest(root) != beginning.found:
            beginning = prepare(root, opened)
        if leader is None:
            return begin(root, opened, beginning)
        if beginning.found is not None:
            return beginning.found
        time.sleep(_POLL)


def _require_alone(root: Path, lease: Lease, leader: Builder | None) -> None:
    others = [one for one in at_work(root) if one.joined and one.id != lease.me.id]
    other = leader or (others[0] if others else None)
    if other is not None:
        hint = (
            "Wait until it is done, or share the work: the same command with --join. If it is gone, the same command "
            "takes over when its lease has run out."
        )
        raise BuildError(str(root), "is being built by another process", other, hint)


def _finish(root: Path, spec: BuildSpec, manifest: Manifest, lease: Lease, claims: Claims) -> Manifest:
    """Seals what is complete, or waits until whoever leads has done so."""
    while True:
        leader = lease.claim(LEAD)
        now = read_manifest(root)
        if now.state == "sealed":
            return now
        if leader is None:
            require_fidelity(spec, manifest, root)
            claims.tidy()
            return seal(root, manifest)
        time.sleep(_POLL)


def _together(spec: BuildSpec, manifest: Manifest, executor: Executor) -> int:
    """How many views are made from one decoding: as told, or fewer where workers or memory would run out.

    A worker holds the rows of all these views until they are committed.
    """
    workers = 1 if executor == "serial" else worker_count(spec.compute)
    held = manifest.store.shard_rows * sum(part.row_bytes for group in manifest.groups(0) for part in group.parts)
    together = max(1, min(spec.compute.views_per_decode, manifest.views, _MOST_HELD // held))
    while together > 1 and -(-manifest.views // together) * manifest.grid.shards < 4 * workers:
        together -= 1
    return together


def _missing(root: Path, manifest: Manifest, together: int, counter: _Counter) -> list[Work]:
    """What is left to do, `together` views of the same rows at a time; tells how many rows are done."""
    try:
        receipts = read_receipts(root, manifest)
    except CorruptionError:
        # Another builder may be sealing: its receipts go while we read them.
        if read_manifest(root).state == "building":
            raise
        return []
    poison = known_poison(receipts)
    done = committed(receipts, poison)
    missing = []
    for first in range(0, manifest.views, together):
        for shard in range(manifest.grid.shards):
            views = range(first, min(first + together, manifest.views))
            left = tuple(view for view in views if (view, shard) not in done)
            if left:
                missing.append(Work(left, shard, poison.get(shard, ())))
    if missing and read_manifest(root).state == "sealed":
        return []
    counter.at(sum(_rows(manifest, shard) for _, shard in done))
    return missing


def _rows(manifest: Manifest, shard: int) -> int:
    start, stop = manifest.grid.span(shard)
    return stop - start


class _Counter:
    """Adds up rows as receipts come in, and tells whoever shows the progress."""

    def __init__(self, progress: Progress | None, manifest: Manifest) -> None:
        self.progress, self.total = progress, manifest.rows * manifest.views
        self.done, self.built, self.shards = -1, 0, 0

    def at(self, done: int) -> None:
        """So many rows are committed, by whomever."""
        if done != self.done:
            self.done = done
            self._tell()

    def add(self, rows: int) -> None:
        self.done += rows
        self.built += rows
        self.shards += 1
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, self.built)


def _run(
    root: Path,
    opened: Opened,
    manifest: Manifest,
    missing: list[Work],
    executor: Executor,
    counter: _Counter,
    claims: Claims,
) -> bool:
    """Makes what of this work is not another builder's; False if that was nothing."""
    before = counter.shards
    try:
        with closing(_receipts(root, opened, manifest, missing, executor, claims)) as receipts:
            for receipt in receipts:
                claims.committed(receipt)
                counter.add(_rows(manifest, receipt.shard))
    except BaseException as error:
        # Closing has stopped the workers, also after Ctrl-C: what they had half written goes too, if the disk lets us.
        with contextlib.suppress(OSError):
            claims.tidy()
        if isinstance(error, OSError | BuildError):
            claims.require()
        raise
    return counter.shards > before


def _receipts(
    root: Path, opened: Opened, manifest: Manifest, missing: list[Work], executor: Executor, claims: Claims
) -> Generator[Receipt, None, None]:
    waiting = iter(missing)
    first = next(filter(None, map(claims.take, waiting)), None)
    if first is None:
        return
    works = [first, *waiting]
    if executor == "serial":
        job = open_job(root, manifest, opened, claims.hold)
        for work in works:
            taken = claims.take(work)
            if taken is not None:
                yield from run_work(job, taken)
    else:
        from teacher_cache.precompute import run_on_ray

        yield from run_on_ray(root, manifest, opened.spec, works, claims)
