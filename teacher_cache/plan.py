"""From a spec to a manifest: opens everything once, probes the teacher, and names what will decide the bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.addition import Addition, Extent, Identity, TableRef
from teacher_cache.choice import Chosen, choose, with_defaults
from teacher_cache.encodings import open_encoding
from teacher_cache.errors import SourceError, SpecError
from teacher_cache.extents import missing
from teacher_cache.fingerprint import fingerprint, key_digests
from teacher_cache.loader import ViewLoader
from teacher_cache.manifest import Manifest, library_versions
from teacher_cache.probe import ask, check_classes, check_labels, halve_until_it_fits, out_of_memory
from teacher_cache.sources import BrokenSample, Source, open_source, source_fingerprints
from teacher_cache.spec import BuildSpec, ComputeSpec, EncodingSpec, FidelitySpec, FieldSpec, SampledK, StoreSpec, TopK
from teacher_cache.storage.ragged import require_room
from teacher_cache.teachers import Teacher, load_teacher, resolve_device
from teacher_cache.views import Recipe, Views, open_recipe


@dataclass(frozen=True)
class Opened:
    """A spec with its parts opened: what both the planner and a worker need."""

    spec: BuildSpec
    source: Source
    digests: NDArray[np.uint64]
    recipe: Recipe
    teacher: Teacher
    loader: ViewLoader

    def view_of(self, rows: list[int], view: int) -> Views:
        """Decodes and renders some rows; raises `BrokenSample`."""
        decoded = self.loader.decode(rows)
        if decoded.broken:
            raise BrokenSample(decoded.broken[0][1])
        return self.loader.views(decoded, view)


def load_here(spec: BuildSpec, recipe: Recipe) -> Teacher:
    """The teacher of a configuration, in this process.

    Raises:
        TeacherError: it cannot be loaded.
    """
    return load_teacher(spec.teacher, recipe.normalize, resolve_device(spec.compute.device))


def open_parts(spec: BuildSpec, load: Callable[[BuildSpec, Recipe], Teacher] = load_here) -> Opened:
    """Opens source, recipe and teacher.

    Args:
        spec: names them.
        load: gives the teacher; called when the others are open.

    Raises:
        RequestError: one of them cannot be opened, or two keys of the source share a digest.
    """
    source = open_source(spec.source)
    digests = key_digests(source.keys)
    ordered = np.sort(digests)
    if (ordered[1:] == ordered[:-1]).any():
        hint = "Rename one of the two samples; this happens about once in 2⁶⁴ pairs."
        raise SourceError("source", "gives two keys one 64-bit digest", "collision", hint)
    recipe = open_recipe(spec.views)
    teacher = load(spec, recipe)
    loader = ViewLoader(recipe, digests, source.item)
    return Opened(spec, source, digests, recipe, teacher, loader)


def worker_count(compute: ComputeSpec) -> int:
    """One worker for each GPU; on CPUs, one for each `threads` cores."""
    if compute.workers is not None:
        return compute.workers
    if resolve_device(compute.device) == "cuda":
        return torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // compute.threads)


def first_views(opened: Opened, count: int = 1) -> tuple[list[int], Views]:
    """View 0 of the first `count` samples that can be decoded (fewer where the source is smaller)."""
    rows: list[int] = []
    reason = ""
    for row in range(len(opened.source)):
        try:
            opened.source.item(row)
        except BrokenSample as broken:
            reason = reason or str(broken)
            continue
        rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        rule = f"has no sample that can be decoded; the first: {reason}"
        raise SourceError("source", rule, f"{len(opened.source)} samples", "Check the files, or convert them.")
    return rows, opened.view_of(rows, 0)


@dataclass(frozen=True)
class Draft:
    """What an addition that has not begun will write."""

    addition: Addition
    files: Mapping[str, bytes]
    """Tables that it names already, by path."""


@dataclass(frozen=True)
class Prospect:
    """A teacher and its fields as they will be kept: what all additions that come of one configuration share."""

    opened: Opened
    """With the micro-batch that fits."""
    view_shape: tuple[int, int, int]
    shapes: dict[str, tuple[int, ...]]
    chosen: Chosen
    """Its constants are those of fields that are chosen anew."""
    asked: int
    """The micro-batch that the configuration asked for."""
    source: Mapping[int, str]
    """Fingerprints of the source's rows up to some of them."""
    found: Manifest | None

    @property
    def fields(self) -> tuple[str, ...]:
        """Their names, sorted."""
        return tuple(sorted(self.chosen.fields))

    def by_teacher(self) -> list[Addition]:
        """What this teacher has answered before."""
        name = self.opened.spec.teacher.name
        return [item for item in self.found.additions if item.teacher == name] if self.found else []


