"""Step 7, reader: opens a cache, refuses what does not fit, gathers rows at memory speed, decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.addition import Addition, Totals
from teacher_cache.cached_views import CachedViews
from teacher_cache.encodings import Encoding, Target, fidelity
from teacher_cache.errors import CacheError, CacheNotFoundError, CorruptionError, HoleError, MismatchError, SpecError
from teacher_cache.gather import PROOF, Gatherer, Wanted
from teacher_cache.index import Index
from teacher_cache.loader import Decoded, ViewLoader
from teacher_cache.manifest import Manifest, read_manifest
from teacher_cache.proof import Difference, Tolerance, check, measure
from teacher_cache.samples import Samples
from teacher_cache.sources import Item, Source
from teacher_cache.spec import BuildSpec, SourceSpec, parse
from teacher_cache.storage import absolute
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.root import Root, open_root
from teacher_cache.tables import read_constants
from teacher_cache.views import Recipe, Views
from teacher_cache.views.student_size import Resized

Rows = Sequence[int] | NDArray[np.int64]
T = TypeVar("T")


class _Field(NamedTuple):
    """What stands behind a name that `read` takes."""

    wanted: Wanted
    first: Addition
    """The first of the additions that hold it: all keep it alike."""

    @property
    def encoding(self) -> Encoding:
        """Its encoding as far as its name and its parts."""
        return self.first.encodings[self.wanted.field]


class Cache:
    """A read-only cache. Picklable: a copy in another process opens its own maps. Not thread-safe."""

    def __init__(
        self,
        path: str | Path | Root,
        source: SourceSpec | None = None,
        maps: str | Path | None = None,
        copies: str | Path | None = None,
        sealed: bool = False,
    ) -> None:
        """Opens a cache; `teacher_cache.open` is this.

        Args:
            path: its folder, or `s3://bucket/prefix`.
            source: where the data set is now, if not where the manifest says.
            maps: of a Parquet cache: a folder on this machine in which shards are kept decoded, as large as the
                cache, so that they are read at memory speed; without it, the shards used last are kept in memory.
            copies: of a remote cache: a folder on this machine in which files are kept as they are read; a temporary
                one of this process where not given.
            sealed: leave out what is being added to it just now.

        Raises:
            CacheError: there is no cache, or its manifest or tables cannot be trusted; with `sealed` also where its
                first addition is still being built.
            SpecError: `maps` for a Zarr cache, which is mapped as it is; `copies` for a folder of this machine.
        """
        self.root: Root = path if isinstance(path, Root) else open_root(path, None if copies is None else Path(copies))
        self._source_spec, self._maps, self._sealed = source, None if maps is None else Path(maps), sealed
        self.manifest: Manifest
        self.samples: Samples
        self._read_authority()
        # Opened again, it must not remember.
        for name in ("_learned", "_fields", "totals", "_encodings", "moved"):
            self.__dict__.pop(name, None)
        if copies is not None and isinstance(self.root, LocalRoot):
            hint = "Leave it out: the files are used where they are."
            raise SpecError("copies", "is for a cache at s3://bucket/prefix", copies, hint)
        self._views = CachedViews(self)
        if self._maps is not None and self.manifest.store.kind != "parquet":
            raise SpecError("maps", "is for Parquet: Zarr is mapped as it is", self._maps, "Leave it out.")
        self.indices = tuple(Index(self.root, addition) for addition in self.manifest.additions)
        """What is committed of each addition."""
        self._gatherer = Gatherer(self.root, self.indices, self.samples, self._maps)

    def _without_open(self, now: Manifest) -> Manifest:
        manifest = now.sealed()
        if manifest is None:
            hint = "Finish the build: teacher-cache build CONFIG goes on where it stopped."
            raise CacheNotFoundError(self.root.url, "must have a part that is sealed", "its first is being built", hint)
        return manifest

    def _read_authority(self) -> None:
        """The manifest and the table of tombstones that it names; a build that seals meanwhile replaces both."""
        now = read_manifest(self.root)
        while True:
            self.manifest = self._without_open(now) if self._sealed else now
            try:
                self.samples = Samples(self.root, self.manifest)
                return
            except CacheError:
                before, now = now, read_manifest(self.root)
                if now == before:
                    raise

    def __getstate__(self) -> dict[str, Any]:
        return {"path": absolute(self.root), "source": self._source_spec, "maps": self._maps, "sealed": self._sealed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def again(self) -> Cache:
        """The cache as it is now, opened as this one was."""
        return Cache(self.root, self._source_spec, self._maps, sealed=self._sealed)

    @property
    def path(self) -> str:
        """Where it is, as it was given."""
        return self.root.url

    @property
    def spec(self) -> BuildSpec:
        """The spec of the last addition, with this cache's path and, where one was given, the source's new place."""
        return self.spec_of(self.manifest.additions[-1])

    def spec_of(self, addition: Addition) -> BuildSpec:
        """The spec that one addition was built from."""
        spec = parse(BuildSpec, {**addition.spec, "cache": self.path}, self.path)
        return spec if self._source_spec is None else spec.model_copy(update={"source": self._source_spec})

    @property
    def views(self) -> int:
        """How many views of each sample were planned, for some field and some rows at least."""
        return self.manifest.views

    def views_of(self, field: str) -> int:
        """How many views, from the first on, of all rows a field was planned for."""
        wanted, stop = self._named(field).wanted, self.views
        for span in self.manifest.spans:
            here = [item for item in self.manifest.additions if (item.extent.first_row, item.extent.stop_row) == span]
            stop = next((v for v in range(stop) if all(wanted.group_of(item, v) is None for item in here)), stop)
        return stop

    @cached_property
    def _fields(self) -> dict[str, _Field]:
        """What stands behind each name that `read` takes."""
        first, found = self.manifest.teachers[0], dict[str, _Field]()
        for item in self.manifest.additions:
            for field in item.fields:
                name = field if item.teacher == first else f"{item.teacher}/{field}"
                found.setdefault(name, _Field(Wanted(item.teacher, field, name), item))
        return found

    @property
    def fields(self) -> tuple[str, ...]:
        """The names that `read` takes: the first teacher's fields, and `teacher/field` of others."""
        return tuple(self._fields)

    def _named(self, field: str) -> _Field:
        found = self._fields.get(field) or self._fields.get(field.removeprefix(f"{self.manifest.teachers[0]}/"))
        if found is None:
            hint = f"This cache holds: {', '.join(self.fields)}."
            raise MismatchError("field", "must be one that the cache holds", field, hint)
        return found

    def additions_of(self, field: str) -> list[Addition]:
        """The additions that hold a field, in the order in which they came."""
        teacher, name, _ = self._named(field).wanted
        return [item for item in self.manifest.additions if item.teacher == teacher and name in item.fields]

    def shape_of(self, field: str) -> tuple[int, ...]:
        """The shape of one row of a field before encoding."""
        found = self._named(field)
        return found.first.field_shapes[found.wanted.field]

    def encoding_of(self, field: str) -> Encoding:
        """How a field is kept, with what its rows share."""
        found = self._named(field)
        return self._encoding(found.first, found.wanted.field)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers' names, in the order in which they came."""
        return self.manifest.teachers

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers [N], where the source had them."""
        return self.samples.labels

    @property
    def key_digests(self) -> NDArray[np.uint64]:
        """Digests of the samples' keys, uint64 [N]."""
        return self.samples.digests

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Which rows have data, [N]: False for a tombstone. While a cache is being built this reads every receipt."""
        self._as_it_is(self._learn)
        return self.samples.alive

    def _learn(self) -> None:
        """Takes in, once, what the shards of an addition that is being built have found out about their samples."""
        if "_learned" in self.__dict__ or not self.indices or self.indices[-1].sealed:
            return
        index = self.indices[-1]
        content, reasons = np.zeros(len(self), np.uint64), dict[int, str]()
        for view, shard in index.places():
            receipt = index.receipt(view, shard)
            start, stop = index.addition.span(shard)
            content[start:stop] = np.maximum(content[start:stop], receipt.content)
            reasons |= dict(receipt.tombstones)
        self.samples.learn(reasons, content)
        self.__dict__["_learned"] = True

    @cached_property
    def totals(self) -> Totals:
        """What was met while building; of the shards that are committed, while a build runs."""
        self._as_it_is(self._learn)
        found = self._as_it_is(lambda: [index.totals() for index in self.indices])
        kept: dict[str, list[dict[str, float]]] = {}
        for index, item in zip(self.indices, found, strict=True):
            for field, figures in item.fidelity.items():
                first = index.addition.teacher == self.manifest.teachers[0]
                kept.setdefault(field if first else f"{index.addition.teacher}/{field}", []).append(figures)
        return Totals(
            bytes=sum(item.bytes for item in found),
            tombstones=len(self.samples.reasons),
            labelled=sum(item.labelled for item in found),
            correct=sum(item.correct for item in found),
            fidelity={field: fidelity.merged(figures) for field, figures in kept.items()},
        )

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        committed, planned = self.shards()
        return committed == planned

    def shards(self) -> tuple[int, int]:
        """How many shards are committed, and how many are planned."""
        found = self._shards()
        if found[0] < found[1] and not self._sealed and read_manifest(self.root) != self.manifest:
            # It was sealed while we counted: the receipts that seem to be missing are a table now.
            self.__init__(**self.__getstate__())  # type: ignore[misc]
            found = self._shards()
        return found

    def _shards(self) -> tuple[int, int]:
        committed = sum(int(index.shards(view).sum()) for index in self.indices for view in index.views)
        return committed, sum(len(index.views) * index.addition.grid.shards for index in self.indices)

    def holds(self, field: str, view: int, rows: Rows) -> NDArray[np.bool_]:
        """Which rows `read` would give, [rows]: planned, committed and no tombstones."""
        return self._holds(self._named(field).wanted, view, np.asarray(rows, np.int64).reshape(-1))

    def proves(self, view: int, rows: Rows) -> NDArray[np.bool_]:
        """Which rows have their `digests` and `params` in a view, [rows]."""
        return self._holds(PROOF, view, np.asarray(rows, np.int64).reshape(-1))

    def _holds(self, wanted: Wanted, view: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        found = np.zeros(len(rows), np.bool_)
        for block in self._gatherer.blocks(wanted, view):
            found |= block.index.committed(view, rows)
            if not block.index.sealed:
                self._gatherer.learn_from(block.index, view, rows)
        return found & ~np.isin(rows, list(self.samples.reasons))

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
            SpecError: `out` has another shape or type than these rows.
        """
        target: Target = self.encoding_of(field).decode(self.columns(field, view, rows, out))
        return target

    def columns(
        self, field: str, view: int, rows: Rows, out: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The stored arrays behind `read`, one [len(rows), ...] for each part of the encoding."""
        found, numbers = self._named(field), self._rows(rows, view)
        into = {} if out is None else out
        return {
            part.name: self._gather(found.wanted, part.name, view, numbers, into.get(part.name))
            for part in found.encoding.parts
        }

    def buffers(self, field: str, rows: int) -> dict[str, NDArray[Any]]:
        """Memory for so many rows of a field, to read into again and again: page-locked where there is a GPU.

        Args:
            field: one of `fields`.
            rows: how many are read at a time.
        """
        pinned, parts = torch.cuda.is_available(), self._named(field).encoding.parts
        sizes = {part.name: torch.empty(rows * part.row_bytes, dtype=torch.uint8, pin_memory=pinned) for part in parts}
        return {part.name: sizes[part.name].numpy().view(part.dtype).reshape(rows, *part.shape) for part in parts}

    def digests(self, view: int, rows: Rows) -> NDArray[np.uint64]:
        """The pixel digests that the teacher's views had, uint64 [len(rows)]."""
        return self._gather(PROOF, "digest", view, self._rows(rows, view))

    def params(self, view: int, rows: Rows) -> NDArray[np.int32]:
        """The resolved parameters of the views, int32 [len(rows), P]; columns as in `manifest.param_names`."""
        wanted = self._rows(rows, view)
        if not self.manifest.param_names:
            return np.empty((len(wanted), 0), np.int32)
        return self._gather(PROOF, "params", view, wanted)

    def _rows(self, rows: Rows, view: int) -> NDArray[np.int64]:
        # A range as a list of Python's numbers would cost more than reading the rows.
        given = np.arange(rows.start, rows.stop, rows.step) if isinstance(rows, range) else np.asarray(rows)
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

    def _encoding(self, addition: Addition, field: str) -> Encoding:
        constants = addition.constants.digest if addition.constants is not None else ""
        key = (addition.teacher, field, constants)
        if key not in self._encodings:
            opened = addition.open_encodings(read_constants(self.root, addition.constants))
            self._encodings |= {(addition.teacher, name, constants): item for name, item in opened.items()}
        return self._encodings[key]

    @cached_property
    def _encodings(self) -> dict[tuple[str, str, str], Encoding]:
        return {}

    def _gather(
        self, wanted: Wanted, part: str, view: int, rows: NDArray[np.int64], out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        return self._as_it_is(lambda: self._gatherer.gather(wanted, part, view, rows, out))

    def _as_it_is(self, look: Callable[[], T]) -> T:
        """Looks once more where a build has sealed, meanwhile, what was being built: its receipts are a table now."""
        try:
            return look()
        except (HoleError, CorruptionError):
            if self._sealed or self.manifest.state == "sealed" or read_manifest(self.root) == self.manifest:
                raise
        self.__init__(**self.__getstate__())  # type: ignore[misc]
        return look()

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


def open_cache(
    path: str | Path,
    source: SourceSpec | None = None,
    maps: str | Path | None = None,
    copies: str | Path | None = None,
    sealed: bool = False,
) -> Cache:
    """Opens a cache read-only.

    Args:
        path: its folder, or `s3://bucket/prefix`.
        source: where the data set is now, if not where the manifest says.
        maps: of a Parquet cache: a folder on this machine in which shards are kept decoded.
        copies: of a remote cache: a folder on this machine in which files are kept as they are read.
        sealed: leave out what is being added to it just now.

    Raises:
        CacheError: there is none, or it cannot be trusted.
        SpecError: `maps` or `copies` for a cache that has no use for them.
    """
    return Cache(path, source, maps, copies, sealed)


__all__ = ["Cache", "CacheError", "open_cache"]
