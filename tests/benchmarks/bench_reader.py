"""Reading and writing shards at memory speed: random batches, whole scans, commits, and what verification costs.

    python tests/benchmarks/bench_reader.py [--json]

The same rows lie in a NumPy file (the limit: one memory map, nothing verified), in our Zarr shards and in our Parquet
shards; our Zarr shards are read by this project's reader, by tensorstore and by zarr-python. All of it is in the page
cache. What is compared is timed in turns within one run; a figure is the median over the rounds, a ratio the median
of the rounds' ratios. Needs the extra `bench`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import zarr
from bench_views import Rows, in_turns, ratio, run
from numpy.typing import NDArray

from teacher_cache.encodings import Part
from teacher_cache.storage import FileRecord, Grid, Group, GroupReader, Store, open_store, write_atomic, write_together
from teacher_cache.storage.local_root import LocalRoot

ROWS, BATCH = 65_536, 256
GRID = Grid(ROWS, 1024, 256)
CASES: dict[str, tuple[Part, ...]] = {
    "1,000 × float16": (Part("values", "float16", (1000,)),),
    "top-k 10": (Part("values", "float16", (10,)), Part("indices", "uint16", (10,))),
    "512 × float32": (Part("values", "float32", (512,)),),
}
Work = Callable[[], object]


class Written:
    """One group of random rows, in every form that is compared."""

    def __init__(self, root: Path, parts: tuple[Part, ...]) -> None:
        self.root, self.group = root, Group("teachers/t/logits/v0000", parts)
        drawn = np.random.Generator(np.random.Philox(1))
        self.columns = {part.name: _random(drawn, part) for part in parts}
        for name, values in self.columns.items():
            np.save(root / f"{name}.npy", values)
        self.stores: dict[str, Store] = {kind: open_store(kind, GRID) for kind in ("zarr", "parquet")}  # type: ignore[arg-type]
        self.records: dict[str, dict[str, FileRecord]] = {"zarr": {}, "parquet": {}}
        for kind, store in self.stores.items():
            for name, data in store.metadata([self.group]).items():
                write_atomic(root / kind, name, data)
            for shard in range(GRID.shards):
                for record, data in self.packed(kind, shard):
                    write_atomic(root / kind, record.path, data)
                    self.records[kind][record.path] = record

    def packed(self, kind: str, shard: int, name: int | None = None) -> list[tuple[FileRecord, bytes]]:
        """The files of a shard's rows, under its own number or another."""
        start, stop = GRID.span(shard)
        rows = {n: v[start:stop] for n, v in self.columns.items()}
        return self.stores[kind].pack(self.group, shard if name is None else name, rows)

    def reader(self, kind: str = "zarr") -> GroupReader:
        return self.stores[kind].open_group(LocalRoot(self.root / kind), self.group, lambda _: self.records[kind])

    @property
    def row_bytes(self) -> int:
        return sum(part.row_bytes for part in self.group.parts)


def _random(drawn: np.random.Generator, part: Part) -> NDArray[Any]:
    raw = drawn.integers(0, 256, (ROWS, part.row_bytes), np.uint8)
    return raw.view(part.dtype).reshape(ROWS, *part.shape)


def batches() -> Iterator[NDArray[np.int64]]:
    drawn = np.random.Generator(np.random.Philox(2))
    return cycle([drawn.integers(0, ROWS, BATCH) for _ in range(64)])


def gather(name: str, parts: tuple[Part, ...], rounds: int) -> Rows:
    """Random batches of 256 rows."""
    with tempfile.TemporaryDirectory() as folder:
        written = Written(Path(folder), parts)
        works = _gatherers(written)
        for label, work in works.items():
            _require_equal(written, label, work)
        rows = batches()
        seconds = in_turns(rounds, *(partial(_next, work, rows) for work in works.values()))
    found: Rows = {}
    limit = seconds[0]
    for label, each in zip(works, seconds, strict=True):
        rate = BATCH / statistics.median(each)
        speed = f"{rate / 1e3:,.0f} k rows/s, {rate * written.row_bytes / 1e9:.2f} GB/s"
        found[f"gather {name}: {label}"] = f"{speed}, {ratio(limit, each):.3f} of the map"
    return found


def _next(work: Callable[[NDArray[np.int64]], object], rows: Iterator[NDArray[np.int64]]) -> object:
    return work(next(rows))


def _require_equal(written: Written, label: str, work: Callable[[NDArray[np.int64]], Any]) -> None:
    rows = np.random.Generator(np.random.Philox(3)).integers(0, ROWS, BATCH)
    for part, found in zip(written.group.parts, work(rows), strict=True):
        same = np.ascontiguousarray(found).tobytes() == written.columns[part.name][rows].tobytes()
        assert same, f"{label} reads other rows"


