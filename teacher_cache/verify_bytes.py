"""Verify, bytes: every file of a cache against its receipt and its place, and whatever lies beside them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from teacher_cache.addition import Addition
from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.index import Index
from teacher_cache.lease import is_lease
from teacher_cache.manifest import MANIFEST
from teacher_cache.poison import is_note
from teacher_cache.reader import Cache
from teacher_cache.receipts import receipt_of
from teacher_cache.storage import FileRecord, Store, open_store
from teacher_cache.storage.files import RESTORE, is_temporary
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.root import Root
from teacher_cache.tables import read_checked


class Place(NamedTuple):
    """One shard of one addition."""

    addition: int
    view: int
    shard: int

    def __str__(self) -> str:
        where = f" of addition {self.addition}" if self.addition else ""
        return f"view {self.view}, shard {self.shard}{where}"


@dataclass(frozen=True)
class Damage:
    """What is not as it was committed."""

    holes: tuple[Place, ...]
    """Shards of the plan that are not committed."""
    foreign: tuple[Place, ...]
    """Shards whose receipt names other files than the plan: their bytes prove nothing."""
    shards: dict[Place, tuple[CacheError, ...]]
    """Of each damaged shard, what is wrong with its files."""
    metadata: dict[str, bytes]
    """What each `zarr.json` that is gone or altered must be."""
    tables: tuple[CacheError, ...]
    """Tables that are gone or altered."""
    receipts: tuple[CacheError, ...]
    """Receipts of an addition that is being built which cannot be trusted."""
    strays: tuple[str, ...]
    """Files that nothing names; folders that lead to none have a slash at the end."""
    files: int = 0
    bytes: int = 0


def find_damage(cache: Cache, progress: Callable[[int, int], None] | None = None) -> Damage:
    """Reads every byte of a cache.

    Args:
        cache: an open cache.
        progress: told after each shard (shards done, shards in all).
    """
    found = _Found(cache, progress)
    for number, index in enumerate(cache.indices):
        found.look(number, index)
    return Damage(
        holes=tuple(found.holes),
        foreign=tuple(found.foreign),
        shards=found.shards,
        metadata={name: data for name, data in found.metadata.items() if not _holds(cache.root, name, data)},
        tables=tuple(bad_tables(cache)),
        receipts=tuple(found.receipts),
        strays=tuple(_strays(cache, found.known | found.metadata.keys())),
        files=found.files,
        bytes=found.bytes,
    )


class _Found:
    """What looking at one addition after the other has shown."""

    def __init__(self, cache: Cache, progress: Callable[[int, int], None] | None) -> None:
        self._cache, self._progress = cache, progress
        self._total = sum(1 for index in cache.indices for _ in index.places())
        self._done = self.files = self.bytes = 0
        self.holes: list[Place] = []
        self.foreign: list[Place] = []
        self.shards: dict[Place, tuple[CacheError, ...]] = {}
        self.receipts: list[CacheError] = []
        self.metadata: dict[str, bytes] = {}
        self.known: set[str] = set()

    def look(self, number: int, index: Index) -> None:
        """One addition."""
        addition = index.addition
        store = open_store(addition.store.kind, addition.grid)
        self.metadata |= store.metadata(addition.all_groups)
        for view in addition.view_numbers:
            committed = index.shards(view)
            for shard in range(addition.grid.shards):
                self.known |= set(index.planned(view, shard))
                if not committed[shard]:
                    self.holes.append(Place(number, view, shard))
            try:
                self._look_at_view(number, index, store, view)
            except CacheError:
                # The table of the view's receipts: it is among those that are looked at by themselves.
                if not index.sealed:
                    raise

    def _look_at_view(self, number: int, index: Index, store: Store, view: int) -> None:
        for shard in index.shards(view).nonzero()[0].tolist():
            place = Place(number, view, shard)
            try:
                files = index.files(view, shard)
            except CacheError as error:
                if index.sealed:
                    raise
                self.receipts.append(error)
                continue
            self.files += len(files)
            self.bytes += sum(record.size for record in files.values())
            if files.keys() != set(index.planned(view, shard)):
                self.foreign.append(place)
            elif wrong := tuple(_damaged(self._cache.root, index, store, place, files)):
                self.shards[place] = wrong
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)


def _damaged(
    root: Root, index: Index, store: Store, place: Place, files: Mapping[str, FileRecord]
) -> Iterator[CacheError]:
    for group in index.addition.groups(place.view):
        paths = store.paths(group, place.shard)
        # A pipe in a file's place would be waited for, and never end.
        if odd := [path for path in paths if _is_odd(root, path)]:
            for path in odd:
                yield CorruptionError(path, "must be a file: it was committed", "something else", RESTORE)
        else:
            try:
                # The bytes that are there now, and not a copy of what was.
                with root.fresh() as now:
                    yield from store.damage(now, group, place.shard, files)
            except CacheError as error:
                # What cannot be read cannot be called altered, and is no less bad.
                yield error


def _is_odd(root: Root, name: str) -> bool:
    """Whether something stands there that is no file; a link to a file is one."""
    if not isinstance(root, LocalRoot):
        return False
    try:
        return not stat.S_ISREG((root.path / name).stat().st_mode)
    except OSError:
        return False


def _holds(root: Root, name: str, data: bytes) -> bool:
    try:
        return not _is_odd(root, name) and root.read(name) == data
    except (OSError, CacheError):
        # Not `BuildError`: a store that does not answer has altered nothing.
        return False


def bad_tables(cache: Cache) -> Iterator[CacheError]:
    """The tables of a manifest that are gone or altered."""
    for table in cache.manifest.tables:
        try:
            if _is_odd(cache.root, table.path):
                raise CorruptionError(table.path, "must be a file", "something else", RESTORE)
            read_checked(cache.root, table)
        except CacheError as error:
            yield error


def _strays(cache: Cache, planned: set[str]) -> Iterator[str]:
    addition = cache.manifest.open_addition
    known = {MANIFEST, *planned, *(table.path for table in cache.manifest.tables)}
    folders = {"/".join(parts[:depth]) for parts in (name.split("/") for name in known) for depth in range(len(parts))}
    if addition is not None:
        folders |= {"receipts", "poison", *(f"receipts/v{view:04d}" for view in addition.view_numbers)}
    beside = (
        _beside(cache.root.path, "", known, folders)
        if isinstance(cache.root, LocalRoot)
        else (name for name in (*cache.root.names(), *cache.root.unfinished()) if name not in known)
    )
    for name in beside:
        # While a build runs, it may be writing just now.
        if addition is None or not _is_at_work(addition, name):
            yield name


def _is_at_work(addition: Addition, name: str) -> bool:
    """Whether a file that no manifest names is that of a build, as long as it runs."""
    receipt = receipt_of(name)
    if receipt is not None:
        return receipt[0] in addition.view_numbers and receipt[1] < addition.grid.shards
    folders = ("receipts/", "poison/", *(f"receipts/v{view:04d}/" for view in addition.view_numbers))
    return is_temporary(Path(name)) or is_lease(name) or is_note(name) or name in folders


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        # Nothing can be said of what is inside: files that belong there are found to be unreadable one by one.
        return []


def _beside(root: Path, folder: str, known: set[str], folders: set[str]) -> Iterator[str]:
    """What is below a folder and not known; links are followed where a known folder is expected, and nowhere else."""
    for entry in _entries(root / folder):
        name = f"{folder}/{entry.name}" if folder else entry.name
        if name in folders and entry.is_dir():
            yield from _beside(root, name, known, folders)
        elif entry.is_dir(follow_symlinks=False):
            inside = list(_beside(root, name, set(), set()))
            # A folder in a file's place is that file's damage; an empty one elsewhere has no file to be named by.
            yield from inside if inside or name in known else [f"{name}/"]
        elif name not in known:
            yield name
