"""Step 6, manifest: the only authority on what exists.

`manifest.json` says what the cache is and, once sealed, what it holds. While a build runs, one receipt for each
committed shard says what is there; sealing turns the receipts into one table and the manifest into its root.
Neither holds a time or a place, so two builds of one spec end with the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision

from teacher_cache.encodings import Encoding, Part, Shared, open_encoding
from teacher_cache.encodings.calibration import Calibration
from teacher_cache.errors import CacheNotFoundError, CorruptionError, FormatError, SpecError
from teacher_cache.fingerprint import fingerprint
from teacher_cache.signed import checked, signed
from teacher_cache.spec import FieldSpec, StoreSpec, Strict, parse
from teacher_cache.storage import Grid, Group, field_path, write_atomic

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class Identity(Strict):
    """Fingerprints of everything that decides a byte of the cache."""

    source: str
    recipe: str
    view: str
    teacher: str
    encoding: str
    store: str
    numerics: str

    @property
    def whole(self) -> str:
        """One fingerprint over all of them and the format's version: every receipt carries it."""
        return fingerprint("cache", FORMAT_VERSION, self.model_dump())


class TableRef(Strict):
    """A table beside the manifest, by name and digest."""

    path: str
    digest: str


class Totals(Strict):
    """What the whole build met, added up from the receipts when sealing."""

    bytes: int
    tombstones: int
    labelled: int
    correct: int
    fidelity: dict[str, dict[str, float]]


class Manifest(Strict):
    """What a cache is. Derived things (groups, encodings, grid) are properties."""

    format_version: int = FORMAT_VERSION
    state: Literal["building", "sealed"]
    identity: Identity
    rows: int
    views: int
    view_shape: tuple[int, int, int]
    param_names: tuple[str, ...]
    promise: str
    recipe: Any
    teacher: str
    fields: dict[str, FieldSpec]
    field_shapes: dict[str, tuple[int, ...]]
    micro_batch_asked: int | None = None
    """What the configuration said, where planning had to make `spec.teacher.micro_batch` smaller (`on_oom: halve`)."""
    calibration: Calibration | None = None
    constants: TableRef | None = None
    class_names: tuple[str, ...] | None
    store: StoreSpec
    spec: dict[str, Any]
    versions: dict[str, str]
    samples: TableRef
    references: TableRef | None = None
    receipts: TableRef | None = None
    totals: Totals | None = None

    @property
    def tables(self) -> tuple[TableRef, ...]:
        """All that it names."""
        named = (self.samples, self.receipts, self.references, self.constants)
        return tuple(table for table in named if table is not None)

    @property
    def grid(self) -> Grid:
        """How rows are cut."""
        return Grid(self.rows, self.store.shard_rows, self.store.chunk_rows)

    @cached_property
    def encodings(self) -> dict[str, Encoding]:
        """The encoding of each field, as far as its name and its parts."""
        return self.open_encodings({})

    def open_encodings(self, constants: Mapping[str, Shared]) -> dict[str, Encoding]:
        """The encoding of each field; `constants` are what the rows of a field share, by field."""
        return {
            name: open_encoding(field.fixed, self.field_shapes[name], name, constants.get(name))
            for name, field in self.fields.items()
        }

    def proof_group(self, view: int) -> Group:
        """The pixel digests and resolved parameters of one view."""
        parts = [Part("digest", "uint64", ())]
        if self.param_names:
            parts.append(Part("params", "int32", (len(self.param_names),)))
        return Group(f"views/v{view:04d}", tuple(parts))

    def field_group(self, field: str, view: int) -> Group:
        """The arrays of one field in one view."""
        path = f"teachers/{self.teacher}/{field_path(field)}/v{view:04d}"
        return Group(path, self.encodings[field].parts)

    def groups(self, view: int) -> list[Group]:
        """Everything that one shard of a view writes."""
        return [self.proof_group(view), *(self.field_group(field, view) for field in self.fields)]


def library_versions() -> dict[str, str]:
    """The libraries that views and answers may depend on."""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replaces the manifest at once."""
    write_atomic(root, MANIFEST, signed(manifest.model_dump(mode="json")))


def read_manifest(root: Path) -> Manifest:
    """Reads and checks the manifest.

    Raises:
        CacheNotFoundError: there is none.
        FormatError: another version of the format wrote it.
        CorruptionError: it is not what was written.
    """
    try:
        data = (root / MANIFEST).read_bytes()
    except OSError as error:
        hint = "Check the path, or build the cache: teacher-cache build CONFIG."
        raise CacheNotFoundError(str(root), "must be a folder with a cache in it", error, hint) from error
    body = checked(data, MANIFEST)
    if body.get("format_version") != FORMAT_VERSION:
        hint = "Use the version of teacher-cache that wrote it, or build again."
        raise FormatError(str(root), f"must be of format {FORMAT_VERSION}", body.get("format_version"), hint)
    try:
        manifest = parse(Manifest, body, MANIFEST)
        _require_whole(manifest)
    except (SpecError, ValueError, KeyError) as error:
        # The digest is right: someone has edited it, and signed it again.
        hint = "Restore it from a copy."
        raise CorruptionError(MANIFEST, "must be a manifest whose parts fit each other", error, hint) from error
    return manifest


def _require_whole(manifest: Manifest) -> None:
    """Refuses what a reader could not even open.

    Raises:
        ValueError: naming the parts that do not fit; `SpecError` where an encoding does not fit its field.
    """
    sizes = (manifest.rows, manifest.views, *manifest.view_shape)
    if min(sizes) < 1:
        raise ValueError(f"rows, views and view_shape must be at least 1, found {sizes}")
    if set(manifest.fields) != set(manifest.field_shapes):
        raise ValueError("fields and field_shapes must name the same")
    undecided = [name for name, field in manifest.fields.items() if field.encoding.kind == "auto"]
    if undecided:
        raise ValueError(f"fields must have encodings that are chosen, found auto for {undecided}")
    sealed = manifest.state == "sealed"
    if sealed != (manifest.receipts is not None) or sealed != (manifest.totals is not None):
        raise ValueError(f"a {manifest.state} cache must {'' if sealed else 'not '}have receipts and totals")
    for group in manifest.groups(0):
        if {"", ".", ".."} & set(group.path.split("/")):
            raise ValueError(f"teacher and fields must not lead out of their folders, found {group.path}")
