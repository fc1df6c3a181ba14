"""From a spec to a manifest: opens everything once, probes the teacher, and names what will decide the bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.choice import choose, with_defaults
from teacher_cache.encodings import open_encoding
from teacher_cache.encodings.calibration import Calibration
from teacher_cache.encodings.constants import to_columns
from teacher_cache.errors import SourceError, SpecError
from teacher_cache.fingerprint import fingerprint, key_digests
from teacher_cache.loader import ViewLoader
from teacher_cache.manifest import Identity, Manifest, TableRef, library_versions
from teacher_cache.probe import ask, check_classes, halve_until_it_fits, out_of_memory
from teacher_cache.samples import named_table
from teacher_cache.sources import BrokenSample, Source, open_source, source_fingerprint
from teacher_cache.spec import BuildSpec, ComputeSpec, EncodingSpec, FieldSpec, SampledK, TopK
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


def open_parts(spec: BuildSpec) -> Opened:
    """Opens source, recipe and teacher.

    Raises:
        RequestError: one of them cannot be opened, or two keys of the source share a digest.
    """
    source = open_source(spec.source)
    digests = key_digests(source.keys)
    if len(np.unique(digests)) != len(digests):
        hint = "Rename one of the two samples; this happens about once in 2⁶⁴ pairs."
        raise SourceError("source", "gives two keys one 64-bit digest", "collision", hint)
    recipe = open_recipe(spec.views)
    teacher = load_teacher(spec.teacher, recipe.normalize, resolve_device(spec.compute.device))
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
    """What a build that has not begun will write."""

    manifest: Manifest
    files: Mapping[str, bytes]
    """Tables that the manifest names already, by path."""


def draft(opened: Opened, found: Manifest | None = None) -> Draft:
    """The manifest of a build that has not begun, from one probe of the teacher.

    Args:
        opened: the parts of the build.
        found: a manifest that is there already; what it chose from the same wishes is not chosen again.

    Raises:
        TeacherError: its logits do not fit the class names, or its head is not linear where it must be.
        SpecError: no encoding keeps the bound that was asked for.
    """
    source, recipe = opened.source, opened.recipe
    _, views = first_views(opened)
    _, channels, height, width = views.pixels_BCHW.shape
    shape = (channels, height, width)
    asked = opened.spec.teacher.micro_batch
    opened = fitted(opened, shape, found)
    shapes = probe(opened, shape)
    wanted = with_defaults(opened.spec.teacher.fields, shapes)
    spec = opened.spec.model_copy(update={"teacher": opened.spec.teacher.model_copy(update={"fields": wanted})})
    places = {"workers", "attempts", "views_per_decode", "on_oom"}
    described = spec.model_dump(mode="json", exclude={"cache": True, "compute": places})
    fields, calibration, constants, files = _chosen(opened, wanted, shapes, described, found)
    _check_fields(spec, fields, shapes)
    manifest = Manifest(
        state="building",
        identity=_identity(opened, fields, shapes, constants),
        rows=len(source),
        views=spec.views.count,
        view_shape=shape,
        param_names=recipe.param_names,
        promise=recipe.promise,
        recipe=recipe.describe(),
        teacher=spec.teacher.name,
        # Sorted, as JSON will have them: a build that goes on reads them from the manifest.
        fields=dict(sorted(fields.items())),
        field_shapes=dict(sorted(shapes.items())),
        micro_batch_asked=asked if spec.teacher.micro_batch != asked else None,
        calibration=calibration,
        constants=constants,
        class_names=source.class_names,
        store=spec.store,
        spec=described,
        versions=library_versions(),
        samples=TableRef(path="", digest=""),
    )
    for group in manifest.groups(0):
        require_room(group, manifest.grid)
    return Draft(manifest, files)


def _chosen(
    opened: Opened,
    wanted: dict[str, FieldSpec],
    shapes: dict[str, tuple[int, ...]],
    described: dict[str, Any],
    found: Manifest | None,
) -> tuple[dict[str, FieldSpec], Calibration | None, TableRef | None, dict[str, bytes]]:
    """Fields, calibration and constants: those that a cache has chosen from the same wishes, or new ones."""
    if found is not None and found.spec["teacher"]["fields"] == described["teacher"]["fields"]:
        return found.fields, found.calibration, found.constants, {}
    size = opened.spec.teacher.micro_batch
    try:
        chosen = choose(wanted, shapes, opened.teacher, opened.loader, opened.digests, size)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(size, error) from error
    if not chosen.constants:
        return chosen.fields, chosen.calibration, None, {}
    reference, data = named_table("constants", to_columns(chosen.constants))
    return chosen.fields, chosen.calibration, reference, {reference.path: data}


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
    shapes = ask(opened.teacher, spec, spec.micro_batch, view_shape)
    check_classes(spec, opened.source, shapes)
    return shapes


def fitted(opened: Opened, view_shape: tuple[int, ...], found: Manifest | None) -> Opened:
    """The same parts with the micro-batch that is used: what the spec says, or less where `compute.on_oom` allows."""
    spec = opened.spec.teacher
    size = spec.micro_batch
    if found is not None and found.micro_batch_asked == size:
        size = found.spec["teacher"]["micro_batch"]
    elif found is None and opened.spec.compute.on_oom == "halve":
        size = halve_until_it_fits(opened.teacher, spec, view_shape)
    teacher = spec.model_copy(update={"micro_batch": size})
    return replace(opened, spec=opened.spec.model_copy(update={"teacher": teacher}))


def _identity(
    opened: Opened, chosen: dict[str, FieldSpec], shapes: dict[str, tuple[int, ...]], constants: TableRef | None
) -> Identity:
    spec = opened.spec
    fields = {name: field.model_dump(mode="json") for name, field in chosen.items()}
    kept: dict[str, Any] = {"fields": fields, "shapes": {name: list(shape) for name, shape in shapes.items()}}
    if constants is not None:
        kept["constants"] = constants.digest
    return Identity(
        source=source_fingerprint(opened.source),
        recipe=fingerprint("views", 1, {"recipe": opened.recipe.fingerprint, "count": spec.views.count}),
        view=opened.recipe.view_fingerprint,
        teacher=opened.teacher.fingerprint,
        encoding=fingerprint("encoding", 1, kept),
        store=fingerprint("store", 1, spec.store.model_dump(mode="json")),
        numerics=fingerprint(
            "numerics",
            1,
            {
                "micro_batch": spec.teacher.micro_batch,
                "threads": opened.teacher.threads or spec.compute.threads,
                "device": opened.teacher.device,
                # What is measured is stored; what is then demanded of it decides no byte.
                "fidelity": spec.fidelity.model_dump(mode="json", exclude={"max_kl"}),
            },
        ),
    )
