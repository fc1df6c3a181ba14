"""Rows of one group of a Zarr cache: its arrays through memory maps, ragged rows by their offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Part
from teacher_cache.errors import CorruptionError
from teacher_cache.storage.base import COUNT, OFFSETS, Grid, Group
from teacher_cache.storage.files import RESTORE, FileRecord
from teacher_cache.storage.mapped_array import MappedArray
from teacher_cache.storage.ragged import pad, places_of
from teacher_cache.storage.root import Root
from teacher_cache.storage.zarr_files import layout_of

OFFSETS_PART = Part(OFFSETS, "uint32", ())
_MOST_FILES = 20_000
"""Mapped by one process: Linux allows 65,530 maps, and others need some too."""


def arrays_of(group: Group) -> tuple[Part, ...]:
    """What is stored of a group: its parts, with `offsets` for the `count` of ragged ones."""
    return tuple(OFFSETS_PART if group.ragged and part.name == COUNT else part for part in group.parts)


def shard_path(group: Group, part: Part, shard: int) -> str:
    """Zarr's default chunk key: sharded along the first dimension only, so every other coordinate is 0."""
    others = () if part.ragged else part.shape
    return "/".join(["data", group.path, part.name, "c", str(shard), *("0" for _ in others)])


class ZarrGroup:
    """Rows of all shards of a group; what is touched is mapped and verified."""

    def __init__(
        self, root: Root, group: Group, grid: Grid, records_of: Callable[[int], Mapping[str, FileRecord]]
    ) -> None:
        self._root, self._group, self._grid, self._records_of = root, group, grid, records_of
        self._parts = {part.name: part for part in (*group.parts, *arrays_of(group))}
        self._arrays: dict[str, MappedArray] = {}

    @property
    def load(self) -> float:
        """The share of the maps that a process may have."""
        return sum(array.placed for array in self._arrays.values()) / _MOST_FILES

    def clear(self) -> None:
        """Unmaps all."""
        for array in self._arrays.values():
            array.clear()

    def gather(self, part: str, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Copies rows out of the maps, into `out` where it is given."""
        described = self._parts[part]
        if not self._group.ragged or not (described.ragged or part == COUNT):
            return self._array(described).take(rows, out)
        starts, lengths = self._spans(rows)
        if part == COUNT:
            return _into(lengths.astype(np.uint32), out)
        array, shards = self._array(described), rows // self._grid.shard_rows
        self._require_elements(described, shards, starts + lengths)
        elements = array.take(places_of(shards * array.room + starts, lengths))
        return _into(pad(elements, lengths, described), out)

    def damage(self, shard: int) -> Iterator[CorruptionError]:
        """Reads every byte of a shard; where all files are sound, compares ragged parts with their offsets."""
        sound = True
        for part in arrays_of(self._group):
            try:
                self._array(part).verify(shard)
            except CorruptionError as error:
                sound = False
                yield error
        try:
            if sound and self._group.ragged:
                self._require_agreement(shard)
        except CorruptionError as error:
            yield error

    def _array(self, part: Part) -> MappedArray:
        if part.name not in self._arrays:
            layout = layout_of(part, self._grid)

            def record_of(shard: int) -> FileRecord:
                return self._records_of(shard)[shard_path(self._group, part, shard)]

            self._arrays[part.name] = MappedArray(self._root, layout, self._grid.shards, record_of)
        return self._arrays[part.name]

    def _spans(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where rows start in their shard's flat arrays, and how long they are."""
        offsets, is_first = self._array(OFFSETS_PART), rows % self._grid.shard_rows == 0
        stops = offsets.take(rows).astype(np.int64)
        starts = np.where(is_first, 0, offsets.take(np.where(is_first, rows, rows - 1)).astype(np.int64))
        lengths = stops - starts
        wrong = (lengths < 0) | (lengths > self._group.cap)
        if wrong.any():
            rule = f"must rise by 0 to {self._group.cap} from row to row"
            path = shard_path(self._group, OFFSETS_PART, int(rows[wrong][0]) // self._grid.shard_rows)
            raise CorruptionError(path, rule, lengths[wrong][0], RESTORE)
        return starts, lengths

    def _require_elements(self, part: Part, shards: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        there = self._array(part).lengths(shards)
        short = stops > there
        if short.any():
            rule = f"must hold the {stops[short][0]} elements that {OFFSETS} tell of"
            path = shard_path(self._group, part, int(shards[short][0]))
            raise CorruptionError(path, rule, there[short][0], RESTORE)

    def _require_agreement(self, shard: int) -> None:
        starts, lengths = self._spans(np.arange(*self._grid.span(shard)))
        elements = int(starts[-1] + lengths[-1])
        for part in self._group.ragged:
            layout = layout_of(part, self._grid)
            found = int(self._array(part).lengths(np.array([shard]))[0]) // layout.chunk_shape[0]
            if found != layout.needed(elements):
                rule = f"must hold {layout.needed(elements)} chunks, for the {elements} elements that {OFFSETS} tell of"
                raise CorruptionError(shard_path(self._group, part, shard), rule, found, RESTORE)


def _into(values: NDArray[Any], out: NDArray[Any] | None) -> NDArray[Any]:
    if out is None:
        return values
    out[...] = values
    return out
