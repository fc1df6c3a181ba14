"""From a spec to a manifest: opens everything once, probes the teacher, and names what will decide the bytes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache import samples as sample_table
from teacher_cache.calibrate import calibrate
from teacher_cache.encodings import open_encoding
from teacher_cache.encodings.calibration import Calibration
from teacher_cache.errors import MismatchError, SourceError, SpecError, TeacherError
from teacher_cache.fingerprint import fingerprint, key_digests
from teacher_cache.loader import ViewLoader
from teacher_cache.manifest import (
    MANIFEST,
    Identity,
    Manifest,
    TableRef,
    library_versions,
    read_manifest,
    write_manifest,
)
from teacher_cache.proof import reference_count, write_references
from teacher_cache.sources import BrokenSample, Source, open_source, source_fingerprint
from teacher_cache.spec import Auto, BuildSpec, ComputeSpec, FieldSpec
from teacher_cache.storage import open_store, remove_temporary, write_atomic
from teacher_cache.storage.files import is_temporary
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


def draft(opened: Opened, found: Manifest | None = None) -> Manifest:
    """The manifest of a build that has not begun, from one probe of the teacher.

    Args:
        opened: the parts of the build.
        found: a manifest that is there already; what it chose from the same wishes is not chosen again.

    Raises:
        TeacherError: its logits do not fit the class names.
        SpecError: no encoding keeps the bound that was asked for.
    """
    spec, source, recipe = opened.spec, opened.source, opened.recipe
    _, views = first_views(opened)
    _, channels, height, width = views.pixels_BCHW.shape
    shape = (channels, height, width)
    shapes = probe(opened, shape)
    places = {"workers", "attempts", "views_per_decode"}
    described = spec.model_dump(mode="json", exclude={"cache": True, "compute": places})
    calibration = _calibration(opened, found)
    fields = {
        name: field.model_copy(update={"encoding": calibration.chosen}) if calibration and name == "logits" else field
        for name, field in spec.teacher.fields.items()
    }
    for name, field in fields.items():
        open_encoding(field.fixed, shapes[name], name)
        if field.fixed.kind == "sampled_k" and spec.fidelity.max_kl is not None:
            hint = "Leave it out: one draw's KL is infinite; its total variation is measured."
            raise SpecError("fidelity.max_kl", "has no meaning for sampled_k", spec.fidelity.max_kl, hint)
    return Manifest(
        state="building",
        identity=_identity(opened, fields, shapes),
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
        calibration=calibration,
        class_names=source.class_names,
        store=spec.store,
        spec=described,
        versions=library_versions(),
        samples=TableRef(path="", digest=""),
    )


def _calibration(opened: Opened, found: Manifest | None) -> Calibration | None:
    """The choice of an encoding where it was left open: the one that a cache has made, or a new one."""
    teacher = opened.spec.teacher
    wanted = teacher.fields["logits"].encoding if "logits" in teacher.fields else None
    if not isinstance(wanted, Auto):
        return None
    if found is not None and found.calibration is not None:
        asked = found.spec["teacher"]["fields"]["logits"]["encoding"]
        if asked == wanted.model_dump(mode="json"):
            return found.calibration
    return calibrate(wanted, opened.teacher, opened.loader, opened.digests, teacher.micro_batch)


def probe(opened: Opened, view_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Runs one empty micro-batch through the teacher: the shape of one row of each field."""
    spec = opened.spec.teacher
    batch = torch.zeros((spec.micro_batch, *view_shape), dtype=torch.uint8)
    try:
        answer = opened.teacher(batch)
    except (RuntimeError, ValueError) as error:
        hint = "Check the recipe's size, the channels and the weights."
        raise TeacherError("teacher.model", f"fails on a view {view_shape}: {error}", spec.model, hint) from error
    shapes = {name: tuple(value.shape[1:]) for name, value in answer.items()}
    _check_classes(opened, shapes)
    return shapes


