"""A cache of any size as far as its structure goes: a real manifest, real tables, and real shards at both ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.addition import Addition, Extent, TableRef, Totals
from teacher_cache.manifest import Manifest, Segment, read_manifest, write_manifest
from teacher_cache.receipts import receipt_path
from teacher_cache.samples import write_content, write_samples
from teacher_cache.sources import Item, source_fingerprint
from teacher_cache.sources.base import Numbered
from teacher_cache.storage import FileRecord, Grid, Store, open_store
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.tables import write_table

LEFT_OUT = 7
"""Of the addition that is being built every so many shards are missing."""


@dataclass(frozen=True)
class Size:
    """How large a simulated cache is."""

    rows: int
    views: int
    shard_rows: int


class _Named:
    """A data set of which there are only the names."""

    class_names = None
    channels = None

    def __init__(self, rows: int) -> None:
        self.keys = Numbered("sample", rows)
        self.labels: NDArray[np.int64] | None = np.arange(rows, dtype=np.int64) % 10
        self.sizes = np.full(rows, 64, np.int64)

    def item(self, index: int) -> Item:
        raise NotImplementedError("there are no images")

    def __len__(self) -> int:
        return len(self.keys)


def simulate(path: Path, template: Path, size: Size) -> None:
    """Writes the structure of a cache with two teachers: the first one's answers sealed, the second one's being built.

    Args:
        path: where.
        template: a small Zarr cache with logits and labels; what it says of views, teacher and fields is taken over.
        size: of the cache to be written.
    """
    root, source = LocalRoot(path), _Named(size.rows)
    first = _first(read_manifest(LocalRoot(template)).first, source, size)
    content = np.arange(1, size.rows + 1, dtype=np.uint64)
    segment = Segment(
        rows=size.rows,
        source=first.identity.source,
        samples=write_samples(root, source, 0),
        content=write_content(root, content),
    )
    store = open_store("zarr", first.grid)
    ends = {(0, 0), (size.views - 1, first.grid.shards - 1)}
    ends |= {(0, first.grid.shards - 1), (size.views - 1, 0)}
    files = {place: list(_written(root, first, store, place)) for place in sorted(ends)}
    tables = tuple(_table(root, first, store, view, files) for view in first.view_numbers)
    for name, data in store.metadata(first.all_groups).items():
        root.write(name, data)
    second = _second(first)
    _write_receipts(path, second)
    write_manifest(root, Manifest(segments=(segment,), additions=(_sealed(first, tables), second)))


def _first(like: Addition, source: _Named, size: Size) -> Addition:
    extent = Extent(
        first_row=0, rows=size.rows, first_view=0, views=size.views, teacher="teacher", fields=("logits",), proof=True
    )
    identity = like.identity.model_copy(
        update={"source": source_fingerprint(source), "extent": extent.fingerprint, "store": "0" * 32}
    )
    changes = {
        "state": "building",
        "identity": identity,
        "extent": extent,
        "fields": {"logits": like.fields["logits"]},
        "field_shapes": {"logits": like.field_shapes["logits"]},
        "class_names": None,
        "store": like.store.model_copy(update={"shard_rows": size.shard_rows, "chunk_rows": size.shard_rows}),
        "receipts": (),
        "totals": None,
    }
    return _changed(like, changes)


def _second(first: Addition) -> Addition:
    extent = first.extent.model_copy(update={"teacher": "other", "proof": False})
    identity = first.identity.model_copy(update={"teacher": "1" * 32, "extent": extent.fingerprint})
    return _changed(first, {"identity": identity, "extent": extent})


def _changed(addition: Addition, changes: Mapping[str, Any]) -> Addition:
    """Made anew: a copy would keep what was derived of the fields that change."""
    return Addition(**{name: getattr(addition, name) for name in Addition.model_fields} | changes)


def _sealed(addition: Addition, tables: tuple[TableRef, ...]) -> Addition:
    totals = Totals(bytes=0, tombstones=0, labelled=0, correct=0, fidelity={"logits": {}})
    return addition.model_copy(update={"state": "sealed", "receipts": tables, "totals": totals})


def logits_of(first: int, count: int, classes: int) -> NDArray[np.float32]:
    """What the real shards hold: each row its own number, class by class."""
    return np.arange(first, first + count, dtype=np.float32)[:, None] + np.arange(classes, dtype=np.float32) / 16


def _written(root: LocalRoot, addition: Addition, store: Store, place: tuple[int, int]) -> Iterator[FileRecord]:
    view, shard = place
    start, stop = addition.span(shard)
    for group in addition.groups(view):
        columns = {part.name: np.full((stop - start, *part.shape), part.fill, part.dtype) for part in group.parts}
        if "values" in columns:
            columns["values"][:] = logits_of(start, stop - start, columns["values"].shape[1])
        for record, data in store.pack(group, shard, columns):
            root.write(record.path, data)
            yield record


def _table(
    root: LocalRoot, addition: Addition, store: Store, view: int, files: dict[tuple[int, int], list[FileRecord]]
) -> TableRef:
    shards = addition.grid.shards
    paths = [[p for group in addition.groups(view) for p in store.paths(group, shard)] for shard in range(shards)]
    each = len(paths[0])
    records = {record.path: record for (v, _), some in files.items() if v == view for record in some}
    words = np.random.Generator(np.random.Philox(view)).integers(0, 2**63, (shards * each, 2)).tolist()
    names = [path for some in paths for path in some]
    made_up = (FileRecord(name, 4096, f"{a:016x}{b:016x}") for name, (a, b) in zip(names, words, strict=True))
    found = [records.get(record.path, record) for record in made_up]
    columns = {
        "view": np.full(len(found), view),
        "shard": np.repeat(np.arange(shards), each),
        "path": names,
        "size": [record.size for record in found],
        "digest": [record.digest for record in found],
    }
    return write_table(root, "receipts", columns)


def _write_receipts(path: Path, addition: Addition) -> None:
    """Empty ones: whoever looks for what is left reads their names."""
    for view in addition.view_numbers:
        (path / receipt_path(view, 0)).parent.mkdir(parents=True)
        for shard in range(addition.grid.shards):
            if (view + shard) % LEFT_OUT:
                (path / receipt_path(view, shard)).touch()


def left_out(grid: Grid, views: int) -> set[tuple[int, int]]:
    """The (view, shard) that a simulated cache lacks."""
    return {(view, shard) for view in range(views) for shard in range(grid.shards) if (view + shard) % LEFT_OUT == 0}
