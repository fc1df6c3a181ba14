"""Step 7, reader: opens a cache, refuses what does not fit, gathers rows at memory speed, decodes."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings import Target
from teacher_cache.errors import (
    CacheError,
    CorruptionError,
    HoleError,
    MismatchError,
    SpecError,
    ViewMismatch,
)
from teacher_cache.fingerprint import key_digests
from teacher_cache.manifest import Manifest, Totals, read_manifest
from teacher_cache.receipts import add_up, read_receipts
from teacher_cache.samples import Samples, read_checked, read_samples, with_receipts
from teacher_cache.sources import BrokenSample, Source, open_source, source_fingerprint
from teacher_cache.spec import BuildSpec, SourceSpec, parse
from teacher_cache.storage import FileRecord, Group, ShardReader, open_store
from teacher_cache.storage.parquet_tables import read_table
from teacher_cache.views import Recipe, Views, open_recipe, render_views

_MOST_SHARDS = 512
_MOST_BYTES = 2**30

Rows = Sequence[int] | NDArray[np.int64]


class Cache:
    """A read-only cache. Picklable: a copy in another process opens its own maps. Not thread-safe."""

    def __init__(self, path: str | Path, source: SourceSpec | None = None) -> None:
        """Opens a cache; `teacher_cache.open` is this.

        Args:
            path: its folder.
            source: where the data set is now, if not where the manifest says.

        Raises:
            CacheError: there is no cache, or its manifest or tables cannot be trusted.
        """
        self.path = Path(path)
        self._source_spec = source
        self._source: Source | None = None
        self._recipe: Recipe | None = None
        self.manifest: Manifest
        self.samples: Samples
        self.totals: Totals
        """What was met while building; of the shards that are committed, while a build runs."""
        self.files: dict[tuple[int, int], dict[str, FileRecord]]
        """What is committed: the files of each (view, shard), by path."""
        self._read_authority()
        self._digests = key_digests(self.samples.keys)
        self._store = open_store(self.manifest.store.kind, self.manifest.grid)
        self._encodings = self.manifest.encodings
        self._groups: dict[tuple[str, int], Group] = {}
        self._room = _room(self.manifest)
        self._shards: OrderedDict[tuple[str, int], ShardReader] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "source": self._source_spec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["source"])  # type: ignore[misc]

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
        samples = read_samples(self.path, self.manifest.samples)
        if self.manifest.receipts is None:
            receipts = read_receipts(self.path, self.manifest)
            self.totals = add_up(self.manifest, receipts)
            self.samples = with_receipts(samples, self.manifest, receipts)
            for receipt in receipts:
                files[receipt.view, receipt.shard] = {record.path: record for record in receipt.files}
            return files
        assert self.manifest.totals is not None, "a sealed manifest has totals"
        self.samples, self.totals = samples, self.manifest.totals
        table = read_table(read_checked(self.path, self.manifest.receipts))
        columns = (table[name] for name in ("view", "shard", "path", "size", "digest"))
        for view, shard, path, size, digest in zip(*columns, strict=True):
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

    def __len__(self) -> int:
        return self.manifest.rows

    def read(self, field: str, view: int, rows: Rows) -> Target:
        """Rows of a field in one view, verified and decoded.

        Args:
            field: one of `fields`.
            view: 0 ≤ view < `views`.
            rows: row numbers, any order, repeats allowed.

        Returns:
            A target with arrays [len(rows), ...], in the order asked for.

        Raises:
            HoleError: a row's shard is not committed, or the row or view is outside the plan.
            TombstoneError: a row's sample could not be decoded when the cache was built.
            CorruptionError: a stored byte is not the byte that was committed there.
        """
        columns = self.columns(field, view, rows)
        target: Target = self._encodings[field].decode(columns)
        return target

    def columns(self, field: str, view: int, rows: Rows) -> dict[str, NDArray[Any]]:
        """The stored arrays behind `read`, one [len(rows), ...] for each part of the encoding."""
        if field not in self._encodings:
            hint = f"This cache holds: {', '.join(self.fields)}."
            raise MismatchError("field", "must be one that the cache holds", field, hint)
        wanted = self._rows(rows, view)
        group = self._group(field, view)
        return {part.name: self._gather(group, part.name, view, wanted) for part in group.parts}

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

    def _gather(self, group: Group, part: str, view: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        described = next(item for item in group.parts if item.name == part)
        gathered = np.empty((len(rows), *described.shape), described.dtype)
        shards, inside = np.divmod(rows, self.manifest.grid.shard_rows)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            gathered[places] = self._shard(group, view, int(shard)).gather(part, inside[places])
        return gathered

    def _shard(self, group: Group, view: int, shard: int) -> ShardReader:
        if (group.path, shard) in self._shards:
            self._shards.move_to_end((group.path, shard))
            return self._shards[group.path, shard]
        if (view, shard) not in self.files:
            start, stop = self.manifest.grid.span(shard)
            hint = "Finish the build: teacher-cache build CONFIG goes on where it stopped."
            raise HoleError(f"view {view}", "must be committed before it is read", f"rows {start}..{stop - 1}", hint)
        reader = self._store.open_shard(self.path, group, shard, self.files[view, shard])
        self._shards[group.path, shard] = reader
        if len(self._shards) > self._room:
            self._shards.popitem(last=False)
        return reader

    @property
    def source(self) -> Source:
        """The data set that the cache was built over.

        Raises:
            MismatchError: the data set that is there now is another one.
        """
        if self._source is None:
            spec: BuildSpec = self.spec
            source = open_source(spec.source)
            if source_fingerprint(source) != self.manifest.identity.source:
                hint = "Restore the data set, or open the cache with source=… where it is."
                raise MismatchError("source", "must be the one that the cache was built over", spec.source, hint)
            self._source = source
        return self._source

    @property
    def recipe(self) -> Recipe:
        """The recipe of the views.

        Raises:
            MismatchError: the libraries that `seeded-global` views depend on have changed.
        """
        if self._recipe is None:
            recipe = open_recipe(self.spec.views)
            if recipe.view_fingerprint != self.manifest.identity.view:
                hint = f"The cache was built with {self.manifest.versions}; use those, or native operations."
                raise MismatchError("recipe", "must give the cache's views", recipe.describe(), hint)
            self._recipe = recipe
        return self._recipe

    def render_views(self, view: int, rows: Rows) -> Views:
        """Decodes and renders some rows; raises `MismatchError` where a sample's bytes have changed."""
        wanted = self._rows(rows, view)
        images: list[Tensor] = []
        for row in wanted.tolist():
            try:
                item = self.source.item(row)
            except BrokenSample as broken:
                hint = "It could be decoded when the cache was built: restore the data set."
                raise CorruptionError(self.samples.keys[row], str(broken), "broken now", hint) from broken
            known = int(self.samples.content[row])
            if known and item.content != known:
                rule, hint = "must have the bytes that the teacher saw", "Restore the data set."
                raise MismatchError(self.samples.keys[row], rule, f"{item.content:016x}", hint)
            images.append(item.image_CHW)
        if not images:
            nothing = torch.empty((0, *self.manifest.view_shape), dtype=torch.uint8)
            return Views(nothing, np.empty((0, len(self.manifest.param_names)), np.int32))
        return render_views(self.recipe, images, self._digests[wanted], view)

    def render(self, view: int, rows: Rows) -> Tensor:
        """The views themselves, uint8 [len(rows), C, H, W], each compared with the digest that the cache keeps.

        Raises:
            ViewMismatch: a view is not the one that the teacher saw.
        """
        rendered = self.render_views(view, rows)
        self.check_views(view, rows, rendered)
        return rendered.pixels_BCHW

    def check_views(self, view: int, rows: Rows, rendered: Views) -> None:
        """Raises `ViewMismatch` naming the first row whose pixels differ from what the teacher saw."""
        wanted = np.asarray(rows, np.int64).reshape(-1)
        differs = rendered.digests() != self.digests(view, wanted)
        if not differs.any():
            return
        row = int(wanted[int(differs.argmax())])
        place = f"sample {self.samples.keys[row]}, view {view}, recipe {self.manifest.identity.view}"
        now = {"torch": torch.__version__}
        drawn = rendered.params_BP[int(differs.argmax())].tolist()
        stored = self.params(view, [row])[0].tolist()
        why = "the parameters differ" if drawn != stored else "the same parameters give other pixels"
        hint = f"Built with {self.manifest.versions}, now {now}: {why}. Use the versions of the build."
        raise ViewMismatch(place, "must be the pixels that the teacher saw", f"{int(differs.sum())} rows differ", hint)


def _room(manifest: Manifest) -> int:
    """How many shards may stay open: a Zarr map holds a file handle for each part, a Parquet shard its rows."""
    groups = manifest.groups(0)
    if manifest.store.kind == "parquet":
        largest = max(sum(part.row_bytes for part in group.parts) for group in groups)
        return max(8, min(_MOST_SHARDS, _MOST_BYTES // (largest * manifest.store.shard_rows)))
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(_MOST_SHARDS, handles // 2 // max(len(group.parts) for group in groups)))


def open_cache(path: str | Path, source: SourceSpec | None = None) -> Cache:
    """Opens a cache read-only.

    Args:
        path: its folder.
        source: where the data set is now, if not where the manifest says.

    Raises:
        CacheError: there is none, or it cannot be trusted.
    """
    return Cache(path, source)


__all__ = ["Cache", "CacheError", "open_cache"]
