"""Verify, structure: whether what a cache says of itself holds together.

Digests find what has changed; they do not find what was wrong when it was signed. What can be computed from the
cache's own parts is computed here a second time, and compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings.constants import needs_constants
from teacher_cache.errors import CorruptionError, SpecError, TeacherCacheError
from teacher_cache.fingerprint import fingerprint, key_digests
from teacher_cache.manifest import MANIFEST, Manifest, TableRef
from teacher_cache.problem import Problem, problem_of
from teacher_cache.proof import REFERENCES
from teacher_cache.reader import Cache
from teacher_cache.samples import RECEIPTS, read_checked, read_columns, read_constants
from teacher_cache.sources import Source, source_fingerprint
from teacher_cache.spec import BuildSpec
from teacher_cache.views import open_recipe

_SIGNED = "Its digest is right, so it was written like this: restore the cache from a copy, or build it again."


def structure(cache: Cache) -> Iterator[Problem]:
    """What a cache says of itself and does not hold; nothing of the data's files is read."""
    try:
        spec = cache.spec
    except SpecError as error:
        yield Problem(MANIFEST, f"its spec cannot be read: {error}", _SIGNED)
        return
    for place, what in (*_manifest(cache, spec), *_samples(cache), *_identity(cache, spec)):
        yield Problem(place, what, _SIGNED)
    try:
        for place, what in (*_receipts(cache), *_references(cache), *_constants(cache)):
            yield Problem(place, what, _SIGNED)
    except TeacherCacheError as error:
        yield problem_of(error)
    if cache.manifest.state == "sealed":
        for what in _totals(cache):
            yield Problem(MANIFEST, f"totals: {what}", _SIGNED)


Wrong = Iterator[tuple[str, str]]
"""(place, what is wrong there)."""


def _manifest(cache: Cache, spec: BuildSpec) -> Wrong:
    manifest = cache.manifest
    said: dict[str, tuple[Any, Any]] = {
        "views": (manifest.views, spec.views.count),
        "teacher": (manifest.teacher, spec.teacher.name),
        "fields": (sorted(manifest.fields), sorted(spec.teacher.fields)),
        "store": (manifest.store, spec.store),
        "promise": (manifest.promise, "seeded-global" if spec.views.callable else "native"),
    }
    for name, (found, wanted) in said.items():
        if found != wanted:
            yield MANIFEST, f"{name} must be what its spec says, {wanted} (found: {found})"
    classes = _classes(manifest)
    if classes and manifest.class_names is not None and len(manifest.class_names) != classes:
        yield MANIFEST, f"class_names must be one for each of {classes} logits (found: {len(manifest.class_names)})"
    tables = {"samples": manifest.samples, "receipts": manifest.receipts}
    for stem, table in (tables | {"references": manifest.references, "constants": manifest.constants}).items():
        if table is not None and table.path != _name(stem, table):
            yield MANIFEST, f"{stem} must be named by its digest, {_name(stem, table)} (found: {table.path})"


def _name(stem: str, table: TableRef) -> str:
    return f"{stem}-{table.digest[:12]}.parquet"


def _classes(manifest: Manifest) -> int | None:
    """How many classes a row's label is one of; None of sequences, whose positions are not the row."""
    shape = manifest.field_shapes.get("logits", ())
    return shape[0] if len(shape) == 1 else None


def _samples(cache: Cache) -> Wrong:
    samples, place = cache.samples, cache.manifest.samples.path
    keys, counts = np.unique(np.array(samples.keys, object), return_counts=True)
    if (counts > 1).any():
        yield place, f"keys must be unique (found twice: {keys[counts > 1][0]})"
    elif len(np.unique(key_digests(samples.keys))) != len(samples.keys):
        yield place, "keys must have different 64-bit digests"
    names = cache.manifest.class_names
    classes = _classes(cache.manifest) if names is None else len(names)
    if samples.labels is not None and classes is not None:
        outside = (samples.labels >= classes) | ((samples.labels < 0) & (names is not None))
        if outside.any():
            yield place, f"labels must be in 0..{classes - 1} (found: {samples.labels[outside][0]})"
    if (samples.sizes < 0).any():
        yield place, f"sizes must be at least 0 (found: {samples.sizes.min()})"


@dataclass(frozen=True)
class _Described:
    """As much of a source as names it."""

    keys: list[str]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    channels: int | None