def named_source(source: Source, found: Manifest | None) -> dict[int, str]:
    """Fingerprints of the source's rows up to the end of each segment of a cache, and of all of them."""
    ends = () if found is None else found.stops
    stops = sorted({*(stop for stop in ends if stop <= len(source)), len(source)})
    return dict(zip(stops, source_fingerprints(source, stops), strict=True))


def prospect(opened: Opened, named: Mapping[int, str], found: Manifest | None = None) -> Prospect:
    """Looks at the teacher's answers to one micro-batch, and decides what was left open.

    Args:
        opened: the parts of the build.
        named: the source's fingerprints, from `named_source`.
        found: a manifest that is there already; what it chose from the same wishes is not chosen again.

    Raises:
        TeacherError: its logits do not fit the class names, or its head is not linear where it must be.
        SpecError: no encoding keeps the bound that was asked for.
    """
    _, views = first_views(opened)
    _, channels, height, width = views.pixels_BCHW.shape
    shape = (channels, height, width)
    asked = opened.spec.teacher.micro_batch
    name = opened.spec.teacher.name
    before = [item for item in found.additions if item.teacher == name] if found else []
    opened = fitted(opened, shape, before)
    shapes = probe(opened, shape)
    wanted = with_defaults(opened.spec.teacher.fields, shapes)
    teacher = opened.spec.teacher.model_copy(update={"fields": wanted})
    opened = replace(opened, spec=opened.spec.model_copy(update={"teacher": teacher}))
    chosen = _chosen(opened, wanted, shapes, before)
    _check_fields(opened.spec, chosen.fields, shapes)
    return Prospect(opened, shape, shapes, chosen, asked, named, found)


def whole_extent(seen: Prospect) -> Extent:
    """All rows, views and fields that a configuration asks for."""
    spec = seen.opened.spec
    (extent,) = missing(None, len(seen.opened.source), spec.views.count, spec.teacher.name, seen.fields)
    return extent


def draft(seen: Prospect, extent: Extent, constants: TableRef | None = None, files: Mapping[str, bytes] = {}) -> Draft:
    """An addition that covers a block of what a configuration asks for.

    Args:
        seen: the teacher and its fields.
        extent: the block.
        constants: the table of what rows of its fields share.
        files: that table's bytes, by path, where it has to be written.
    """
    opened, recipe, spec = seen.opened, seen.opened.recipe, seen.opened.spec
    # Sorted, as JSON will have them: a build that goes on reads them from the manifest.
    fields = {name: seen.chosen.fields[name] for name in extent.fields}
    shapes = {name: seen.shapes[name] for name in extent.fields}
    teacher = spec.teacher.model_copy(update={"fields": {name: spec.teacher.fields[name] for name in extent.fields}})
    places = {"workers", "attempts", "views_per_decode", "on_oom"}
    described = spec.model_copy(update={"teacher": teacher})
    addition = Addition(
        state="building",
        identity=_identity(seen, extent, fields, shapes, constants),
        extent=extent,
        view_shape=seen.view_shape,
        param_names=recipe.param_names,
        promise=recipe.promise,
        recipe=recipe.describe(),
        fields=fields,
        field_shapes=shapes,
        micro_batch_asked=seen.asked if spec.teacher.micro_batch != seen.asked else None,
        calibration=seen.chosen.calibration if "logits" in fields else None,
        constants=constants,
        class_names=opened.source.class_names,
        store=spec.store,
        spec=described.model_dump(mode="json", exclude={"cache": True, "compute": places}),
        versions=library_versions(),
    )
    for group in addition.groups(extent.first_view):
        require_room(group, addition.grid)
    return Draft(addition, files)


