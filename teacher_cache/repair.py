"""Repair: exactly the bad shards computed again, and written only where the very bytes come out that were committed.

What can be made again: shard files (from source, views and teacher, byte for byte, on the kind of machine that built
them) and `zarr.json` files (from the manifest). What cannot: the manifest and its tables. They say what the rest must
be, and nothing is left that could say it of them.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from teacher_cache.errors import (
    BuildError,
    CacheError,
    CacheNotFoundError,
    CorruptionError,
    MismatchError,
    TeacherCacheError,
)
from teacher_cache.lease import alone, is_lease, sweep
from teacher_cache.manifest import MANIFEST
from teacher_cache.problem import Problem, problem_of
from teacher_cache.reader import Cache
from teacher_cache.receipts import Receipt, receipt_path
from teacher_cache.shard_job import Job, Work, run_work
from teacher_cache.spec import SourceSpec
from teacher_cache.storage import FileRecord
from teacher_cache.storage.files import sync_folder
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.root import Root, open_root
from teacher_cache.verify import damage_problems, is_anothers
from teacher_cache.verify_bytes import Damage, Place, find_damage
from teacher_cache.verify_recompute import job_again
from teacher_cache.verify_structure import structure

Progress = Callable[[int, int, int], None]
"""Called after each shard with (rows done, rows in all, rows that this run has computed), as a build's."""

_TABLES = (
    f"`repair` cannot make it: {MANIFEST} and its tables (samples, receipts, references, constants) say what all else "
    "must be. Restore it from a copy of this cache, or build the cache again."
)


@dataclass(frozen=True)
class RepairReport:
    """What was made good and what was not."""

    path: str
    written: tuple[str, ...]
    """Files that are as they were committed again."""
    uncommitted: tuple[str, ...]
    """Receipts that were taken away, of a cache that is being built: `build` makes their shards again."""
    removed: tuple[str, ...]
    """Files that belonged to nothing."""
    rows: int
    """Rows that were computed."""
    seconds: float
    left: tuple[Problem, ...]
    """What is still wrong."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong any more."""
        return not self.left

    @property
    def rows_per_second(self) -> float:
        """Rows computed in a second."""
        return self.rows / self.seconds if self.seconds else 0.0


@dataclass
class _Done:
    written: list[str] = field(default_factory=list)
    uncommitted: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    rows: int = 0
    left: list[Problem] = field(default_factory=list)


def repair(
    path: str | Path,
    source: SourceSpec | None = None,
    remove_strays: bool = False,
    progress: Progress | None = None,
) -> RepairReport:
    """Finds what `verify` finds, and makes it good.

    Of a sealed cache each bad shard is computed again, and a file is written only if it has the size and the digest
    of the sealed receipts. Of a cache that is being built, what is bad is no longer committed, and the next `build`
    makes it again. Each file appears whole or not at all; the same call goes on after Ctrl-C.

    Args:
        path: the cache.
        source: where the data set is now, if not where the manifest says.
        remove_strays: whether to remove files that belong to nothing.
        progress: told after each shard.

    Raises:
        CacheNotFoundError: there is no cache.
        MismatchError: source, teacher or recipe is another one now, or this machine computes other bytes; nothing
            has been changed but what came out right.
        WorkError: a shard could not be made, a file could not be written, or another process builds the cache.
    """
    root, started, done = open_root(path), time.perf_counter(), _Done()
    cache = _opened(root, source, done)
    if cache is not None:
        damage = find_damage(cache)
        if damage.shards or damage.metadata or damage.receipts or (remove_strays and damage.strays):
            with alone(root, "must not be repaired while another process builds it"):
                _repair_as_it_is(cache, source, damage, remove_strays, progress, done)
        else:
            _repair(cache, damage, remove_strays, progress, done)
    return RepairReport(
        path=root.url,
        written=tuple(done.written),
        uncommitted=tuple(done.uncommitted),
        removed=tuple(done.removed),
        rows=done.rows,
        seconds=time.perf_counter() - started,
        left=tuple(done.left),
    )


