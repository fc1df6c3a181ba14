"""Verify, bytes: every file of a cache against its receipt and its place, and whatever lies beside them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.lease import is_lease
from teacher_cache.manifest import MANIFEST, Manifest
from teacher_cache.reader import Cache
from teacher_cache.receipts import receipt_path
from teacher_cache.samples import read_checked
from teacher_cache.storage import Store, open_store
from teacher_cache.storage.files import RESTORE, is_temporary

Place = tuple[int, int]
"""(view, shard)."""


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
    """Tables that are not needed to open a cache, gone or altered."""
    strays: tuple[str, ...]
    """Files that nothing names; folders that lead to none have a slash at the end."""


def find_damage(cache: Cache, progress: Callable[[int, int], None] | None = None) -> Damage:
    """Reads every byte of a cache.

    Args:
        cache: an open cache.
        progress: told after each shard (shards done, shards in all).
    """
    manifest = cache.manifest
    store = open_store(manifest.store.kind, manifest.grid)
    groups = [group for view in range(manifest.views) for group in manifest.groups(view)]
    metadata = store.metadata(groups)
    planned = {place: planned_files(manifest, store, *place) for place in _places(manifest)}
    foreign = tuple(place for place, files in cache.files.items() if files.keys() != planned.get(place))
    shards = {}
    for number, place in enumerate(sorted(cache.files.keys() - set(foreign))):
        if found := tuple(_damaged(cache, store, *place)):
            shards[place] = found
        if progress is not None:
            progress(number + 1, len(cache.files))
    return Damage(
        holes=tuple(place for place in planned if place not in cache.files),
        foreign=foreign,
        shards=shards,
        metadata={name: data for name, data in metadata.items() if not _holds(cache.path / name, data)},
        tables=tuple(_tables(cache)),
        strays=tuple(_strays(cache, {*metadata, *(path for files in planned.values() for path in files)})),
    )


def _places(manifest: Manifest) -> Iterator[Place]:
    return ((view, shard) for view in range(manifest.views) for shard in range(manifest.grid.shards))


def planned_files(manifest: Manifest, store: Store, view: int, shard: int) -> set[str]:
    """The files that a shard of a view has, whatever its receipt says."""
    return {path for group in manifest.groups(view) for path in store.paths(group, shard)}


def _damaged(cache: Cache, store: Store, view: int, shard: int) -> Iterator[CacheError]:
    files = cache.files[view, shard]
    for group in cache.manifest.groups(view):
        paths = store.paths(group, shard)
        # A pipe in a file's place would be waited for, and never end.
        if odd := [path for path in paths if _is_odd(cache.path / path)]:
            for path in odd:
                yield CorruptionError(path, "must be a file: it was committed", "something else", RESTORE)
        else:
            try:
                yield from store.damage(cache.path, group, shard, files)
            except CacheError as error:
                # What cannot be read cannot be called altered, and is no less bad.
                yield error


def _is_odd(path: Path) -> bool:
    """Whether something stands there that is no file; a link to a file is one."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _holds(path: Path, data: bytes) -> bool:
    try:
        return not _is_odd(path) and path.read_bytes() == data
    except OSError:
        return False


def _tables(cache: Cache) -> Iterator[CacheError]:
    # Without the others the cache could not have been opened.
    if cache.manifest.references is not None:
        try:
            read_checked(cache.path, cache.manifest.references)
        except CorruptionError as error:
            yield error


def _strays(cache: Cache, planned: set[str]) -> Iterator[str]:
    manifest = cache.manifest
    known = {MANIFEST, *planned, *(table.path for table in manifest.tables)}
    building = manifest.state == "building"
    if building:
        known |= {receipt_path(view, shard) for view, shard in _places(manifest)}
    folders = {"/".join(parts[:depth]) for parts in (name.split("/") for name in known) for depth in range(len(parts))}
    for name in _beside(cache.path, "", known, folders):
        # While a build runs, it may be writing just now.
        if not (building and (is_temporary(Path(name)) or is_lease(name))):
            yield name


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