def _chosen(
    opened: Opened, wanted: dict[str, FieldSpec], shapes: dict[str, tuple[int, ...]], before: list[Addition]
) -> Chosen:
    """The fields as they will be kept: as a cache has chosen them from the same wishes, or chosen anew."""
    known: dict[str, FieldSpec] = {}
    calibration = None
    asked = {name: field.model_dump(mode="json") for name, field in wanted.items()}
    for item in before:
        wishes = item.spec["teacher"]["fields"]
        alike = {name for name in item.fields if name in asked and wishes[name] == asked[name]}
        known |= {name: item.fields[name] for name in alike}
        calibration = item.calibration if "logits" in alike else calibration
    fresh = {name: field for name, field in wanted.items() if name not in known}
    size = opened.spec.teacher.micro_batch
    try:
        # Looking at answers again could cost a paid teacher's.
        chosen = choose(fresh, shapes, opened.teacher, opened.loader, opened.digests, size) if fresh else Chosen({})
    except torch.OutOfMemoryError as error:
        raise out_of_memory(size, error) from error
    return Chosen({**known, **chosen.fields}, calibration or chosen.calibration, chosen.constants)


def _check_fields(spec: BuildSpec, fields: dict[str, FieldSpec], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, field in fields.items():
        open_encoding(field.fixed, shapes[name], name)
        if spec.fidelity.max_kl is not None and not _has_kl(field.fixed):
            hint = "Leave it out: classes without weight make KL infinite; the total variation is measured."
            raise SpecError("fidelity.max_kl", f"has no meaning for {field.fixed.kind}", spec.fidelity.max_kl, hint)


def _has_kl(encoding: EncodingSpec) -> bool:
    """Whether every class keeps some weight."""
    tailless = isinstance(encoding, TopK) and encoding.tail == "renormalise"
    return not (tailless or isinstance(encoding, SampledK))


def probe(opened: Opened, view_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Runs one empty micro-batch through the teacher: the shape of one row of each field."""
    spec = opened.spec.teacher
    check_labels(spec, opened.source, opened.recipe)
    shapes = ask(opened.teacher, spec, spec.micro_batch, view_shape)
    check_classes(spec, opened.source, shapes)
    return shapes


def fitted(opened: Opened, view_shape: tuple[int, ...], before: list[Addition]) -> Opened:
    """The same parts with the micro-batch that is used: what the spec says, or less where `compute.on_oom` allows."""
    spec = opened.spec.teacher
    size = spec.micro_batch
    if before and before[-1].micro_batch_asked == size:
        size = before[-1].spec["teacher"]["micro_batch"]
    elif not before and opened.spec.compute.on_oom == "halve":
        size = halve_until_it_fits(opened.teacher, spec, view_shape)
    teacher = spec.model_copy(update={"micro_batch": size})
    return replace(opened, spec=opened.spec.model_copy(update={"teacher": teacher}))


def encoding_fingerprint(
    fields: Mapping[str, FieldSpec], shapes: Mapping[str, tuple[int, ...]], constants: TableRef | None
) -> str:
    """Names how some fields are kept."""
    described = {name: field.model_dump(mode="json") for name, field in fields.items()}
    kept: dict[str, Any] = {"fields": described, "shapes": {name: list(shape) for name, shape in shapes.items()}}
    if constants is not None:
        kept["constants"] = constants.digest
    return fingerprint("encoding", 1, kept)


def numerics_fingerprint(opened: Opened, fidelity: FidelitySpec) -> str:
    """Names what can change a last bit, and what is measured of it."""
    spec = opened.spec
    return fingerprint(
        "numerics",
        1,
        {
            "micro_batch": spec.teacher.micro_batch,
            "threads": opened.teacher.threads or spec.compute.threads,
            "device": opened.teacher.device,
            # What is measured is stored; what is then demanded of it decides no byte.
            "fidelity": fidelity.model_dump(mode="json", exclude={"max_kl"}),
        },
    )


def store_fingerprint(store: StoreSpec) -> str:
    """Names how rows lie on disk."""
    return fingerprint("store", 1, store.model_dump(mode="json"))


def _identity(
    seen: Prospect,
    extent: Extent,
    fields: Mapping[str, FieldSpec],
    shapes: Mapping[str, tuple[int, ...]],
    constants: TableRef | None,
) -> Identity:
    opened, spec = seen.opened, seen.opened.spec
    return Identity(
        source=seen.source[extent.stop_row],
        recipe=opened.recipe.fingerprint,
        view=opened.recipe.view_fingerprint,
        teacher=opened.teacher.fingerprint,
        encoding=encoding_fingerprint(fields, shapes, constants),
        store=store_fingerprint(spec.store),
        extent=extent.fingerprint,
        numerics=numerics_fingerprint(opened, spec.fidelity),
    )
