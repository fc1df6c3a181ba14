"""Beginning a build: refuse what does not fit, write what comes before an addition's first shard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from teacher_cache.addition import Extent, Identity, TableRef
from teacher_cache.encodings.constants import to_columns
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.extents import missing
from teacher_cache.lease import is_lease
from teacher_cache.manifest import MANIFEST, Manifest, Segment, read_manifest, write_manifest
from teacher_cache.plan import Opened, Prospect, draft, first_views, named_source, prospect, whole_extent
from teacher_cache.proof import reference_count, write_references
from teacher_cache.samples import write_samples
from teacher_cache.seal import clear_begun
from teacher_cache.storage import open_store
from teacher_cache.storage.root import Root
from teacher_cache.tables import named_table, read_columns
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
    "source": "The data set changed since the cache was begun: restore it (it may grow at its end), or begin anew.",
    "recipe": "Restore `views` as it was (`count` may grow), or begin a new cache.",
    "view": "Restore the versions of torch and torchvision, or begin a new cache.",
    "teacher": "This name stands for another teacher (weights, preprocessing or precision): give it another name, and "
    "its answers are added to the cache.",
    "encoding": "Restore it as it was; or keep both: give this one a label, as in `logits@small`.",
    "store": "Restore `store` as it was, or begin a new cache.",
    "numerics": "Restore `teacher.micro_batch`, `compute` and `fidelity`, or begin a new cache.",
}


_BEGINNING = re.compile(
    r"(samples|references|constants)-[0-9a-f]{12}\.parquet|data/(.*/)?zarr\.json|.+\.[0-9a-f]{32}\.tmp"
)
"""What `begin` writes before there is a manifest."""


def _beginning(root: Root) -> list[str]:
    """What a `begin` that was killed may have left.

    Raises:
        SpecError: the folder holds something else: it is not a cache, and must not become half of one.
    """
    left = []
    for name in root.names():
        if _BEGINNING.fullmatch(name):
            left.append(name)
        elif not is_lease(name):
            hint = "Name a new or an empty folder."
            rule = f"is a folder without {MANIFEST} that holds other files"
            raise SpecError("cache", rule, f"{root.url}/{name}", hint)
    return left


@dataclass(frozen=True, eq=False)
class Kept:
    """Views that are kept whole when a cache is begun."""

    rows: list[int]
    views: list[int]
    """The number of the view that is kept of each of them."""
    pixels: list[Tensor]
    """uint8 [C, H, W], one for each."""


@dataclass(frozen=True, eq=False)
class Beginning:
    """A cache that fits the spec, and what it lacks of what the spec asks for."""

    found: Manifest | None
    """The cache that is there."""
    seen: Prospect
    left: tuple[Extent, ...]
    """What is to be added when the addition that is being built, if there is one, is sealed."""
    kept: Kept | None = None
    """Of a cache that is to be begun."""

    @property
    def done(self) -> bool:
        """Whether all that was asked for is there."""
        return self.found is not None and self.found.state == "sealed" and not self.left

    @property
    def rows_left(self) -> int:
        """Views of rows that are not sealed yet."""
        extents = list(self.left)
        if self.found is not None and self.found.open_addition is not None:
            extents.append(self.found.open_addition.extent)
        return sum(extent.rows * extent.views for extent in extents)


def found_manifest(root: Root) -> Manifest | None:
    """The manifest of the cache that is there, if one is."""
    return read_manifest(root) if root.exists(MANIFEST) else None


def prepare(root: Root, opened: Opened) -> Beginning:
    """Refuses what cannot be begun or gone on with; writes nothing.

    Raises:
        MismatchError: a cache is there that was begun with another source, teacher, recipe or encoding.
        SpecError: the folder holds something else, or the views cannot be made twice.
    """
    found = found_manifest(root)
    named = named_source(opened.source, found)
    if found is not None:
        _require_source(found, opened, named)
    seen = prospect(opened, named, found)
    if found is not None:
        _require_same(root, found, seen)
    else:
        _beginning(root)
    left = _left(seen)
    for extent in left:
        # Refuses what no store has room for, before anything is written.
        draft(seen, extent)
    return Beginning(found, seen, left, None if found is not None else _kept(opened, seen))


def go_on(root: Root, opened: Opened, beginning: Beginning) -> Beginning:
    """What is left when an addition is sealed: the teacher, whom a look costs, is not looked at again."""
    found = read_manifest(root)
    if found.state == "building":
        # Another builder has begun it, and may have been asked for something else.
        return prepare(root, opened)
    seen = replace(beginning.seen, found=found)
    return Beginning(found, seen, _left(seen))


def _left(seen: Prospect) -> tuple[Extent, ...]:
    spec = seen.opened.spec
    rows = len(seen.opened.source)
    return tuple(missing(seen.found, rows, spec.views.count, spec.teacher.name, seen.fields))


def _kept(opened: Opened, seen: Prospect) -> Kept:
    rows, views = first_views(opened, reference_count(seen.view_shape))
    _require_repeatable(opened, rows, views)
    # Over several views, so that they go through as many of a random recipe's operations as may be.
    numbers = [place % opened.spec.views.count for place in range(len(rows))]
    pixels = [opened.view_of([row], number).pixels_BCHW[0] for row, number in zip(rows, numbers, strict=True)]
    return Kept(rows, numbers, pixels)


def _require_source(found: Manifest, opened: Opened, named: Mapping[int, str]) -> None:
    """The cache's rows must be the source's first."""
    source = opened.source
    rule = f"must begin with the {found.rows} samples of the cache"
    if len(source) < found.rows:
        raise MismatchError("source", rule, f"{len(source)} samples", _HINTS["source"])
    ours, theirs = named[found.rows], found.segments[-1].source
    if ours != theirs:
        raise MismatchError("source", f"{rule}, fingerprint {theirs}", ours, _HINTS["source"])


def _require_same(root: Root, found: Manifest, seen: Prospect) -> None:
    """What a cache has decided holds for all that is added to it."""
    extent = found.additions[-1].extent if found.state == "building" else whole_extent(seen)
    if found.state == "building":
        _require_wanted(root, extent, seen)
    ours = draft(seen, extent, *_constants(root, seen, extent)).addition
    _compare(ours.identity, found.first.identity, ("recipe", "view", "store"))
    _require_own_name(found, seen)
    for addition in seen.by_teacher():
        _compare(ours.identity, addition.identity, ("teacher",))
        for name in set(addition.fields) & set(seen.chosen.fields):
            mine, known = seen.chosen.fields[name], addition.fields[name]
            if (mine, seen.shapes[name]) != (known, addition.field_shapes[name]):
                rule = f"must be kept as the cache keeps it, {known.encoding.kind} with pool {known.pool}"
                raise MismatchError(f"teacher.fields.{name}", rule, mine.encoding.kind, _HINTS["encoding"])
        _compare(ours.identity, addition.identity, ("numerics",))
    if found.state == "building":
        _compare(ours.identity, found.additions[-1].identity, ("source", "encoding", "extent"))
        if found.additions[-1].versions != ours.versions:
            hint = f"Go on with {found.additions[-1].versions}, or begin a new cache: both would be in one."
            raise MismatchError("versions", "must be those that began what is being built", ours.versions, hint)


def _compare(ours: Identity, theirs: Identity, parts: tuple[str, ...]) -> None:
    for part in parts:
        mine, wanted = getattr(ours, part), getattr(theirs, part)
        if mine != wanted:
            raise MismatchError(part, f"must have the cache's fingerprint {wanted}", mine, _HINTS[part])


def _require_wanted(root: Root, extent: Extent, seen: Prospect) -> None:
    """What is being built must be part of what is asked for: one addition is finished before the next is begun."""
    spec = seen.opened.spec
    asked: dict[str, tuple[object, bool]] = {
        "teacher.name": (spec.teacher.name, spec.teacher.name == extent.teacher),
        "teacher.fields": (seen.fields, set(extent.fields) <= set(seen.fields)),
        "views.count": (spec.views.count, extent.view_numbers.stop <= spec.views.count),
    }
    for field, (value, is_part) in asked.items():
        if not is_part:
            views = f"views {extent.first_view}..{extent.view_numbers.stop - 1}"
            rule = f"does not go on with what is being built: {', '.join(extent.fields)} of {extent.teacher}, {views}"
            hint = (
                f"Finish that first, with its own configuration (teacher-cache describe {root.url} shows it); "
                f"or give it up: teacher-cache abandon {root.url}."
            )
            raise MismatchError(field, rule, value, hint)


def _require_own_name(found: Manifest, seen: Prospect) -> None:
    name, known = seen.opened.spec.teacher.name, {item.identity.teacher: item.teacher for item in found.additions}
    theirs = known.get(seen.opened.teacher.fingerprint, name)
    if theirs != name:
        hint = "Use that name: under another one everything would be computed again."
        raise MismatchError("teacher.name", f"must be {theirs}: the cache knows this very teacher", name, hint)


def _constants(root: Root, seen: Prospect, extent: Extent) -> tuple[TableRef | None, dict[str, bytes]]:
    """What the rows of the extent's fields share: as the cache has it, or as it was just measured."""
    columns = to_columns({name: item for name, item in seen.chosen.constants.items() if name in extent.fields})
    rows = {(field, name): row for field, name, *row in zip(*columns.values(), strict=True)}
    for addition in seen.by_teacher():
        if addition.constants is not None:
            kinds: dict[str, type] = dict.fromkeys(columns, str) | {"data": bytes}
            known = read_columns(root, addition.constants, kinds)
            for field, name, *row in zip(*(known[column] for column in columns), strict=True):
                if field in extent.fields:
                    rows[field, name] = row
    if not rows:
        return None, {}
    whole = [(*place, *row) for place, row in sorted(rows.items())]
    reference, data = named_table("constants", dict(zip(columns, zip(*whole, strict=True), strict=True)))
    return reference, {reference.path: data}


