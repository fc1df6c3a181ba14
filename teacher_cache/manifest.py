"""Step 6, manifest: the only authority on what exists.

`manifest.json` says what the cache is: the stretches of rows that it covers, and the additions that it grew by. While
an addition is built, one receipt for each committed shard says what is there; sealing turns the receipts into tables.
Nothing in it holds a time or a place, so two caches that grew alike have the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch

from teacher_cache.addition import FORMAT_VERSION, Addition, TableRef
from teacher_cache.errors import CacheError, CacheNotFoundError, CorruptionError, FormatError, SpecError
from teacher_cache.fingerprint import fingerprint
from teacher_cache.signed import checked, signed
from teacher_cache.spec import StoreSpec, Strict, parse
from teacher_cache.storage.root import Root

MANIFEST = "manifest.json"
_SHARED = ("view_shape", "param_names", "promise", "recipe", "class_names", "store")
"""What all additions of a cache must agree about, and in their identity recipe, view and store."""


class Segment(Strict):
    """A stretch of rows that came together: the source as it was first, or what was added at its end."""

    rows: int
    source: str
    """Fingerprint of the source's rows up to this segment's last."""
    samples: tuple[TableRef, ...]
    """Of `samples.PART_ROWS` rows each."""
    content: tuple[TableRef, ...] = ()
    """Digests of the stored bytes, cut like `samples`; empty until the segment's first addition is sealed."""


class Manifest(Strict):
    """What a cache is."""

    format_version: int = FORMAT_VERSION
    segments: tuple[Segment, ...]
    additions: tuple[Addition, ...]
    """In the order in which they were begun; all but the last are sealed."""
    tombstones: TableRef | None = None
    references: TableRef | None = None

    @property
    def state(self) -> Literal["building", "sealed"]:
        """Whether an addition is being built."""
        return self.additions[-1].state

    @property
    def open_addition(self) -> Addition | None:
        """The one that is being built."""
        return self.additions[-1] if self.state == "building" else None

    @property
    def whole(self) -> str:
        """One fingerprint over the identities of all additions."""
        return fingerprint("cache", FORMAT_VERSION, {"additions": [item.identity.whole for item in self.additions]})

    @property
    def first(self) -> Addition:
        """The addition that began the cache: what it says of views and store holds for all."""
        return self.additions[0]

    @property
    def rows(self) -> int:
        """How many samples are planned."""
        return sum(segment.rows for segment in self.segments)

    @property
    def views(self) -> int:
        """How many views of the recipe are planned of some rows."""
        return max(item.view_numbers.stop for item in self.additions)

    @property
    def stops(self) -> tuple[int, ...]:
        """The row after the last of each segment."""
        return tuple(np.cumsum([segment.rows for segment in self.segments]).tolist())

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First row of each segment and the row after its last."""
        return tuple((stop - segment.rows, stop) for segment, stop in zip(self.segments, self.stops, strict=True))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In the order of the class numbers."""
        return self.first.class_names

    @property
    def store(self) -> StoreSpec:
        """How rows lie on disk."""
        return self.first.store

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the uint8 views."""
        return self.first.view_shape

    @property
    def param_names(self) -> tuple[str, ...]:
        """Columns of the views' parameters."""
        return self.first.param_names

    @property
    def teachers(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(dict.fromkeys(item.teacher for item in self.additions))

    @property
    def tables(self) -> tuple[TableRef, ...]:
        """All that it names."""
        return tuple(self._tables())

    def _tables(self) -> Iterator[TableRef]:
        for segment in self.segments:
            yield from (*segment.samples, *segment.content)
        for addition in self.additions:
            yield from addition.receipts
            if addition.constants is not None:
                yield addition.constants
        yield from (table for table in (self.tombstones, self.references) if table is not None)

    def sealed(self) -> Manifest | None:
        """The cache as it was before the addition that is being built; None where that is its first."""
        if self.state == "sealed":
            return self
        kept = self.additions[:-1]
        rows = max((item.extent.stop_row for item in kept), default=0)
        segments = tuple(s for s, (_, stop) in zip(self.segments, self.spans, strict=True) if stop <= rows)
        return self.model_copy(update={"additions": kept, "segments": segments}) if kept else None

    def with_last(self, **changes: Any) -> Manifest:
        """The same with something changed in the last addition."""
        return self.model_copy(
            update={"additions": (*self.additions[:-1], self.additions[-1].model_copy(update=changes))}
        )


def library_versions() -> dict[str, str]:
    """The libraries that views and answers may depend on."""
    # Here, and not above: it takes as long to load as torch, and only builds and disagreements ask.
    import torchvision

    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}