def _gatherers(written: Written) -> dict[str, Callable[[NDArray[np.int64]], Any]]:
    root, parts = written.root, written.group.parts
    maps = [np.load(root / f"{part.name}.npy", mmap_mode="r") for part in parts]
    reader = written.reader()
    ready = {part.name: np.empty((BATCH, *part.shape), part.dtype) for part in parts}
    zarrs = [zarr.open_array(str(root / "zarr/data" / written.group.path / part.name), mode="r") for part in parts]
    stores = [_tensorstore(root / "zarr/data" / written.group.path / part.name) for part in parts]
    loaded = written.reader("parquet")
    files = [pq.ParquetFile(root / "parquet" / path) for path in written.records["parquet"]]
    return {
        "NumPy memory map": lambda rows: [array[rows] for array in maps],
        "ours": lambda rows: [reader.gather(part.name, rows) for part in parts],
        "ours, into ready memory": lambda rows: [reader.gather(part.name, rows, ready[part.name]) for part in parts],
        "ours, Parquet": lambda rows: [loaded.gather(part.name, rows) for part in parts],
        "tensorstore": lambda rows: [store[rows].read().result() for store in stores],
        "zarr-python": lambda rows: [array.oindex[rows] for array in zarrs],
        "pyarrow": lambda rows: _by_pyarrow(files, parts, rows),
    }


def _tensorstore(path: Path) -> Any:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result()


def _by_pyarrow(files: list[pq.ParquetFile], parts: tuple[Part, ...], rows: NDArray[np.int64]) -> list[NDArray[Any]]:
    shards, inside = np.divmod(rows, GRID.shard_rows)
    found = [np.empty((len(rows), *part.shape), part.dtype) for part in parts]
    for shard in np.unique(shards):
        places = np.flatnonzero(shards == shard)
        table = files[shard].read(columns=[part.name for part in parts])
        for part, out in zip(parts, found, strict=True):
            data = table[part.name].combine_chunks().buffers()[1]
            whole = np.frombuffer(data, part.dtype).reshape(-1, *part.shape)
            out[places] = whole[inside[places]]
    return found


def scan(name: str, parts: tuple[Part, ...], rounds: int) -> Rows:
    """A whole view, 16,384 row numbers at a time: the map's slices copied, its rows by the same numbers, and ours."""
    with tempfile.TemporaryDirectory() as folder:
        written = Written(Path(folder), parts)
        maps = [np.load(written.root / f"{part.name}.npy", mmap_mode="r") for part in parts]
        spans = np.arange(ROWS).reshape(-1, 16_384)
        # One row of each chunk: every file is opened and every chunk verified, and almost nothing is copied.
        firsts = np.arange(0, ROWS, GRID.chunk_rows)

        def whole(opened: GroupReader) -> None:
            for span in spans:
                for part in parts:
                    opened.gather(part.name, span)

        def mapped(numbers: bool) -> None:
            for span in spans:
                for array in maps:
                    # A slice of a map is a view until it is copied; an index is a copy already.
                    array[span] if numbers else array[span[0] : span[-1] + 1].copy()

        def touched(opened: GroupReader) -> None:
            for part in parts:
                opened.gather(part.name, firsts)

        reader = written.reader()
        works: tuple[Work, ...] = (
            lambda: mapped(numbers=False),
            lambda: mapped(numbers=True),
            lambda: whole(reader),
            lambda: whole(written.reader()),
            lambda: touched(written.reader()),
        )
        limit, numbered, ours, fresh, first = in_turns(rounds, *works)
    size = ROWS * written.row_bytes / 1e9
    found = {"NumPy memory map, slices": limit, "NumPy memory map, row numbers": numbered, "ours": ours}
    found |= {"ours, opened and verified": fresh, "ours, opened and verified, nothing copied": first}
    return {
        f"scan {name}: {label}": f"{size / statistics.median(each):.2f} GB/s, {ratio(limit, each):.2f} of the slices"
        for label, each in found.items()
    }


def write(name: str, parts: tuple[Part, ...], rounds: int) -> Rows:
    """One shard, each time a new one: pack, write, fsync, rename, sync folders; against `np.save` and fsync."""
    with tempfile.TemporaryDirectory() as folder:
        written, numbers = Written(Path(folder), parts), count()

        def save() -> None:
            for part in parts:
                with (written.root / f"{next(numbers)}.npy").open("xb") as file:
                    np.save(file, written.columns[part.name][: GRID.shard_rows])
                    file.flush()
                    os.fsync(file.fileno())

        def apart() -> None:
            for record, data in written.packed("zarr", 0, next(numbers)):
                write_atomic(written.root / "apart", record.path, data)

        def commit(kind: str) -> None:
            packed = written.packed(kind, 0, next(numbers))
            write_together(written.root / "again", ((record.path, data) for record, data in packed))

        works: tuple[Work, ...] = (save, lambda: commit("zarr"), apart, lambda: commit("parquet"))
        plain, *ours = in_turns(rounds, *works)
    found = {f"write {name}: np.save and fsync": f"{statistics.median(plain) * 1e3:.2f} ms a shard"}
    for label, each in zip(("Zarr", "Zarr, file by file", "Parquet"), ours, strict=True):
        found[f"write {name}: {label}"] = (
            f"{statistics.median(each) * 1e3:.2f} ms, {ratio(plain, each):.2f} of its speed"
        )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = (gather, scan, write)
    run((partial(step, name, parts) for step in steps for name, parts in CASES.items()), __doc__)