def _check_classes(opened: Opened, shapes: dict[str, tuple[int, ...]]) -> None:
    names, own = opened.source.class_names, opened.spec.teacher.class_names
    logits = shapes.get("logits")
    if logits is not None and len(logits) != 1:
        raise TeacherError("teacher.fields.logits", "must be [batch, classes]", logits, "Use another model.")
    if logits is not None and names is not None and logits[0] != len(names):
        hint = "Use weights for these classes, or give the source the teacher's class names."
        raise TeacherError("teacher.model", f"must answer for the {len(names)} class names", logits[0], hint)
    if logits is not None and own is not None and logits[0] != len(own):
        hint = "Correct the list, or use weights for these classes."
        raise TeacherError("teacher.class_names", f"must have one name for each of {logits[0]} outputs", own, hint)
    labels = opened.source.labels
    if logits is not None and labels is not None and int(labels.max()) >= logits[0]:
        hint = "Use weights for these classes."
        raise TeacherError("teacher.model", f"must answer for the labels 0..{int(labels.max())}", logits[0], hint)
    if own is not None and names is not None and own != names:
        differs = next((i for i, pair in enumerate(zip(own, names, strict=False)) if pair[0] != pair[1]), len(names))
        hint = f"They differ first at class {differs}; the teacher's head and the labels must have one order."
        raise TeacherError("teacher.class_names", "must equal the source's class names, in order", own, hint)


def _identity(opened: Opened, chosen: dict[str, FieldSpec], shapes: dict[str, tuple[int, ...]]) -> Identity:
    spec = opened.spec
    fields = {name: field.model_dump(mode="json") for name, field in chosen.items()}
    return Identity(
        source=source_fingerprint(opened.source),
        recipe=fingerprint("views", 1, {"recipe": opened.recipe.fingerprint, "count": spec.views.count}),
        view=opened.recipe.view_fingerprint,
        teacher=opened.teacher.fingerprint,
        encoding=fingerprint("encoding", 1, {"fields": fields, "shapes": {k: list(v) for k, v in shapes.items()}}),
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


_BEGINNING = re.compile(r"(samples|references)-[0-9a-f]{12}\.parquet|data/(.*/)?zarr\.json")
"""What `begin` writes before there is a manifest."""


def _require_fresh(root: Path) -> None:
    """Nothing but what a `begin` that was killed may have left is tolerated, and that is removed.

    Raises:
        SpecError: the folder holds something else: it is not a cache, and must not become half of one.
    """
    files = [path for path in root.rglob("*") if path.is_file()] if root.is_dir() else []
    for path in files:
        name = path.relative_to(root).as_posix()
        if not (_BEGINNING.fullmatch(name) or is_temporary(path)):
            hint = "Name a new or an empty folder."
            raise SpecError("cache", f"is a folder without {MANIFEST} that holds other files", path, hint)
    for path in files:
        path.unlink()


def begin(root: Path, opened: Opened) -> Manifest:
    """Begins a cache, or goes on with the one that is there if it is the same.

    Raises:
        MismatchError: a cache is there that was begun with another source, teacher, recipe or encoding.
        BuildError: the folder cannot be written.
    """
    found = read_manifest(root) if (root / MANIFEST).exists() else None
    planned = draft(opened, found)
    if found is not None:
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
        remove_temporary(root)
        return found
    _require_fresh(root)
    rows, views = first_views(opened, reference_count(planned.view_shape))
    _require_repeatable(opened, rows, views)
    # Over several views, so that they go through as many of a random recipe's operations as may be.
    numbers = [place % planned.views for place in range(len(rows))]
    kept = [opened.view_of([row], number).pixels_BCHW[0] for row, number in zip(rows, numbers, strict=True)]
    table = sample_table.write_samples(root, sample_table.of_source(opened.source))
    references = write_references(root, rows, numbers, kept)
    manifest = planned.model_copy(update={"samples": table, "references": references})
    store = open_store(manifest.store.kind, manifest.grid)
    groups = [group for view in range(manifest.views) for group in manifest.groups(view)]
    for path, data in store.metadata(groups).items():
        write_atomic(root, path, data)
    write_manifest(root, manifest)
    return manifest
