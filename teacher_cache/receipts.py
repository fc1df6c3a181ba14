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
from teacher_cache.errors import CorruptionError
from teacher_cache.manifest import Manifest, Totals
from teacher_cache.signed import checked, signed
from teacher_cache.storage import FileRecord


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
        body["files"] = tuple(FileRecord(**record) for record in body["files"])
        body["tombstones"] = tuple((row, reason) for row, reason in body["tombstones"])
        body["content"] = np.frombuffer(base64.b64decode(body["content"]), "<u8")
        return cls(**body)


def receipt_path(view: int, shard: int) -> str:
    """Where the receipt of a shard is, below the root."""
    return f"receipts/v{view:04d}-s{shard:06d}.json"


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
