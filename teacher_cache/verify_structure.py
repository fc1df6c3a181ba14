"""Verify, structure: whether what a cache says of itself holds together.

Digests find what has changed; they do not find what was wrong when it was signed. What can be computed from the
cache's own parts is computed here a second time, and compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.addition import Addition, TableRef
from teacher_cache.encodings.constants import needs_constants
from teacher_cache.errors import SpecError, TeacherCacheError
from teacher_cache.fingerprint import key_digests
from teacher_cache.index import Index
from teacher_cache.manifest import MANIFEST, Manifest
from teacher_cache.plan import encoding_fingerprint, store_fingerprint
from teacher_cache.problem import Problem, problem_of
from teacher_cache.proof import REFERENCES
from teacher_cache.reader import Cache
from teacher_cache.samples import Keys
from teacher_cache.sources import source_fingerprints
from teacher_cache.sources.base import Channels
from teacher_cache.spec import BuildSpec, is_logits
from teacher_cache.tables import read_columns, read_constants
from teacher_cache.views import open_recipe

_SIGNED = "Its digest is right, so it was written like this: restore the cache from a copy, or build it again."


def structure(cache: Cache) -> Iterator[Problem]:
    """What a cache says of itself and does not hold; nothing of the data's files is read."""
    try:
        for place, what in _wrong(cache):
            yield Problem(place, what, _SIGNED)
    except SpecError as error:
        yield Problem(MANIFEST, f"its spec cannot be read: {error}", _SIGNED)
    except TeacherCacheError as error:
        yield problem_of(error)


Wrong = Iterator[tuple[str, str]]
"""(place, what is wrong there)."""


def _wrong(cache: Cache) -> Wrong:
    specs = [cache.spec_of(addition) for addition in cache.manifest.additions]
    for addition, spec in zip(cache.manifest.additions, specs, strict=True):
        yield from _addition(addition, spec)
    yield from (*_names(cache.manifest), *_samples(cache), *_source(cache))
    for addition, spec in zip(cache.manifest.additions, specs, strict=True):
        yield from _identity(addition, spec)
    yield from (*_blocks(cache.manifest), *_references(cache))
    for index in cache.indices:
        yield from _constants(cache, index.addition)
        if index.sealed:
            yield from _receipts(index)
            yield from ((MANIFEST, f"totals: {what}") for what in _totals(cache, index))


def _addition(addition: Addition, spec: BuildSpec) -> Wrong:
    extent = addition.extent
    said: dict[str, tuple[Any, Any]] = {
        "teacher": (extent.teacher, spec.teacher.name),
        "fields": (sorted(addition.fields), sorted(spec.teacher.fields)),
        "store": (addition.store, spec.store),
        "promise": (addition.promise, "seeded-global" if spec.views.callable else "native"),
    }
    for name, (found, wanted) in said.items():
        if found != wanted:
            yield MANIFEST, f"{name} must be what its spec says, {wanted} (found: {found})"
    if extent.view_numbers.stop > spec.views.count:
        yield MANIFEST, f"views must be of its spec's {spec.views.count} (found: {extent.view_numbers})"
    classes = _classes(addition)
    if classes and addition.class_names is not None and len(addition.class_names) != classes:
        yield MANIFEST, f"class_names must be one for each of {classes} logits (found: {len(addition.class_names)})"


def _names(manifest: Manifest) -> Wrong:
    tables: list[tuple[str, TableRef | None]] = []
    for segment in manifest.segments:
        tables += [("samples", table) for table in segment.samples] + [("content", table) for table in segment.content]
    for addition in manifest.additions:
        tables += [("receipts", table) for table in addition.receipts] + [("constants", addition.constants)]
    for stem, table in (*tables, ("references", manifest.references), ("tombstones", manifest.tombstones)):
        if table is not None and table.path != _name(stem, table):
            yield MANIFEST, f"{stem} must be named by its digest, {_name(stem, table)} (found: {table.path})"