def _identity(cache: Cache, spec: BuildSpec) -> Wrong:
    """The fingerprints that follow from the manifest's own parts; the teacher's needs its weights."""
    manifest, samples = cache.manifest, cache.samples
    fields = {name: field.model_dump(mode="json") for name, field in manifest.fields.items()}
    kept: dict[str, Any] = {"fields": fields, "shapes": {n: list(s) for n, s in manifest.field_shapes.items()}}
    if manifest.constants is not None:
        kept["constants"] = manifest.constants.digest
    # Not the spec's source: that may be where the data set is now.
    channels = manifest.spec["source"].get("channels")
    source = _Described(samples.keys, samples.sizes, samples.labels, manifest.class_names, channels)
    ours = {
        "encoding": fingerprint("encoding", 1, kept),
        "store": fingerprint("store", 1, manifest.store.model_dump(mode="json")),
        "source": source_fingerprint(cast(Source, source)),
    }
    # A callable is the user's code: to check a cache must not import it.
    if manifest.promise == "native" and spec.views.callable is None:
        try:
            recipe = open_recipe(spec.views)
        except SpecError as error:
            yield MANIFEST, f"its recipe cannot be read: {error}"
            return
        ours["view"] = recipe.view_fingerprint
        ours["recipe"] = fingerprint("views", 1, {"recipe": recipe.fingerprint, "count": spec.views.count})
        if manifest.param_names != recipe.param_names:
            yield MANIFEST, f"param_names must be the recipe's, {recipe.param_names} (found: {manifest.param_names})"
    for part, wanted in ours.items():
        found = getattr(manifest.identity, part)
        if found != wanted:
            yield MANIFEST, f"identity.{part} must be {wanted}, as follows from what it names (found: {found})"


def _receipts(cache: Cache) -> Wrong:
    """Each file once, in its own shard's receipt, and no shard that is not planned."""
    manifest, table = cache.manifest, cache.manifest.receipts
    place = "receipts" if table is None else table.path
    for view, shard in cache.files:
        if not (0 <= view < manifest.views and 0 <= shard < manifest.grid.shards):
            plan = f"views 0..{manifest.views - 1} and shards 0..{manifest.grid.shards - 1}"
            yield place, f"view {view}, shard {shard} must be one of the plan's: {plan}"
    paths: list[str] = [path for files in cache.files.values() for path in files]
    if table is not None:
        columns = read_columns(cache.path, table, RECEIPTS)
        paths = columns["path"]
        if min(columns["size"], default=0) < 0:
            yield place, f"sizes must be at least 0 (found: {min(columns['size'])})"
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            yield place, f"{path} must be named once"
        seen.add(path)


def _references(cache: Cache) -> Wrong:
    manifest, table = cache.manifest, cache.manifest.references
    if table is None:
        return
    try:
        read_checked(cache.path, table)
    except CorruptionError:
        # Its bytes are not the cache's: that is found, and said, where bytes are compared.
        return
    columns = read_columns(cache.path, table, REFERENCES)
    size = math.prod(manifest.view_shape)
    for view, row, pixels in zip(*(columns[name] for name in REFERENCES), strict=True):
        if not (0 <= view < manifest.views and 0 <= row < manifest.rows):
            yield table.path, f"view {view}, row {row} must be one of the cache's"
        if len(pixels) != size:
            yield table.path, f"must hold views of {size} bytes, as view_shape {manifest.view_shape} has it"


def _constants(cache: Cache) -> Wrong:
    manifest = cache.manifest
    wanted = {name for name, field in manifest.fields.items() if needs_constants(field.fixed)}
    found = set(read_constants(cache.path, manifest.constants))
    if wanted != found:
        place = MANIFEST if manifest.constants is None else manifest.constants.path
        yield place, f"must hold the constants of {sorted(wanted)} (found: {sorted(found)})"


def _totals(cache: Cache) -> Iterator[str]:
    manifest, totals = cache.manifest, cache.totals
    size = sum(record.size for files in cache.files.values() for record in files.values())
    if totals.bytes != size:
        yield f"bytes must be {size}, the sum of all files (found: {totals.bytes})"
    alive = int(cache.alive.sum())
    if totals.tombstones != manifest.rows - alive:
        yield f"tombstones must be {manifest.rows - alive}, those of the sample table (found: {totals.tombstones})"
    # A row that could be decoded for one view and not for another is a tombstone, and labelled in the one.
    most = manifest.rows * manifest.views - (manifest.rows - alive)
    least, alive_or_not = alive * manifest.views, manifest.rows * manifest.views
    if not _has_right_answers(cache):
        least = most = 0
    if not least <= totals.labelled <= most:
        yield f"labelled must be {least}..{most}, the views of rows with a label (found: {totals.labelled})"
    if not 0 <= totals.correct <= totals.labelled:
        yield f"correct must be 0..{totals.labelled}, of those with a label (found: {totals.correct})"
    if set(totals.fidelity) != set(manifest.fields):
        yield f"fidelity must be that of {sorted(manifest.fields)} (found: {sorted(totals.fidelity)})"
    for field, found in totals.fidelity.items():
        # Each position of a sequence counts as a row.
        rows = alive_or_not * math.prod(manifest.field_shapes.get(field, ())[:-1])
        if not 0 <= found.get("rows", 0) <= rows:
            yield f"fidelity of {field} must be measured on 0..{rows} rows (found: {found.get('rows')})"


def _has_right_answers(cache: Cache) -> bool:
    """Whether a view has one label that the row's logits can be compared with."""
    mixes = any(name.startswith("partner.") or ".partner_" in name for name in cache.manifest.param_names)
    return cache.labels is not None and _classes(cache.manifest) is not None and not mixes