def _repair_as_it_is(
    before: Cache, source: SourceSpec | None, seen: Damage, remove_strays: bool, progress: Progress | None, done: _Done
) -> None:
    """Looks again now that nobody builds: a build may have sealed, meanwhile, what seemed to belong to nothing."""
    cache = _opened(before.root, source, done)
    if cache is None:
        return
    if cache.manifest.state == "sealed" and cache.manifest == before.manifest:
        # Nobody has begun or sealed anything: to read every byte once more would show the same.
        _repair(cache, seen, remove_strays, progress, done)
        return
    damage = find_damage(cache)
    # Our own lease is there by now.
    strays = {name for name in damage.strays if not is_lease(name)} | {name for name in seen.strays if is_lease(name)}
    _repair(cache, replace(damage, strays=tuple(sorted(strays))), remove_strays, progress, done)


def _opened(root: Root, source: SourceSpec | None, done: _Done) -> Cache | None:
    try:
        return Cache(root, source)
    except CacheNotFoundError:
        raise
    except CacheError as error:
        done.left.append(problem_of(error, _TABLES if isinstance(error, CorruptionError) else None))
        return None


def _repair(cache: Cache, damage: Damage, remove_strays: bool, progress: Progress | None, done: _Done) -> None:
    root, building = cache.root, cache.manifest.state == "building"
    # With another cache's manifest all receipts seem to be wrong, and none is.
    if damage.receipts and not is_anothers(root, cache.manifest, damage.receipts):
        _uncommit(root, [error.field for error in damage.receipts], done)
        cache = cache.again()
        damage = find_damage(cache)
    wrong = [] if damage.tables else list(structure(cache))
    if damage.tables or damage.receipts or wrong:
        # What the manifest says is itself in doubt: nothing is changed on its word.
        problems = damage_problems(cache, replace(damage, tables=()))
        done.left += [*wrong, *(problem_of(error, _TABLES) for error in damage.tables), *problems]
        return
    if remove_strays:
        # They go first: one may stand where a folder must be.
        _remove(root, damage.strays, done)
        damage = replace(damage, strays=())
    for name, data in damage.metadata.items():
        _write(root, name, data, done)
    last = len(cache.indices) - 1
    open_places = {place for place in damage.shards if building and place.addition == last}
    if open_places:
        _make_room(root, damage)
        _uncommit(
            root, [receipt_path(place.view, place.shard) for place in damage.shards if place in open_places], done
        )
    sealed = {place: errors for place, errors in damage.shards.items() if place not in open_places}
    if sealed:
        _recompute(cache, sealed, progress, done)
    # Holes of what is being built are no damage: `build` fills them.
    holes = tuple(place for place in damage.holes if not (building and place.addition == last))
    rest = replace(damage, shards={}, metadata={}, holes=holes)
    done.left += damage_problems(cache, rest)


def _make_room(root: Root, damage: Damage) -> None:
    """An empty folder in a file's place would stop the build that is to write the file."""
    for error in (error for errors in damage.shards.values() for error in errors):
        _remove_empty_folder(root, error.field)


def _remove_empty_folder(root: Root, name: str) -> None:
    if isinstance(root, LocalRoot):
        with contextlib.suppress(OSError):
            (root.path / name).rmdir()


def _remove(root: Root, strays: tuple[str, ...], done: _Done) -> None:
    for name in strays:
        if is_lease(name):
            # Our own are among them by now: those of builders that are gone are swept away below.
            pass
        elif isinstance(root, LocalRoot):
            path = root.path / name
            path.rmdir() if name.endswith("/") else path.unlink(missing_ok=True)
            _remove_empty(root.path, path.parent)
        else:
            root.remove(name)
        done.removed.append(name)
    sweep(root)
    if isinstance(root, LocalRoot):
        for folder in {(root.path / name).parent for name in strays}:
            if folder.is_dir():
                sync_folder(folder)


