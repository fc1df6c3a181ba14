"""The sample table: key, label, size, content digest and status of every row; a row's place is its number.

It is cut into parts, each read and checked when one of its rows is first asked for: to open a cache of many millions of
samples costs what it costs to open a small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.addition import TableRef
from teacher_cache.errors import CorruptionError, TombstoneError
from teacher_cache.fingerprint import key_digests
from teacher_cache.manifest import Manifest
from teacher_cache.sources import Source
from teacher_cache.storage.parquet_tables import Columns
from teacher_cache.storage.root import Root
from teacher_cache.tables import OTHER, read_arrays, read_columns, write_table

PART_ROWS = 65_536
"""Rows of one part of the table; part of the format."""
SAMPLES = {"key": "string", "digest": "uint64", "label": "int64?", "size": "int64"}
CONTENT = {"content": "uint64"}
TOMBSTONES = {"row": int, "reason": str}
"""The columns of the tables."""

_KEPT = 64
"""Parts that stay in memory with their keys."""


class _Part(NamedTuple):
    """Some rows of one segment."""

    start: int
    stop: int
    samples: TableRef
    content: TableRef | None
    """None until the segment's first addition is sealed."""


class Samples:
    """What is known of every row. Reads what is asked for, and keeps it."""

    def __init__(self, root: Root, manifest: Manifest) -> None:
        """Reads the tombstones, and nothing else yet.

        Raises:
            CorruptionError: their table is not the one that the manifest names.
        """
        self._root = root
        self._parts = list(_parts_of(manifest))
        self.reasons: Mapping[int, str] = _tombstones(root, manifest)
        """Why rows are tombstones, by row; those that are alive are not in it."""
        self._dead = np.array(sorted(self.reasons), np.int64)
        self._part = lru_cache(_KEPT)(self._read_part)

    def __len__(self) -> int:
        return self._parts[-1].stop

    @property
    def keys(self) -> Keys:
        """The samples' names, by row."""
        return Keys(self)

    def key(self, row: int) -> str:
        """The name of one row."""
        part = self._part_of(row)
        return str(self._keys(part)[row - self._parts[part].start])

    def _keys(self, part: int) -> Sequence[str]:
        keys = self._part(part)["key"]
        assert isinstance(keys, Sequence)
        return keys

    def _part_of(self, row: int) -> int:
        return int(np.searchsorted([part.stop for part in self._parts], row, side="right"))

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """Digests of the keys, uint64 [N]."""
        found: NDArray[np.uint64] = self._column("digest")
        return found

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers [N], where the source had them.

        Raises:
            CorruptionError: some parts have labels and others not.
        """
        columns = [self._part(part)["label"] for part in range(len(self._parts))]
        bare = [place for place, column in enumerate(columns) if column is None]
        if len(bare) == len(columns):
            return None
        if bare:
            place = self._parts[bare[0]].samples.path
            raise CorruptionError(place, "must have labels, as other parts have", "none", OTHER)
        return np.concatenate([np.asarray(column) for column in columns])

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Stored bytes of each sample, int64 [N]."""
        found: NDArray[np.int64] = self._column("size")
        return found

    @cached_property
    def content(self) -> NDArray[np.uint64]:
        """Digest of the bytes that were read when building, uint64 [N]; 0 while that is not known."""
        found = np.zeros(len(self), np.uint64)
        for part in self._parts:
            if part.content is not None:
                column = read_arrays(self._root, part.content, CONTENT, part.stop - part.start)["content"]
                found[part.start : part.stop] = np.asarray(column)
        return found

    def _column(self, name: str) -> NDArray[Any]:
        return np.concatenate([np.asarray(self._part(part)[name]) for part in range(len(self._parts))])

    def _read_part(self, number: int) -> Columns:
        part = self._parts[number]
        return read_arrays(self._root, part.samples, SAMPLES, part.stop - part.start)

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        """True for rows that are no tombstone, [N]."""
        found = np.ones(len(self), np.bool_)
        found[self._dead] = False
        return found

    def require_alive(self, rows: NDArray[np.int64]) -> None:
        """Raises `TombstoneError` naming the first of these rows that has no data."""
        if not len(self._dead):
            return
        dead = np.isin(rows, self._dead)
        if dead.any():
            row = int(rows[dead][0])
            hint = "Leave it out: `cache.alive` says which rows have data."
            raise TombstoneError(f"row {row} ({self.key(row)})", self.reasons[row], "tombstone", hint)

    def learn(self, reasons: Mapping[int, str], content: NDArray[np.uint64] | None = None) -> None:
        """Takes in what committed shards of an addition that is not sealed have found out.

        Args:
            reasons: why rows are tombstones.
            content: [N], 0 where they know nothing.
        """
        if content is not None:
            self.__dict__["content"] = np.where(self.content == 0, content, self.content)
        self.reasons = dict(sorted({**self.reasons, **reasons}.items()))
        self._dead = np.array(sorted(self.reasons), np.int64)
        self.__dict__.pop("alive", None)

    @property
    def tombstones(self) -> tuple[tuple[str, str], ...]:
        """(key, reason) of every row that has no data."""
        return tuple((self.key(row), reason) for row, reason in self.reasons.items())


