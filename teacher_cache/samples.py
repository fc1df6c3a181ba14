"""The sample table: key, label, size, content digest and status of every row; a row's place is its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Shared
from teacher_cache.encodings.constants import from_columns
from teacher_cache.errors import CorruptionError, TombstoneError
from teacher_cache.fingerprint import bytes_digest
from teacher_cache.manifest import Manifest, TableRef
from teacher_cache.receipts import Receipt
from teacher_cache.sources import Source
from teacher_cache.storage import write_atomic
from teacher_cache.storage.parquet_tables import read_table, table_bytes

_OTHER = "Its digest is right, so it was written as it is: restore the manifest and its tables from one copy."

ALIVE = ""
RECEIPTS = {"view": int, "shard": int, "path": str, "size": int, "digest": str}
"""The columns of the table of receipts."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What is known of every row."""

    keys: list[str]
    labels: NDArray[np.int64] | None
    sizes: NDArray[np.int64]
    content: NDArray[np.uint64]
    """Digest of the bytes that were read when building; 0 while nobody has read them."""
    reasons: list[str]
    """Why a row is a tombstone; empty for a row that is alive."""

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        """True for rows that are no tombstone, [N]."""
        return np.array([reason == ALIVE for reason in self.reasons], np.bool_)

    def require_alive(self, rows: NDArray[np.int64]) -> None:
        """Raises `TombstoneError` naming the first of these rows that has no data."""
        dead = ~self.alive[rows]
        if dead.any():
            row = int(rows[dead][0])
            hint = "Leave it out: `cache.alive` says which rows have data."
            raise TombstoneError(f"row {row} ({self.keys[row]})", self.reasons[row], "tombstone", hint)


def of_source(source: Source) -> Samples:
    """The table at the beginning of a build: nothing has been read yet."""
    count = len(source)
    return Samples(source.keys, source.labels, source.sizes, np.zeros(count, np.uint64), [ALIVE] * count)


def with_receipts(samples: Samples, manifest: Manifest, receipts: Sequence[Receipt]) -> Samples:
    """The table with what the committed shards have found out.

    Raises:
        CorruptionError: two views of one sample were read from different bytes: the source changed meanwhile.
    """
    content, reasons = samples.content.copy(), list(samples.reasons)
    for receipt in receipts:
        start, stop = manifest.grid.span(receipt.shard)
        known = content[start:stop]
        differs = (known != 0) & (receipt.content != 0) & (known != receipt.content)
        if differs.any():
            key = samples.keys[start + int(differs.argmax())]
            hint = "Begin a new cache: this one holds answers for both contents."
            raise CorruptionError(key, "changed in the source during the build", f"view {receipt.view}", hint)
        content[start:stop] = np.maximum(known, receipt.content)
        for row, reason in receipt.tombstones:
            reasons[row] = reason
    return Samples(samples.keys, samples.labels, samples.sizes, content, reasons)


def write_samples(root: Path, samples: Samples) -> TableRef:
    """Writes the sample table."""
    columns = {
        "key": samples.keys,
        "label": [None] * len(samples.keys) if samples.labels is None else samples.labels,
        "size": samples.sizes,
        "content": samples.content,
        "tombstone": samples.reasons,
    }
    return write_table(root, "samples", columns)


def write_table(root: Path, stem: str, columns: Mapping[str, Any]) -> TableRef:
    """Writes a table under a name made of its digest, so that an older manifest keeps its own."""
    reference, data = named_table(stem, columns)
    write_atomic(root, reference.path, data)
    return reference


def named_table(stem: str, columns: Mapping[str, Any]) -> tuple[TableRef, bytes]:
    """A table's bytes, and the name and digest under which a manifest will have it."""
    data = table_bytes(columns)
    digest = bytes_digest(data)
    return TableRef(path=f"{stem}-{digest[:12]}.parquet", digest=digest), data


def read_constants(root: Path, table: TableRef | None) -> dict[str, Shared]:
    """What the rows of each field share, by field; nothing where no encoding needs it."""
    if table is None:
        return {}
    columns = read_columns(root, table, dict.fromkeys(("field", "name", "dtype", "shape"), str) | {"data": bytes})
    try:
        return from_columns(columns, table.digest)
    except (ValueError, TypeError) as error:
        raise CorruptionError(table.path, "must hold arrays by field and name", error, _OTHER) from error


def read_checked(root: Path, table: TableRef) -> bytes:
    """The bytes of a table of the manifest, checked against its digest."""
    hint = "Restore it from a copy, or build the cache again."
    try:
        data = (root / table.path).read_bytes()
    except OSError as error:
        raise CorruptionError(table.path, "must be there: the manifest names it", error, hint) from error
    if bytes_digest(data) != table.digest:
        raise CorruptionError(table.path, f"must have digest {table.digest}", bytes_digest(data), hint)
    return data


def read_columns(root: Path, table: TableRef, wanted: Mapping[str, type | tuple[type, ...]]) -> dict[str, list[Any]]:
    """A table of the manifest, checked: its digest, and that these columns are there and hold these types.

    Raises:
        CorruptionError: it is not the table that the manifest names, or no table of this kind.
    """
    data = read_checked(root, table)
    try:
        columns = read_table(data)
    except (ValueError, OSError, LookupError, NotImplementedError) as error:
        raise CorruptionError(table.path, "must be a Parquet table", error, _OTHER) from error
    if set(columns) != set(wanted):
        raise CorruptionError(table.path, f"must have the columns {sorted(wanted)}", sorted(columns), _OTHER)
    for name, kinds in wanted.items():
        wrong = next((value for value in columns[name] if not isinstance(value, kinds)), columns)
        if wrong is not columns:
            raise CorruptionError(table.path, f"must hold {kinds} in its column `{name}`", repr(wrong), _OTHER)
    return columns


def read_samples(root: Path, table: TableRef, rows: int | None = None) -> Samples:
    """Reads the table that a manifest names.

    Args:
        root: the cache's folder.
        table: its name and digest.
        rows: how many rows it must have.
    """
    kinds: dict[str, type | tuple[type, ...]] = {
        "key": str,
        "label": (int, type(None)),
        "size": int,
        "content": int,
        "tombstone": str,
    }
    columns = read_columns(root, table, kinds)
    labels = columns["label"]
    if rows is not None and len(labels) != rows:
        raise CorruptionError(table.path, f"must have the manifest's {rows} rows", len(labels), _OTHER)
    if len(bare := {label is None for label in labels}) > 1:
        raise CorruptionError(table.path, "must have a label in every row, or in none", "both", _OTHER)
    return Samples(
        columns["key"],
        None if bare == {True} else np.array(labels, np.int64),
        np.array(columns["size"], np.int64),
        np.array(columns["content"], np.uint64),
        columns["tombstone"],
    )
