"""Step 6, manifest: the only authority on what exists.

`manifest.json` says what the cache is and, once sealed, what it holds. While a build runs, one receipt for each
committed shard says what is there; sealing turns the receipts into one table and the manifest into its root.
Neither holds a time or a place, so two builds of one spec end with the same bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Encoding, Part, open_encoding
from teacher_cache.errors import CacheNotFoundError, CorruptionError, FormatError
from teacher_cache.fingerprint import bytes_digest, canonical_json, fingerprint
from teacher_cache.spec import FieldSpec, StoreSpec, Strict, parse
from teacher_cache.storage import FileRecord, Grid, Group, field_path, write_atomic

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
    class_names: tuple[str, ...] | None
    store: StoreSpec
    spec: dict[str, Any]
    versions: dict[str, str]
    samples: TableRef
    receipts: TableRef | None = None
    totals: Totals | None = None

    @property
    def grid(self) -> Grid:
        """How rows are cut."""
        return Grid(self.rows, self.store.shard_rows, self.store.chunk_rows)

    @property
    def encodings(self) -> dict[str, Encoding]:
        """The encoding of each field."""
        return {
            name: open_encoding(field.encoding, self.field_shapes[name], name) for name, field in self.fields.items()
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


@dataclass(frozen=True, eq=False)
class Receipt:
    """The proof that one shard is committed; written last."""

    identity: str
    """Of the cache: a receipt of another cache is refused."""
    view: int
    shard: int
    files: tuple[FileRecord, ...]
    tombstones: tuple[tuple[int, str], ...]
    """(row, reason) of each sample that could not be decoded."""
    content: NDArray[np.uint64]
    """Content digest of each row of the shard, 0 for a tombstone; the same for every view."""
    labelled: int
    correct: int
    """Rows whose largest logit is their label."""
    fidelity: dict[str, dict[str, float]]
    """For each field, sums over this shard's sampled rows."""

    def to_bytes(self) -> bytes:
        """Canonical JSON with its own digest."""
        body = {
            "identity": self.identity,
            "view": self.view,
            "shard": self.shard,
            "files": [vars(record) for record in self.files],
            "tombstones": [list(item) for item in self.tombstones],
            "content": base64.b64encode(self.content.astype("<u8").tobytes()).decode(),
            "labelled": self.labelled,
            "correct": self.correct,
            "fidelity": self.fidelity,
        }
        return _signed(body)

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> Receipt:
        """Reads a receipt and checks its digest; raises `CorruptionError`."""
        body = _checked(data, place)
        body["files"] = tuple(FileRecord(**record) for record in body["files"])
        body["tombstones"] = tuple((row, reason) for row, reason in body["tombstones"])
        body["content"] = np.frombuffer(base64.b64decode(body["content"]), "<u8")
        return cls(**body)


def _signed(body: Mapping[str, Any]) -> bytes:
    return canonical_json({**body, "digest": bytes_digest(canonical_json(body))}) + b"\n"


def _checked(data: bytes, place: str) -> dict[str, Any]:
    hint = "Restore it from a copy, or remove it and build again."
    try:
        body = json.loads(data)
        digest = body.pop("digest")
        again = _signed(body)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CorruptionError(place, "must be JSON with a digest", error, hint) from error
    # The bytes themselves are compared: JSON that parses to the same values is still not what was written.
    if data != again or digest != bytes_digest(canonical_json(body)):
        raise CorruptionError(place, "does not have the digest that it states", digest, hint)
    return dict(body)


def receipt_path(view: int, shard: int) -> str:
    """Where the receipt of a shard is, below the root."""
    return f"receipts/v{view:04d}-s{shard:06d}.json"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replaces the manifest at once."""
    write_atomic(root, MANIFEST, _signed(manifest.model_dump(mode="json")))


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
    body = _checked(data, MANIFEST)
    if body.get("format_version") != FORMAT_VERSION:
        hint = "Use the version of teacher-cache that wrote it, or build again."
        raise FormatError(str(root), f"must be of format {FORMAT_VERSION}", body.get("format_version"), hint)
    return parse(Manifest, body, MANIFEST)


def read_receipts(root: Path, manifest: Manifest) -> list[Receipt]:
    """All receipts of an unsealed cache, in the order of (view, shard); each checked.

    Raises:
        CorruptionError: a receipt is altered, stands in another's place, or belongs to another cache.
    """
    found = []
    for path in sorted((root / "receipts").glob("*.json")):
        place = f"receipts/{path.name}"
        receipt = Receipt.from_bytes(path.read_bytes(), place)
        hint = "Remove it and build again: the shard will be computed again."
        if receipt.identity != manifest.identity.whole:
            raise CorruptionError(place, "belongs to another cache", receipt.identity, hint)
        if receipt_path(receipt.view, receipt.shard) != place:
            raise CorruptionError(place, "stands in another receipt's place", (receipt.view, receipt.shard), hint)
        found.append(receipt)
    return found