def begin(root: Root, beginning: Beginning) -> Manifest:
    """Writes what comes before the first shard of an addition, the manifest last.

    A kill in the middle leaves a folder without a manifest, or the cache of before; the next call begins anew.
    """
    found, seen, extent = beginning.found, beginning.seen, beginning.left[0]
    if found is None:
        for name in _beginning(root):
            root.remove(name)
    else:
        clear_begun(root, found)
    drafted = draft(seen, extent, *_constants(root, seen, extent))
    for name, data in drafted.files.items():
        root.write(name, data)
    addition = drafted.addition
    store = open_store(addition.store.kind, addition.grid)
    for name, data in store.metadata(addition.all_groups).items():
        root.write(name, data)
    segments = () if found is None else found.segments
    if found is None or extent.first_row == found.rows:
        samples = write_samples(root, seen.opened.source, extent.first_row)
        segments += (Segment(rows=extent.rows, source=addition.identity.source, samples=samples),)
    references = found.references if found else _write_references(root, beginning.kept)
    manifest = Manifest(
        segments=segments,
        additions=(*(found.additions if found else ()), addition),
        tombstones=found.tombstones if found else None,
        references=references,
    )
    write_manifest(root, manifest)
    return manifest


def _write_references(root: Root, kept: Kept | None) -> TableRef:
    assert kept is not None, "a cache that is begun keeps views"
    return write_references(root, kept.rows, kept.views, kept.pixels)