class Keys(Sequence[str]):
    """The keys of all rows, read part by part."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self._samples.key(place) for place in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._samples.key(row % len(self))

    def __iter__(self) -> Iterator[str]:
        for part in range(len(self._samples._parts)):
            yield from self._samples._keys(part)[:]


def _parts_of(manifest: Manifest) -> Iterator[_Part]:
    for segment, (start, stop) in zip(manifest.segments, manifest.spans, strict=True):
        content = segment.content or (None,) * len(segment.samples)
        if len(segment.samples) != -(-segment.rows // PART_ROWS) or len(content) != len(segment.samples):
            rule = f"must have a part for each {PART_ROWS} rows"
            raise CorruptionError("segments", rule, (segment.rows, len(segment.samples), len(content)), OTHER)
        for place, (table, known) in enumerate(zip(segment.samples, content, strict=True)):
            first = start + place * PART_ROWS
            yield _Part(first, min(first + PART_ROWS, stop), table, known)


def _tombstones(root: Root, manifest: Manifest) -> dict[int, str]:
    table = manifest.tombstones
    if table is None:
        return {}
    columns = read_columns(root, table, TOMBSTONES)
    rows: list[int] = columns["row"]
    if rows != sorted(set(rows)) or (rows and not 0 <= rows[0] <= rows[-1] < manifest.rows):
        raise CorruptionError(
            table.path, f"must name rows 0..{manifest.rows - 1}, each once, in order", rows[:9], OTHER
        )
    return dict(zip(rows, columns["reason"], strict=True))


def write_samples(root: Root, source: Source, start: int) -> tuple[TableRef, ...]:
    """Writes what a source says of its rows from `start` on, before any of them is read."""
    return tuple(_write_part(root, source, first) for first in range(start, len(source), PART_ROWS))


def _write_part(root: Root, source: Source, first: int) -> TableRef:
    stop = min(first + PART_ROWS, len(source))
    keys = list(source.keys[first:stop])
    columns = {
        "key": keys,
        "digest": key_digests(keys),
        "label": [None] * len(keys) if source.labels is None else source.labels[first:stop],
        "size": source.sizes[first:stop],
    }
    return write_table(root, "samples", columns)


def write_content(root: Root, content: NDArray[np.uint64]) -> tuple[TableRef, ...]:
    """Writes what was found out about the stored bytes of a segment's rows."""
    parts = [content[first : first + PART_ROWS] for first in range(0, len(content), PART_ROWS)]
    return tuple(write_table(root, "content", {"content": part}) for part in parts)


def write_tombstones(root: Root, reasons: Mapping[int, str]) -> TableRef | None:
    """Writes why rows are tombstones; None where none is."""
    if not reasons:
        return None
    rows = sorted(reasons)
    return write_table(root, "tombstones", {"row": rows, "reason": [reasons[row] for row in rows]})
