"""Step 7, gather: rows of one field, or of the views' proof, from whichever additions hold them, at memory speed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.addition import Addition
from teacher_cache.encodings import Part
from teacher_cache.errors import HoleError, SpecError
from teacher_cache.index import Index
from teacher_cache.samples import Samples
from teacher_cache.storage import FileRecord, Group, GroupReader, open_maps, open_store
from teacher_cache.storage.root import Root


class Wanted(NamedTuple):
    """What is to be gathered: a teacher's field, or the proof of a view."""

    teacher: str = ""
    field: str = ""
    """Empty for the proof."""
    name: str = "proof"
    """As whoever reads it calls it."""

    def group_of(self, addition: Addition, view: int) -> Group | None:
        """Where an addition has it; None where it has not."""
        if view not in addition.view_numbers:
            return None
        if not self.field:
            return addition.proof_group(view) if addition.extent.proof else None
        mine = addition.teacher == self.teacher and self.field in addition.fields
        return addition.field_group(self.field, view) if mine else None


PROOF = Wanted()


@dataclass(frozen=True)
class Block:
    """One group of one view, and what is committed of it."""

    index: Index
    group: Group

    @property
    def addition(self) -> Addition:
        """The addition that wrote it."""
        return self.index.addition

    def part(self, name: str) -> Part:
        """One of its arrays."""
        return next(part for part in self.group.parts if part.name == name)


class Gatherer:
    """Gathers rows; keeps files mapped, as many as a process may have."""

    def __init__(self, root: Root, indices: Sequence[Index], samples: Samples, maps: Path | None) -> None:
        """Opens nothing yet.

        Args:
            root: the cache.
            indices: what is committed of each of its additions.
            samples: told of tombstones that are met.
            maps: of a Parquet cache: where its shards are kept decoded.
        """
        self._root, self._indices, self._samples, self._maps = root, indices, samples, maps
        self._blocks: dict[tuple[Wanted, int], tuple[Block, ...]] = {}
        self.readers: OrderedDict[str, GroupReader] = OrderedDict()
        """By path, those used last at the end."""

    def blocks(self, wanted: Wanted, view: int) -> tuple[Block, ...]:
        """What holds it in one view, in the order of the rows."""
        if (wanted, view) not in self._blocks:
            groups = ((index, wanted.group_of(index.addition, view)) for index in self._indices)
            found = [Block(index, group) for index, group in groups if group is not None]
            self._blocks[wanted, view] = tuple(sorted(found, key=lambda block: block.addition.extent.first_row))
        return self._blocks[wanted, view]

    def gather(
        self, wanted: Wanted, part: str, view: int, rows: NDArray[np.int64], out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """One stored array, [rows, ...].

        Raises:
            HoleError: a row is not planned or not committed.
            TombstoneError: a row turns out to have no data.
            CorruptionError: a stored byte is not the byte that was committed there.
        """
        blocks = self.blocks(wanted, view)
        self._require_committed(wanted, view, rows, blocks)
        if out is not None:
            _require_fit(out, blocks[0].part(part), len(rows))
        if len(blocks) == 1:
            first = blocks[0].addition.extent.first_row
            gathered = self._reader(blocks[0], view).gather(part, rows - first if first else rows, out)
        else:
            gathered = self._from_several(blocks, part, view, rows, out)
        self._make_room()
        return gathered

    def _from_several(
        self, blocks: Sequence[Block], part: str, view: int, rows: NDArray[np.int64], out: NDArray[Any] | None
    ) -> NDArray[Any]:
        """Rows of a cache that has grown: from the groups of several segments into one array."""
        if out is None:
            described = blocks[0].part(part)
            out = np.empty((len(rows), *described.shape), described.dtype)
        for block in blocks:
            extent = block.addition.extent
            places = np.flatnonzero(extent.holds(rows))
            if len(places):
                out[places] = self._reader(block, view).gather(part, rows[places] - extent.first_row)
        return out

    def _require_committed(self, wanted: Wanted, view: int, rows: NDArray[np.int64], blocks: Sequence[Block]) -> None:
        covered = np.zeros(len(rows), np.bool_)
        for block in blocks:
            # Of a sealed addition that covers all there is nothing to look up.
            if block.index.sealed and block.addition.rows == len(self._samples):
                return
            covered |= block.index.committed(view, rows)
            if not block.index.sealed:
                self.learn_from(block.index, view, rows)
                self._samples.require_alive(rows)
        if not blocks or not covered.all():
            raise _hole(wanted, view, rows[~covered], blocks)

    def learn_from(self, index: Index, view: int, rows: NDArray[np.int64]) -> None:
        """While a build runs, the shards' own receipts say which of their rows are tombstones."""
        committed = rows[index.committed(view, rows)]
        for shard in np.unique(index.addition.shards_of(committed)).tolist():
            reasons = dict(index.receipt(view, shard).tombstones)
            if reasons.keys() - self._samples.reasons.keys():
                self._samples.learn(reasons)

    def _reader(self, block: Block, view: int) -> GroupReader:
        path, addition = block.group.path, block.addition
        if path not in self.readers:
            records_of = _records(block.index, view)
            if self._maps is None:
                store = open_store(addition.store.kind, addition.grid)
                self.readers[path] = store.open_group(self._root, block.group, records_of)
            else:
                # Additions of one identity have the same bytes, wherever they are.
                folder = self._maps / addition.identity.whole
                self.readers[path] = open_maps(self._root, folder, block.group, addition.grid, records_of)
        self.readers.move_to_end(path)
        return self.readers[path]

    def _make_room(self) -> None:
        """Lets go of what was used longest ago, so that maps and memory stay within what a process may have."""
        while sum(reader.load for reader in self.readers.values()) > 1:
            if len(self.readers) == 1:
                next(iter(self.readers.values())).clear()
                return
            _, oldest = self.readers.popitem(last=False)
            oldest.clear()


def _require_fit(out: NDArray[Any], part: Part, rows: int) -> None:
    shape = (rows, *part.shape)
    if out.shape != shape or out.dtype != part.dtype or not out.flags.c_contiguous:
        hint = "Take cache.buffers(field, rows), and of a smaller batch their first rows: buffer[:len(rows)]."
        found = f"{out.dtype} {list(out.shape)}"
        raise SpecError(f"out[{part.name!r}]", f"must be {part.dtype} {list(shape)}, row after row", found, hint)


def _records(index: Index, view: int) -> Callable[[int], Mapping[str, FileRecord]]:
    return lambda shard: index.files(view, shard)


def _hole(wanted: Wanted, view: int, missing: NDArray[np.int64], blocks: Sequence[Block]) -> HoleError:
    planned = next((block for block in blocks if len(missing) and block.addition.extent.holds(missing[:1])[0]), None)
    if planned is None:
        hint = "Build it: teacher-cache build CONFIG adds what is missing."
        value = f"row {missing[0]}" if len(missing) else "no row"
        return HoleError(f"{wanted.name}, view {view}", "must be part of the cache's plan", value, hint)
    start, stop = planned.addition.span(planned.addition.shard_of(int(missing[0])))
    hint = "Finish the build: teacher-cache build CONFIG goes on where it stopped."
    return HoleError(f"view {view}", "must be committed before it is read", f"rows {start}..{stop - 1}", hint)
