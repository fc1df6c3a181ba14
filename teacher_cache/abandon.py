"""Abandon: gives up what is being added to a cache; what was sealed before stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from teacher_cache.addition import Addition
from teacher_cache.errors import SpecError
from teacher_cache.index import Index
from teacher_cache.lease import alone, is_lease, sweep
from teacher_cache.manifest import Manifest, read_manifest, write_manifest
from teacher_cache.receipts import receipt_names
from teacher_cache.seal import clear_begun
from teacher_cache.storage import open_store
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.root import Root, open_root, remove_unfinished


@dataclass(frozen=True)
class AbandonReport:
    """What was given up."""

    path: str
    addition: int
    """Its number in the cache's history."""
    shards: int
    """Those that were committed."""
    files: int
    """Those that were removed, the tables beside the manifest not counted."""


def abandon(path: str | Path) -> AbandonReport:
    """Removes the addition that is being built.

    Killed at any moment, the same call goes on: receipts go first, then files, and the manifest last names what was
    sealed and nothing else.

    Args:
        path: the cache.

    Raises:
        SpecError: nothing is being added, or nothing was sealed before.
        CacheError: there is no cache.
        BuildError: another process builds it, or a file cannot be removed.
    """
    root = open_root(path)
    # Before a lease is written: where there is no cache nothing is made.
    read_manifest(root)
    with alone(root, "must not be changed while another process builds it"):
        manifest = read_manifest(root)
        kept = _require_some(root, manifest)
        addition = manifest.additions[-1]
        receipts = receipt_names(root)
        for name in receipts:
            root.remove(name)
        files = sorted(_files(root, addition, kept))
        for name in files:
            root.remove(name)
        write_manifest(root, kept)
        clear_begun(root, kept)
        sweep(root)
        remove_unfinished(root, is_lease)
        if isinstance(root, LocalRoot):
            _remove_empty(root.path / "data")
    return AbandonReport(root.url, len(manifest.additions) - 1, len(receipts), len(files))


def _require_some(root: Root, manifest: Manifest) -> Manifest:
    """The manifest without what is being added."""
    kept = manifest.sealed()
    if manifest.state == "sealed":
        # A call that was killed when all but the last was done.
        clear_begun(root, manifest)
        sweep(root)
    if manifest.state == "sealed" or kept is None:
        found = "everything is sealed" if kept is not None else "its first addition is being built"
        hint = "There is nothing to give up." if kept is not None else "Remove the whole cache instead."
        raise SpecError(root.url, "must have something sealed, and something that is being added to it", found, hint)
    return kept


def _files(root: Root, addition: Addition, kept: Manifest) -> set[str]:
    """What is there of an addition, and of no other."""
    index = Index(root, addition)
    planned = {
        path
        for view in addition.view_numbers
        for shard in range(addition.grid.shards)
        for path in index.planned(view, shard)
    }
    described = _metadata(addition) - {name for item in kept.additions for name in _metadata(item)}
    return (planned | described) & set(root.names("data/"))


def _metadata(addition: Addition) -> set[str]:
    return set(open_store(addition.store.kind, addition.grid).metadata(addition.all_groups))


def _remove_empty(folder: Path) -> None:
    for below in sorted(folder.rglob("*"), reverse=True):
        if below.is_dir() and not any(below.iterdir()):
            below.rmdir()