def _name(stem: str, table: TableRef) -> str:
    return f"{stem}-{table.digest[:12]}.parquet"


def _classes(addition: Addition) -> int | None:
    """How many classes a row's label is one of; None of sequences, whose positions are not the row."""
    shape = next((shape for field, shape in addition.field_shapes.items() if is_logits(field)), ())
    return shape[0] if len(shape) == 1 else None


def _samples(cache: Cache) -> Wrong:
    samples, place = cache.samples, cache.manifest.segments[0].samples[0].path
    keys = list(samples.keys)
    if len(set(keys)) != len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        yield place, f"keys must be unique (found twice: {twice})"
    elif len(np.unique(samples.digests)) != len(keys):
        yield place, "keys must have different 64-bit digests"
    if not np.array_equal(samples.digests, key_digests(keys)):
        yield place, "digests must be those of the keys"
    names = cache.manifest.class_names
    classes = _classes(cache.manifest.first) if names is None else len(names)
    if samples.labels is not None and classes is not None:
        outside = (samples.labels >= classes) | ((samples.labels < 0) & (names is not None))
        if outside.any():
            yield place, f"labels must be in 0..{classes - 1} (found: {samples.labels[outside][0]})"
    if len(samples.content) != len(keys):
        yield place, "contents must be as many as keys"
    if (samples.sizes < 0).any():
        yield place, f"sizes must be at least 0 (found: {samples.sizes.min()})"


@dataclass(frozen=True)
class _Described:
    """As much of a source as names it."""

    keys: Keys
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    channels: Channels


def _source(cache: Cache) -> Wrong:
    manifest, samples = cache.manifest, cache.samples
    # Not the spec's source: that may be where the data set is now.
    channels = manifest.first.spec["source"].get("channels")
    source = _Described(samples.keys, samples.sizes, samples.labels, manifest.class_names, channels)
    stops = manifest.stops
    for stop, segment, found in zip(stops, manifest.segments, source_fingerprints(source, stops), strict=True):
        if segment.source != found:
            yield MANIFEST, f"segments: source must be {found}, as follows from the sample table, up to row {stop}"
    by_stop = {stop: segment.source for stop, segment in zip(stops, manifest.segments, strict=True)}
    for addition in manifest.additions:
        wanted = by_stop[addition.extent.stop_row]
        if addition.identity.source != wanted:
            yield MANIFEST, f"identity.source must be its segment's, {wanted} (found: {addition.identity.source})"


def _identity(addition: Addition, spec: BuildSpec) -> Wrong:
    """The fingerprints that follow from the manifest's own parts; the teacher's needs its weights."""
    ours = {
        "encoding": encoding_fingerprint(addition.fields, addition.field_shapes, addition.constants),
        "store": store_fingerprint(addition.store),
        "extent": addition.extent.fingerprint,
    }
    # A callable is the user's code: to check a cache must not import it.
    if addition.promise == "native" and spec.views.callable is None:
        try:
            recipe = open_recipe(spec.views)
        except SpecError as error:
            yield MANIFEST, f"its recipe cannot be read: {error}"
            return
        ours |= {"view": recipe.view_fingerprint, "recipe": recipe.fingerprint}
        if addition.param_names != recipe.param_names:
            yield MANIFEST, f"param_names must be the recipe's, {recipe.param_names} (found: {addition.param_names})"
    for part, wanted in ours.items():
        found = getattr(addition.identity, part)
        if found != wanted:
            yield MANIFEST, f"identity.{part} must be {wanted}, as follows from what it names (found: {found})"


def _blocks(manifest: Manifest) -> Wrong:
    """Every answer once, and one proof for every view of a row that was answered."""
    seen: set[tuple[int, int, str, str]] = set()
    for extent in (addition.extent for addition in manifest.additions):
        for view in extent.view_numbers:
            proof = (extent.first_row, view, "", "")
            wanted = {(extent.first_row, view, extent.teacher, field) for field in extent.fields}
            if wanted & seen or extent.proof == (proof in seen):
                yield (
                    MANIFEST,
                    f"additions must hold view {view} of rows {extent.first_row} on once, and its proof first",
                )
                return
            seen |= {*wanted, proof}


