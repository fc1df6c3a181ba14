"""Step 7, reader: opens a cache, refuses what does not fit, gathers rows at memory speed, decodes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.cached_views import CachedViews
from teacher_cache.encodings import Target
from teacher_cache.errors import (
    CacheError,
    CorruptionError,
    HoleError,
    MismatchError,
    SpecError,
)
from teacher_cache.fingerprint import key_digests
from teacher_cache.loader import Decoded, ViewLoader
from teacher_cache.manifest import Manifest, Totals, read_manifest
from teacher_cache.proof import Difference, Tolerance, check, measure
from teacher_cache.receipts import add_up, read_receipts
from teacher_cache.samples import (
    RECEIPTS,
    Samples,
    read_columns,
    read_constants,
    read_samples,
    with_receipts,
)
from teacher_cache.sources import Item, Source
from teacher_cache.spec import BuildSpec, SourceSpec, parse
from teacher_cache.storage import FileRecord, Group, GroupReader, open_maps, open_store
from teacher_cache.views import Recipe, Views
from teacher_cache.views.student_size import Resized

Rows = Sequence[int] | NDArray[np.int64]


class Cache:
    """A read-only cache. Picklable: a copy in another process opens its own maps. Not thread-safe."""

    def __init__(self, path: str | Path, source: SourceSpec | None = None, maps: str | Path | None = None) -> None:
        """Opens a cache; `teacher_cache.open` is this.

        Args:
            path: its folder.
            source: where the data set is now, if not where the manifest says.
            maps: of a Parquet cache: a folder on this machine in which shards are kept decoded, as large as the
                cache, so that they are read at memory speed; without it, the shards used last are kept in memory.

        Raises:
            CacheError: there is no cache, or its manifest or tables cannot be trusted.
            SpecError: `maps` for a Zarr cache, which is mapped as it is.
        """
        self.path = Path(path)
        self._source_spec, self._maps = source, None if maps is None else Path(maps)
        self.manifest: Manifest
        self.samples: Samples
        self.totals: Totals
        """What was met while building; of the shards that are committed, while a build runs."""
        self.files: dict[tuple[int, int], dict[str, FileRecord]]
        """What is committed: the files of each (view, shard), by path."""
        self._read_authority()
        self.key_digests = key_digests(self.samples.keys)
        """Digests of the samples' keys, uint64 [N]."""
        self._views = CachedViews(self)
        self._store = open_store(self.manifest.store.kind, self.manifest.grid)
        if self._maps is not None and self.manifest.store.kind != "parquet":
            raise SpecError("maps", "is for Parquet: Zarr is mapped as it is", self._maps, "Leave it out.")
        self._encodings = self.manifest.open_encodings(read_constants(self.path, self.manifest.constants))
        self._groups: dict[tuple[str, int], Group] = {}
        self._readers: OrderedDict[str, GroupReader] = OrderedDict()
        self._committed: dict[int, NDArray[np.bool_]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "source": self._source_spec, "maps": self._maps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _read_authority(self) -> None:
        """Manifest, samples and index, all of one moment: a build that seals meanwhile replaces all three."""
        while True:
            self.manifest = read_manifest(self.path)
            try:
                self.files = self._read_index()
            except (CorruptionError, FileNotFoundError):
                if read_manifest(self.path) == self.manifest:
                    raise
            else:
                # Receipts that vanished between two looks leave no trace: the manifest tells.
                if self.manifest.state == "sealed" or read_manifest(self.path) == self.manifest:
                    return

    def _read_index(self) -> dict[tuple[int, int], dict[str, FileRecord]]:
        """What is committed, by (view, shard): from the sealed table, or from the receipts of a running build."""
        files: dict[tuple[int, int], dict[str, FileRecord]] = {}
        samples = read_samples(self.path, self.manifest.samples, self.manifest.rows)
        if self.manifest.receipts is None:
            receipts = read_receipts(self.path, self.manifest)
            self.totals = add_up(self.manifest, receipts)
            self.samples = with_receipts(samples, self.manifest, receipts)
            for receipt in receipts:
                files[receipt.view, receipt.shard] = {record.path: record for record in receipt.files}
            return files
        assert self.manifest.totals is not None, "a sealed manifest has totals"
        self.samples, self.totals = samples, self.manifest.totals
        table = read_columns(self.path, self.manifest.receipts, RECEIPTS)
        for view, shard, path, size, digest in zip(*(table[name] for name in RECEIPTS), strict=True):
            files.setdefault((view, shard), {})[path] = FileRecord(path, size, digest)
        return files

    @property
    def spec(self) -> BuildSpec:
        """The spec that built it, with this cache's path and, where one was given, the source's new place."""
        spec = parse(BuildSpec, {**self.manifest.spec, "cache": str(self.path)}, str(self.path))
        return spec if self._source_spec is None else spec.model_copy(update={"source": self._source_spec})

    @property
    def views(self) -> int:
        """How many views of each sample were planned."""
        return self.manifest.views

    @property
    def fields(self) -> tuple[str, ...]:
        """The names that `read` takes."""
        return tuple(self.manifest.fields)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers' names."""
        return (self.manifest.teacher,)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers [N], where the source had them."""
        return self.samples.labels

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Which rows have data, [N]: False for a tombstone."""
        return self.samples.alive

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return len(self.files) == self.manifest.views * self.manifest.grid.shards

    def is_committed(self, view: int, row: int) -> bool:
        """Whether the shard that holds a row in a view is there."""
        return (view, row // self.manifest.grid.shard_rows) in self.files

    def __len__(self) -> int:
        return self.manifest.rows

    def read(self, field: str, view: int, rows: Rows, out: Mapping[str, NDArray[Any]] | None = None) -> Target:
        """Rows of a field in one view, verified and decoded.

        Args:
            field: one of `fields`.
            view: 0 ≤ view < `views`.
            rows: row numbers, any order, repeats allowed.
            out: `buffers(field, len(rows))` to gather into: what was read into them before is overwritten.

        Returns:
            A target with arrays [len(rows), ...], in the order asked for.

        Raises:
            HoleError: a row's shard is not committed, or the row or view is outside the plan.
            TombstoneError: a row's sample could not be decoded when the cache was built.
            CorruptionError: a stored byte is not the byte that was committed there.
        """
        columns = self.columns(field, view, rows, out)
        target: Target = self._encodings[field].decode(columns)
        return target

    def columns(
        self, field: str, view: int, rows: Rows, out: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The stored arrays behind `read`, one [len(rows), ...] for each part of the encoding."""
        if field not in self._encodings:
            hint = f"This cache holds: {', '.join(self.fields)}."
            raise MismatchError("field", "must be one that the cache holds", field, hint)
        wanted = self._rows(rows, view)
        group = self._group(field, view)
        into = {} if out is None else out
        return {part.name: self._gather(group, part.name, view, wanted, into.get(part.name)) for part in group.parts}

    def buffers(self, field: str, rows: int) -> dict[str, NDArray[Any]]:
        """Memory for so many rows of a field, to read into again and again: page-locked where there is a GPU.

        Args:
            field: one of `fields`.
            rows: how many are read at a time.
        """
        pinned, parts = torch.cuda.is_available(), self._group(field, 0).parts
        sizes = {part.name: torch.empty(rows * part.row_bytes, dtype=torch.uint8, pin_memory=pinned) for part in parts}
        return {part.name: sizes[part.name].numpy().view(part.dtype).reshape(rows, *part.shape) for part in parts}

    def digests(self, view: int, rows: Rows) -> NDArray[np.uint64]:
        """The pixel digests that the teacher's views had, uint64 [len(rows)]."""
        return self._gather(self._group("", view), "digest", view, self._rows(rows, view))

    def params(self, view: int, rows: Rows) -> NDArray[np.int32]:
        """The resolved parameters of the views, int32 [len(rows), P]; columns as in `manifest.param_names`."""
        wanted = self._rows(rows, view)
        if not self.manifest.param_names:
            return np.empty((len(wanted), 0), np.int32)
        return self._gather(self._group("", view), "params", view, wanted)

    def _rows(self, rows: Rows, view: int) -> NDArray[np.int64]:
        given = np.asarray(rows)
        if given.size and given.dtype.kind not in "iu":
            hint = "Give row numbers; for a mask, np.flatnonzero(mask)."
            raise SpecError("rows", "must be integers", given.dtype, hint)
        wanted = given.astype(np.int64).reshape(-1)
        if not isinstance(view, int | np.integer) or not 0 <= view < self.views:
            raise HoleError("view", f"must be in 0..{self.views - 1}", view, "Build more views.")
        outside = (wanted < 0) | (wanted >= len(self))
        if outside.any():
            found = int(wanted[outside][0])
            raise HoleError("row", f"must be in 0..{len(self) - 1}", found, "Build over more samples.")
        self.samples.require_alive(wanted)
        return wanted

    def _group(self, field: str, view: int) -> Group:
        if (field, view) not in self._groups:
            manifest = self.manifest
            made = manifest.field_group(field, view) if field else manifest.proof_group(view)
            self._groups[field, view] = made
        return self._groups[field, view]

    def _gather(
        self, group: Group, part: str, view: int, rows: NDArray[np.int64], out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        reader = self._opened(group, view)
        self._require_committed(view, rows)
        gathered = reader.gather(part, rows, out)
        self._make_room()
        return gathered

    def _require_committed(self, view: int, rows: NDArray[np.int64]) -> None:
        if view not in self._committed:
            shards = [shard for of, shard in self.files if of == view]
            self._committed[view] = np.isin(np.arange(self.manifest.grid.shards), shards)
        committed = self._committed[view][rows // self.manifest.grid.shard_rows]
        if not committed.all():
            shard = int(rows[~committed][0]) // self.manifest.grid.shard_rows
            start, stop = self.manifest.grid.span(shard)
            hint = "Finish the build: teacher-cache build CONFIG goes on where it stopped."
            raise HoleError(f"view {view}", "must be committed before it is read", f"rows {start}..{stop - 1}", hint)

    def _opened(self, group: Group, view: int) -> GroupReader:
        if group.path not in self._readers:
            files = self.files

            def records_of(shard: int) -> dict[str, FileRecord]:
                return files[view, shard]

            if self._maps is None:
                self._readers[group.path] = self._store.open_group(self.path, group, records_of)
            else:
                # Caches of one identity have the same bytes, wherever they are.
                folder = self._maps / self.manifest.identity.whole
                self._readers[group.path] = open_maps(self.path, folder, group, self.manifest.grid, records_of)
        self._readers.move_to_end(group.path)
        return self._readers[group.path]

    def _make_room(self) -> None:
        """Lets go of what was used longest ago, so that maps and memory stay within what a process may have."""
        while sum(reader.load for reader in self._readers.values()) > 1:
            if len(self._readers) == 1:
                next(iter(self._readers.values())).clear()
                return
            _, oldest = self._readers.popitem(last=False)
            oldest.clear()

    @property
    def source(self) -> Source:
        """The data set that the cache was built over; `MismatchError` if another one is there now."""
        return self._views.source

    @property
    def recipe(self) -> Recipe:
        """The recipe of the views; `MismatchError` if libraries that `seeded-global` depends on have changed."""
        return self._views.recipe

    @property
    def loader(self) -> ViewLoader:
        """Decodes rows and renders them, each row compared with the bytes that the teacher saw."""
        return self._views.loader

    def item(self, row: int) -> Item:
        """One decoded sample, compared with the bytes that the teacher saw; raises `BrokenSample` for a tombstone."""
        return self._views.item(row)

    @cached_property
    def moved(self) -> Difference:
        """How far the reference views, rendered now, are from those of the build."""
        return measure(self)

    def decode(self, rows: Rows) -> Decoded:
        """Decodes rows once, for any number of their views; raises `MismatchError` where bytes have changed."""
        return self.loader.decode(self._rows(rows, 0))

    def render_views(self, view: int, rows: Rows | Decoded, size: Resized | None = None) -> Views:
        """Renders a view of rows from its stored parameters, unchecked.

        Args:
            view: 0 ≤ view < `views`.
            rows: row numbers, or rows that are decoded already.
            size: a student's own size, as `views.student_size.at_size(cache.recipe, 160)` gives it.
        """
        return self._views.render(view, rows if isinstance(rows, Decoded) else self.decode(rows), size)

    def draw(self, view: int, rows: Rows | Decoded) -> NDArray[np.int32]:
        """The parameters as the recipe draws them today; `params` are those that are stored."""
        return self._views.draw(view, rows if isinstance(rows, Decoded) else self.decode(rows))

    def render(self, view: int, rows: Rows, tolerance: Tolerance = "exact") -> Tensor:
        """The views themselves, uint8 [len(rows), C, H, W], each compared with the digest that the cache keeps.

        Raises:
            ViewMismatch: a view is not the one that the teacher saw.
        """
        rendered = self.render_views(view, rows)
        self.check_views(view, rows, rendered, tolerance)
        return rendered.pixels_BCHW

    def check_views(self, view: int, rows: Rows, rendered: Views, tolerance: Tolerance = "exact") -> None:
        """Raises `ViewMismatch` naming the first row whose pixels differ from what the teacher saw."""
        check(self, view, np.asarray(rows, np.int64).reshape(-1), rendered, tolerance)


def open_cache(path: str | Path, source: SourceSpec | None = None, maps: str | Path | None = None) -> Cache:
    """Opens a cache read-only.

    Args:
        path: its folder.
        source: where the data set is now, if not where the manifest says.
        maps: of a Parquet cache: a folder on this machine in which shards are kept decoded.

    Raises:
        CacheError: there is none, or it cannot be trusted.
    """
    return Cache(path, source, maps)


__all__ = ["Cache", "CacheError", "open_cache"]
