"""Receipts: the proof that a shard is committed, one file for each while a build runs.

A receipt is written after every file that it names. Sealing turns all of them into one table.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.addition import Addition, Totals
from teacher_cache.encodings import fidelity
from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.signed import checked, signed
from teacher_cache.storage import FileRecord
from teacher_cache.storage.files import UNREADABLE
from teacher_cache.storage.root import Root

FOLDER = "receipts"
ANOTHERS = "belongs to another cache"
REMOVE = "Run `teacher-cache repair PATH`, or remove it; a build then computes the shard again."


@dataclass(frozen=True, eq=False)
class Receipt:
    """The proof that one shard is committed; written last."""

    identity: str
    """Of the addition: a receipt of another one is refused."""
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
    return f"{_folder(view)}/s{shard:06d}.json"


def _folder(view: int) -> str:
    return f"{FOLDER}/v{view:04d}"


_NAME = re.compile(FOLDER + r"/v(\d{4,})/s(\d{6,})\.json")


def receipt_of(path: str) -> tuple[int, int] | None:
    """The (view, shard) whose receipt a path is; None where it is none's."""
    found = _NAME.fullmatch(path)
    place = (int(found[1]), int(found[2])) if found else None
    return place if place and receipt_path(*place) == path else None


def shard_claim(view: int, shard: int) -> str:
    """The name under which a builder claims a shard."""
    return f"v{view:04d}-s{shard:06d}"


def receipt_names(root: Root, view: int | None = None) -> list[str]:
    """The files that are receipts, of one view or of all, in the order of (view, shard)."""
    folder = FOLDER if view is None else _folder(view)
    return sorted(name for name in root.names(f"{folder}/") if name.endswith(".json"))


def committed_shards(root: Root, addition: Addition, view: int) -> NDArray[np.bool_]:
    """Which shards of a view have a receipt, [shards]; none of them is read."""
    found = np.zeros(addition.grid.shards, np.bool_)
    for name in root.names(f"{_folder(view)}/"):
        place = receipt_of(name)
        if place is not None and place[1] < len(found):
            found[place[1]] = True
    return found


def read_receipt(root: Root, place: str, addition: Addition) -> Receipt:
    """One receipt, checked.

    Raises:
        CorruptionError: it is altered, stands in another's place, or belongs to another cache.
        CacheError: it cannot be read.
    """
    try:
        data = root.read(place)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CorruptionError(place, "must be a file", error, REMOVE) from error
    except OSError as error:
        raise CacheError(place, "cannot be read", error, UNREADABLE) from error
    receipt = Receipt.from_bytes(data, place)
    if receipt.identity != addition.identity.whole:
        raise CorruptionError(place, ANOTHERS, receipt.identity, REMOVE)
    if receipt_path(receipt.view, receipt.shard) != place:
        raise CorruptionError(place, "stands in another receipt's place", (receipt.view, receipt.shard), REMOVE)
    _require_fit(receipt, place, addition)
    return receipt


def _require_fit(receipt: Receipt, place: str, addition: Addition) -> None:
    """Refuses what no shard of this plan can have met: it would end up in other rows, or nowhere."""
    views, shards = addition.view_numbers, addition.grid.shards
    if receipt.view not in views or not 0 <= receipt.shard < shards:
        rule = f"must be of views {views.start}..{views.stop - 1} and shards 0..{shards - 1}"
        raise CorruptionError(place, rule, (receipt.view, receipt.shard), REMOVE)
    start, stop = addition.span(receipt.shard)
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


class Tally:
    """Adds up what shards met, receipt by receipt."""

    def __init__(self) -> None:
        self._bytes = self._labelled = self._correct = 0
        self._fidelity: dict[str, dict[str, float]] = {}
        self.reasons: dict[int, str] = {}
        """Why rows are tombstones."""

    def add(self, receipt: Receipt) -> None:
        """Takes one in; the order matters to the last bit of the fidelity, and is that of (view, shard)."""
        self._bytes += sum(record.size for record in receipt.files)
        self._labelled += receipt.labelled
        self._correct += receipt.correct
        self.reasons |= dict(receipt.tombstones)
        for field, measured in receipt.fidelity.items():
            self._fidelity[field] = fidelity.add(self._fidelity.get(field, {}), measured)

    def totals(self, addition: Addition) -> Totals:
        """All of it together."""
        return Totals(
            bytes=self._bytes,
            tombstones=len(self.reasons),
            labelled=self._labelled,
            correct=self._correct,
            fidelity={field: fidelity.mean(self._fidelity.get(field, {})) for field in addition.fields},
        )


def add_up(addition: Addition, receipts: Iterable[Receipt]) -> Totals:
    """What the shards of these receipts met, together."""
    tally = Tally()
    for receipt in receipts:
        tally.add(receipt)
    return tally.totals(addition)