def _receipts(index: Index) -> Wrong:
    """Each file in its own place of the tables, which is where the plan has it."""
    for view in index.addition.view_numbers:
        for shard in range(index.addition.grid.shards):
            files = index.files(view, shard)
            if list(files) != index.planned(view, shard):
                place = index.addition.receipts[view - index.addition.view_numbers.start].path
                yield place, f"view {view}, shard {shard} must have the plan's files, in order (found: {list(files)})"
            if any(record.size < 0 for record in files.values()):
                yield MANIFEST, f"view {view}, shard {shard}: sizes must be at least 0"


def _references(cache: Cache) -> Wrong:
    manifest, table = cache.manifest, cache.manifest.references
    if table is None:
        return
    columns = read_columns(cache.root, table, REFERENCES)
    size = math.prod(manifest.view_shape)
    for view, row, pixels in zip(*(columns[name] for name in REFERENCES), strict=True):
        if not (0 <= view < manifest.views and 0 <= row < manifest.rows):
            yield table.path, f"view {view}, row {row} must be one of the cache's"
        if len(pixels) != size:
            yield table.path, f"must hold views of {size} bytes, as view_shape {manifest.view_shape} has it"


def _constants(cache: Cache, addition: Addition) -> Wrong:
    wanted = {name for name, field in addition.fields.items() if needs_constants(field.fixed)}
    found = set(read_constants(cache.root, addition.constants))
    if wanted != found:
        place = MANIFEST if addition.constants is None else addition.constants.path
        yield place, f"must hold the constants of {sorted(wanted)} (found: {sorted(found)})"


def _totals(cache: Cache, index: Index) -> Iterator[str]:
    addition, totals = index.addition, index.addition.totals
    assert totals is not None, "it is sealed"
    places = index.places()
    size = sum(record.size for view, shard in places for record in index.files(view, shard).values())
    if totals.bytes != size:
        yield f"bytes must be {size}, the sum of all files (found: {totals.bytes})"
    extent = addition.extent
    alive = int(cache.alive[extent.first_row : extent.stop_row].sum())
    dead = extent.rows - alive
    # What an earlier addition met may be less: a sample may break, or kill, in a view that came later only.
    if not (totals.tombstones <= dead if len(cache.indices) > 1 else totals.tombstones == dead):
        yield f"tombstones must be {dead}, those of the table (found: {totals.tombstones})"
    # A row that could be decoded for one view and not for another is a tombstone, and labelled in the one.
    least, most = alive * extent.views, extent.rows * extent.views - totals.tombstones
    if not _has_right_answers(cache, addition):
        least = most = 0
    if not least <= totals.labelled <= most:
        yield f"labelled must be {least}..{most}, the views of rows with a label (found: {totals.labelled})"
    if not 0 <= totals.correct <= totals.labelled:
        yield f"correct must be 0..{totals.labelled}, of those with a label (found: {totals.correct})"
    if set(totals.fidelity) != set(addition.fields):
        yield f"fidelity must be that of {sorted(addition.fields)} (found: {sorted(totals.fidelity)})"
    for field, found in totals.fidelity.items():
        # Each position of a sequence counts as a row.
        rows = extent.rows * extent.views * math.prod(addition.field_shapes.get(field, ())[:-1])
        if not 0 <= found.get("rows", 0) <= rows:
            yield f"fidelity of {field} must be measured on 0..{rows} rows (found: {found.get('rows')})"


def _has_right_answers(cache: Cache, addition: Addition) -> bool:
    """Whether a view has one label that the row's logits can be compared with."""
    mixes = any(name.startswith("partner.") or ".partner_" in name for name in addition.param_names)
    return cache.labels is not None and _classes(addition) is not None and not mixes
