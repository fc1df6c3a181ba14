"""`build`: begin or go on, run what is missing, seal; alone, or sharing the work with other builders."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Literal

import torch

from teacher_cache.addition import Addition
from teacher_cache.begin import Beginning, begin, found_manifest, go_on, prepare
from teacher_cache.build_report import BuildReport, report_of, with_bill
from teacher_cache.builder import Builder
from teacher_cache.claims import Claims
from teacher_cache.errors import BuildError, SpecError, TeacherCacheError
from teacher_cache.lease import LEAD, Lease, at_work
from teacher_cache.left import is_open, rows_of, views_together, what_is_left
from teacher_cache.manifest import Manifest, read_manifest
from teacher_cache.paid import closed_after, settle, with_journal
from teacher_cache.plan import Opened, open_parts, worker_count
from teacher_cache.receipts import Receipt
from teacher_cache.seal import clear_superseded, seal
from teacher_cache.shard_job import Work, open_job, run_work
from teacher_cache.spec import BuildSpec
from teacher_cache.storage.files import file_errors
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.root import Root, open_root, remove_unfinished

__all__ = ["BuildReport", "Executor", "Progress", "build"]

_POLL = 0.5
"""Seconds between two looks at what other builders have done."""
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
    root = open_root(spec.cache)
    threads = torch.get_num_threads()
    # The number of threads can change the last bit of a logit: it is part of the identity and set everywhere.
    torch.set_num_threads(spec.compute.threads)
    try:
        with file_errors(root.path) if isinstance(root, LocalRoot) else contextlib.nullcontext():
            opened = open_parts(with_journal(spec))
            with closed_after(opened.teacher):
                beginning = prepare(root, opened)
                counter = _Counter(progress, beginning.rows_left)
                if beginning.done:
                    assert beginning.found is not None, "it is sealed"
                    _tidy(root, beginning.found)
                    counter.at(0)
                    report = report_of(root, beginning, 0, 0, 0.0)
                else:
                    with Lease(root, join) as lease:
                        report = _build(root, opened, beginning, lease, executor, counter)
                return with_bill(report, settle(spec, opened.teacher))
    finally:
        torch.set_num_threads(threads)


def _tidy(root: Root, manifest: Manifest) -> None:
    # Another build may have begun to add to it since: its temporary files and receipts are no leftovers.
    if at_work(root) or read_manifest(root) != manifest:
        return
    remove_unfinished(root)
    clear_superseded(root, manifest)


def _build(
    root: Root, opened: Opened, beginning: Beginning, lease: Lease, executor: Executor, counter: _Counter
) -> BuildReport:
    """One addition after the other, until all that was asked for is there."""
    seconds = 0.0
    while not beginning.done:
        manifest = _enlist(root, opened, beginning, lease)
        if manifest.state == "building":
            seconds += _add(root, opened, manifest, lease, executor, counter)
        beginning = go_on(root, opened, beginning)
    return report_of(root, beginning, counter.shards, counter.built, seconds)


def _add(root: Root, opened: Opened, manifest: Manifest, lease: Lease, executor: Executor, counter: _Counter) -> float:
    """Makes what is missing of the addition that is being built, and seals it; gives the seconds it took."""
    addition = manifest.additions[-1]
    claims = Claims(root, addition, lease)
    claims.tidy()
    fields = {name: opened.spec.teacher.fields[name] for name in addition.fields}
    teacher = opened.spec.teacher.model_copy(update={"fields": fields})
    opened = replace(opened, spec=opened.spec.model_copy(update={"teacher": teacher}))
    workers = 1 if executor == "serial" else worker_count(opened.spec.compute)
    together = views_together(addition, opened.spec.compute.views_per_decode, workers)
    started = time.perf_counter()
    while works := _left(root, addition, together, counter):
        if not _run(root, opened, manifest, works, executor, counter, claims):
            time.sleep(_POLL)
    seconds = time.perf_counter() - started
    _finish(root, opened.spec, addition, lease, claims)
    counter.sealed(addition)
    return seconds


def _enlist(root: Root, opened: Opened, beginning: Beginning, lease: Lease) -> Manifest:
    """Becomes the one that leads the build, or one of those that share it; an addition is then begun."""
    while True:
        leader = lease.claim(LEAD)
        if not lease.me.joined or (leader is not None and leader.exclusive):
            _require_alone(root, lease, leader)
        # Whoever led before may have begun or sealed it since we looked.
        if found_manifest(root) != beginning.found:
            beginning = prepare(root, opened)
        found = beginning.found
        if found is not None and (found.state == "building" or beginning.done):
            return found
        if leader is None:
            return begin(root, beginning)
        time.sleep(_POLL)


def _require_alone(root: Root, lease: Lease, leader: Builder | None) -> None:
    others = [one for one in at_work(root) if one.joined and one.id != lease.me.id]
    other = leader or (others[0] if others else None)
    if other is not None:
        if other.exclusive:
            hint = "Wait until it is done, then run the same command again."
            raise BuildError(root.url, "is being repaired, or given up in part, by another process", other, hint)
        hint = (
            "Wait until it is done, or share the work: the same command with --join. If it is gone, the same command "
            "takes over when its lease has run out."
        )
        raise BuildError(root.url, "is being built by another process", other, hint)


def _left(root: Root, addition: Addition, together: int, counter: _Counter) -> list[Work]:
    left = what_is_left(root, addition, together)
    if left is None:
        return []
    counter.at(left.done)
    return left.works


def _finish(root: Root, spec: BuildSpec, addition: Addition, lease: Lease, claims: Claims) -> None:
    """Seals what is complete, or waits until whoever leads has done so."""
    while True:
        leader = lease.claim(LEAD)
        now = read_manifest(root)
        if not is_open(now, addition):
            return
        if leader is None:
            claims.tidy()
            seal(root, spec, now)
            return
        time.sleep(_POLL)


class _Counter:
    """Adds up rows as receipts come in, and tells whoever shows the progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total = progress, total
        self.done, self.built, self.shards = -1, 0, 0
        self._before = 0
        """Rows of additions that were sealed since."""

    def at(self, done: int) -> None:
        """So many rows of the addition that is being built are committed, by whomever."""
        if self._before + done != self.done:
            self.done = self._before + done
            self._tell()

    def sealed(self, addition: Addition) -> None:
        """An addition is sealed, and the next one begins."""
        self._before += addition.rows * addition.extent.views
        self.at(0)

    def add(self, rows: int) -> None:
        self.done += rows
        self.built += rows
        self.shards += 1
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, self.built)


def _run(
    root: Root,
    opened: Opened,
    manifest: Manifest,
    works: list[Work],
    executor: Executor,
    counter: _Counter,
    claims: Claims,
) -> bool:
    """Makes what of this work is not another builder's; False if that was nothing."""
    before = counter.shards
    try:
        with closing(_receipts(root, opened, manifest, works, executor, claims)) as receipts:
            for receipt in receipts:
                claims.committed(receipt)
                counter.add(rows_of(manifest.additions[-1], receipt.shard))
    except BaseException as error:
        # Closing has stopped the workers, also after Ctrl-C: what they had half written goes too, if the disk lets us.
        with contextlib.suppress(OSError, TeacherCacheError):
            claims.tidy()
        if isinstance(error, OSError | BuildError):
            claims.require()
        raise
    return counter.shards > before


def _receipts(
    root: Root, opened: Opened, manifest: Manifest, left: list[Work], executor: Executor, claims: Claims
) -> Generator[Receipt, None, None]:
    waiting = iter(left)
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
