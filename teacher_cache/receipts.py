"""Receipts: the proof that a shard is committed, one file for each while a build runs.

A receipt is written after every file that it names. Sealing turns all of them into one table.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import fidelity
from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.manifest import Manifest, Totals
from teacher_cache.signed import checked, signed
from teacher_cache.storage import FileRecord
from teacher_cache.storage.files import UNREADABLE

ANOTHERS = "belongs to another cache"
REMOVE = "Run `teacher-cache repair PATH`, or remove it; a build then computes the shard again."


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
        return signed(body)

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> Receipt:
        """Reads a receipt and checks its digest; raises `CorruptionError`."""
        body = checked(data, place)
        try:
            body["files"] = tuple(FileRecord(**record) for record in body["files"])
            body["tombstones"] = tuple((row, reason) for row, reason in body["tombstones"])
            body["content"] = np.frombuffer(base64.b64decode(body["content"]), "<u8")
            return cls(**body)
        except (KeyError, TypeError, ValueError) as error:
            # The digest is right: a sound document that is none, such as the manifest in a receipt's place.
            raise CorruptionError(place, "must be a receipt", repr(error), REMOVE) from error


def receipt_path(view: int, shard: int) -> str:
    """Where the receipt of a shard is, below the root."""
    return f"receipts/{shard_claim(view, shard)}.json"


def shard_claim(view: int, shard: int) -> str:
    """The name of a shard's receipt, under which a builder claims the shard."""
    return f"v{view:04d}-s{shard:06d}"


def read_receipts(root: Path, manifest: Manifest) -> list[Receipt]:
    """All receipts of an unsealed cache, in the order of (view, shard); each checked.

    Raises:
        CorruptionError: a receipt is altered, stands in another's place, or belongs to another cache.
    """
    return [read_receipt(root, f"receipts/{name}", manifest) for name in receipt_names(root)]


def receipt_names(root: Path) -> list[str]:
    """The names below `receipts/` that are a receipt's, in the order of (view, shard)."""
    return sorted(path.name for path in (root / "receipts").glob("*.json"))


def read_receipt(root: Path, place: str, manifest: Manifest) -> Receipt:
    """One receipt, checked.

    Raises:
        CorruptionError: it is altered, stands in another's place, or belongs to another cache.
        CacheError: it cannot be read.
    """
    try:
        data = (root / place).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CorruptionError(place, "must be a file", error, REMOVE) from error
    except OSError as error:
        raise CacheError(place, "cannot be read", error, UNREADABLE) from error
    receipt = Receipt.from_bytes(data, place)
    if receipt.identity != manifest.identity.whole:
        raise CorruptionError(place, ANOTHERS, receipt.identity, REMOVE)
    if receipt_path(receipt.view, receipt.shard) != place:
        raise CorruptionError(place, "stands in another receipt's place", (receipt.view, receipt.shard), REMOVE)
    _require_fit(receipt, place, manifest)
    return receipt


def _require_fit(receipt: Receipt, place: str, manifest: Manifest) -> None:
    """Refuses what no shard of this plan can have met: it would end up in other rows, or nowhere."""
    grid = manifest.grid
    if receipt.view >= manifest.views or receipt.shard >= grid.shards:
        rule = f"must be of views 0..{manifest.views - 1} and shards 0..{grid.shards - 1}"
        raise CorruptionError(place, rule, (receipt.view, receipt.shard), REMOVE)
    start, stop = grid.span(receipt.shard)
    if len(receipt.content) != stop - start:
        raise CorruptionError(place, f"must hold {stop - start} content digests", len(receipt.content), REMOVE)
    strange = [row for row, _ in receipt.tombstones if not start <= row < stop]
    if strange:
        raise CorruptionError(place, f"must have tombstones in rows {start}..{stop - 1}", strange[0], REMOVE)
    alive = stop - start - len(receipt.tombstones)
    if not 0 <= receipt.correct <= receipt.labelled <= alive:
        rule = f"must count 0 ≤ correct ≤ labelled ≤ {alive}, the rows that are alive"
        raise CorruptionError(place, rule, (receipt.correct, receipt.labelled), REMOVE)
    if len({record.path for record in receipt.files}) != len(receipt.files):
        raise CorruptionError(place, "must name each file once", len(receipt.files), REMOVE)


def add_up(manifest: Manifest, receipts: Iterable[Receipt]) -> Totals:
    """What the shards of these receipts met, together."""
    receipts = list(receipts)
    return Totals(
        bytes=sum(record.size for receipt in receipts for record in receipt.files),
        tombstones=len({row for receipt in receipts for row, _ in receipt.tombstones}),
        labelled=sum(receipt.labelled for receipt in receipts),
        correct=sum(receipt.correct for receipt in receipts),
        fidelity={
            field: fidelity.total(r.fidelity[field] for r in receipts if field in r.fidelity)
            for field in manifest.fields
        },
    )
