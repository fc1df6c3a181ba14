"""Beginning a build: refuse what does not fit, write what comes before the first shard."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from teacher_cache import samples as sample_table
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.lease import is_lease
from teacher_cache.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from teacher_cache.plan import Draft, Opened, draft, first_views
from teacher_cache.proof import reference_count, write_references
from teacher_cache.storage import open_store, write_atomic
from teacher_cache.storage.files import is_temporary
from teacher_cache.views import Views


def _require_repeatable(opened: Opened, rows: list[int], views: Views) -> None:
    """A callable that draws from another generator than torch's gives other pixels for the same seed."""
    again = opened.view_of(rows, 0).digests()
    differs = again != views.digests()
    if differs.any():
        key = opened.source.keys[rows[int(differs.argmax())]]
        hint = "Draw from torch's global generator only: NumPy's and Python's are not seeded."
        raise SpecError("views", "must give the same view twice", f"two different views of {key}", hint)


_HINTS = {
    "source": "The data set changed since the cache was begun: restore it, or begin a new cache.",
    "recipe": "Restore `views` as it was, or begin a new cache.",
    "teacher": "This is a cache of another teacher (weights, preprocessing or precision): begin a new cache.",
    "encoding": "Restore `teacher.fields` as they were, or begin a new cache.",
    "store": "Restore `store` as it was, or begin a new cache.",
    "numerics": "Restore `teacher.micro_batch`, `compute` and `fidelity`, or begin a new cache.",
}


_BEGINNING = re.compile(r"(samples|references|constants)-[0-9a-f]{12}\.parquet|data/(.*/)?zarr\.json")
"""What `begin` writes before there is a manifest."""


def _beginning(root: Path) -> list[Path]:
    """What a `begin` that was killed may have left.

    Raises:
        SpecError: the folder holds something else: it is not a cache, and must not become half of one.
    """
    files = [path for path in root.rglob("*") if path.is_file()] if root.is_dir() else []
    left = []
    for path in files:
        name = path.relative_to(root).as_posix()
        if _BEGINNING.fullmatch(name) or is_temporary(path):
            left.append(path)
        elif not is_lease(name) and path.exists():
            hint = "Name a new or an empty folder."
            raise SpecError("cache", f"is a folder without {MANIFEST} that holds other files", path, hint)
    return left


@dataclass(frozen=True, eq=False)
class Beginning:
    """A cache that fits the spec, or what will be written to begin one."""

    found: Manifest | None
    """The cache that is there."""
    drafted: Draft
    rows: list[int]
    """Whose views are kept whole."""
    views: list[int]
    """The number of the view that is kept of each of them."""
    kept: list[Tensor]
    """uint8 [C, H, W], one for each."""


def found_manifest(root: Path) -> Manifest | None:
    """The manifest of the cache that is there, if one is."""
    return read_manifest(root) if (root / MANIFEST).exists() else None


def prepare(root: Path, opened: Opened) -> Beginning:
    """Refuses what cannot be begun or gone on with; writes nothing.

    Raises:
        MismatchError: a cache is there that was begun with another source, teacher, recipe or encoding.
        SpecError: the folder holds something else, or the views cannot be made twice.
    """
    found = found_manifest(root)
    drafted = draft(opened, found)
    planned = drafted.manifest
    if found is not None:
        _require_same(found, planned)
        return Beginning(found, drafted, [], [], [])
    _beginning(root)
    rows, views = first_views(opened, reference_count(planned.view_shape))
    _require_repeatable(opened, rows, views)
    # Over several views, so that they go through as many of a random recipe's operations as may be.
    numbers = [place % planned.views for place in range(len(rows))]
    kept = [opened.view_of([row], number).pixels_BCHW[0] for row, number in zip(rows, numbers, strict=True)]
    return Beginning(None, drafted, rows, numbers, kept)


def _require_same(found: Manifest, planned: Manifest) -> None:
    if planned.teacher != found.teacher:
        hint = "Restore the name, or begin a new cache: it is part of every path."
        raise MismatchError("teacher.name", f"must be {found.teacher}", planned.teacher, hint)
    for part, hint in _HINTS.items():
        ours, theirs = getattr(planned.identity, part), getattr(found.identity, part)
        if ours != theirs:
            raise MismatchError(part, f"must have the cache's fingerprint {theirs}", ours, hint)
    if found.state == "building" and found.versions != planned.versions:
        hint = f"Go on with {found.versions}, or begin a new cache: both would be in one."
        raise MismatchError("versions", "must be those that began the cache", planned.versions, hint)


def begin(root: Path, opened: Opened, beginning: Beginning | None = None) -> Manifest:
    """Begins a cache, or goes on with the one that is there if it is the same. Only one may do so at a time.

    Raises:
        MismatchError: a cache is there that was begun with another source, teacher, recipe or encoding.
        BuildError: the folder cannot be written.
    """
    beginning = prepare(root, opened) if beginning is None else beginning
    if beginning.found is not None:
        return beginning.found
    for path in _beginning(root):
        path.unlink(missing_ok=True)
    for name, data in beginning.drafted.files.items():
        write_atomic(root, name, data)
    table = sample_table.write_samples(root, sample_table.of_source(opened.source))
    references = write_references(root, beginning.rows, beginning.views, beginning.kept)
    manifest = beginning.drafted.manifest.model_copy(update={"samples": table, "references": references})
    store = open_store(manifest.store.kind, manifest.grid)
    groups = [group for view in range(manifest.views) for group in manifest.groups(view)]
    for name, data in store.metadata(groups).items():
        write_atomic(root, name, data)
    write_manifest(root, manifest)
    return manifest