def write_manifest(root: Root, manifest: Manifest) -> None:
    """Replaces the manifest at once."""
    root.write(MANIFEST, signed(manifest.model_dump(mode="json")))


def read_manifest(root: Root) -> Manifest:
    """Reads and checks the manifest.

    Raises:
        CacheNotFoundError: there is none.
        FormatError: another version of the format wrote it.
        CorruptionError: it is not what was written.
    """
    try:
        data = root.read(MANIFEST)
    except (OSError, CacheError) as error:
        hint = "Check the path, or build the cache: teacher-cache build CONFIG."
        cause = error.__cause__ if isinstance(error, CacheError) else error
        raise CacheNotFoundError(root.url, "must be a place with a cache in it", cause, hint) from cause
    body = checked(data, MANIFEST)
    if body.get("format_version") != FORMAT_VERSION:
        hint = "Use the version of teacher-cache that wrote it, or build again."
        raise FormatError(root.url, f"must be of format {FORMAT_VERSION}", body.get("format_version"), hint)
    try:
        manifest = parse(Manifest, body, MANIFEST)
        _require_whole(manifest)
    except (SpecError, ValueError, KeyError, IndexError) as error:
        # The digest is right: someone has edited it, and signed it again.
        hint = "Restore it from a copy."
        raise CorruptionError(MANIFEST, "must be a manifest whose parts fit each other", error, hint) from error
    return manifest


def _require_whole(manifest: Manifest) -> None:
    """Refuses what a reader could not even open.

    Raises:
        ValueError: naming the parts that do not fit; `SpecError` where an encoding does not fit its field.
    """
    if not manifest.additions or not manifest.segments:
        raise ValueError("additions and segments must not be empty")
    if min(segment.rows for segment in manifest.segments) < 1:
        raise ValueError(f"segments must have rows, found {[segment.rows for segment in manifest.segments]}")
    spans = set(manifest.spans)
    for number, addition in enumerate(manifest.additions):
        if (addition.extent.first_row, addition.extent.stop_row) not in spans:
            raise ValueError(f"additions must cover a segment each, found rows {addition.extent} in {sorted(spans)}")
        if addition.state == "building" and number < len(manifest.additions) - 1:
            raise ValueError("all additions but the last must be sealed")
        for name in _SHARED:
            if getattr(addition, name) != getattr(manifest.first, name):
                raise ValueError(f"additions must agree about {name}")
        _require_addition(addition)


def _require_addition(addition: Addition) -> None:
    extent = addition.extent
    sizes = (extent.rows, extent.views, *addition.view_shape)
    if min(sizes) < 1 or extent.first_view < 0:
        raise ValueError(f"rows, views and view_shape must be at least 1, found {sizes}")
    if set(addition.fields) != set(addition.field_shapes) or set(addition.fields) != set(extent.fields):
        raise ValueError("fields, field_shapes and the extent's fields must name the same")
    undecided = [name for name, field in addition.fields.items() if field.encoding.kind == "auto"]
    if undecided:
        raise ValueError(f"fields must have encodings that are chosen, found auto for {undecided}")
    sealed = addition.state == "sealed"
    if len(addition.receipts) != (extent.views if sealed else 0) or sealed != (addition.totals is not None):
        raise ValueError(
            f"an addition that is {addition.state} must {'' if sealed else 'not '}have receipts and totals"
        )
    for group in addition.groups(extent.first_view):
        if {"", ".", ".."} & set(group.path.split("/")):
            raise ValueError(f"teacher and fields must not lead out of their folders, found {group.path}")