def _remove_empty(root: Path, folder: Path) -> None:
    """Folders that are empty now lead to no file: those of the cache are made again when one is written."""
    while folder != root and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _write(root: Root, name: str, data: bytes, done: _Done) -> None:
    # An empty folder in a file's place cannot be renamed over, and holds nothing.
    _remove_empty_folder(root, name)
    root.write(name, data)
    done.written.append(name)


def _uncommit(root: Root, receipts: list[str], done: _Done) -> None:
    for name in receipts:
        _remove_empty_folder(root, name)
        try:
            if isinstance(root, LocalRoot) and (root.path / name).is_dir() and not (root.path / name).is_symlink():
                (root.path / name).rmdir()
            root.remove(name)
        except (OSError, BuildError) as error:
            hint = "Empty that folder, or change the permissions; then run the same command again."
            raise BuildError(name, "cannot be removed", error, hint) from error
        done.uncommitted.append(name)
    if isinstance(root, LocalRoot):
        for folder in {(root.path / name).parent for name in receipts}:
            if folder.is_dir():
                sync_folder(folder)


def _recompute(
    cache: Cache, damaged: Mapping[Place, tuple[CacheError, ...]], progress: Progress | None, done: _Done
) -> None:
    additions = cache.manifest.additions
    spans = [additions[place.addition].span(place.shard) for place in damaged]
    total = sum(stop - start for start, stop in spans)
    tell = progress or (lambda _done, _total, _built: None)
    tell(0, total, 0)
    threads, jobs = torch.get_num_threads(), dict[int, Job]()
    try:
        for (place, errors), (start, stop) in zip(damaged.items(), spans, strict=True):
            if place.addition not in jobs:
                jobs = {place.addition: job_again(cache, additions[place.addition])}
            try:
                if not _repair_shard(cache, jobs[place.addition], place, done):
                    done.left += [problem_of(error, _TABLES) for error in errors]
            except CorruptionError as error:
                # One of its samples is not what the teacher saw: other shards have other samples.
                done.left.append(problem_of(error))
            done.rows += stop - start
            tell(done.rows, total, done.rows)
    finally:
        torch.set_num_threads(threads)


def _repair_shard(cache: Cache, job: Job, place: Place, done: _Done) -> bool:
    """Makes a shard in a folder of its own, compares all of it with the receipts, then writes what differs.

    Returns:
        Whether something differed; if not, what is wrong was signed.
    """
    before = len(done.written)
    with tempfile.TemporaryDirectory(prefix="teacher-cache-repair-") as folder:
        scratch = LocalRoot(Path(folder))
        receipt = _made(cache, replace(job, root=scratch), Work((place.view,), place.shard))
        _require_same(cache, place, receipt)
        for record in receipt.files:
            data = scratch.read(record.path)
            if not _stands(cache.root, record.path, data):
                _write(cache.root, record.path, data, done)
    return len(done.written) > before


def _made(cache: Cache, job: Job, work: Work) -> Receipt:
    try:
        (receipt,) = run_work(job, work)
    except MismatchError as error:
        if error.field not in set(cache.samples.keys):
            raise
        raise CorruptionError(error.field, error.rule, error.value, error.hint) from error
    return receipt


def _stands(root: Root, name: str, data: bytes) -> bool:
    """Whether a file is there and has these bytes: then it is not touched."""
    if isinstance(root, LocalRoot) and not (root.path / name).is_file():
        return False
    try:
        return root.read(name) == data
    except (OSError, TeacherCacheError):
        return False


def _require_same(cache: Cache, place: Place, receipt: Receipt) -> None:
    index = cache.indices[place.addition]
    committed: Mapping[str, FileRecord] = index.files(place.view, place.shard)
    for record in receipt.files:
        if committed.get(record.path) != record:
            rule = f"must come out as it was committed, with digest {committed[record.path].digest}"
            then = f"device, processor, and versions {index.addition.versions}"
            hint = (
                f"This machine computes other bytes, and nothing of this shard was changed. Run the same command on a "
                f"machine like the one that built it ({then}), restore the file from a copy, or build the cache again."
            )
            raise MismatchError(record.path, rule, record.digest, hint)
