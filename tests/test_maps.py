"""Reading at memory speed: one region for all shards, safe across processes, bounded, into memory that is there."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_builds import ROWS, expected_logits, toy_spec, tree

import teacher_cache as tc
from teacher_cache.encodings import Part
from teacher_cache.errors import CacheError, CorruptionError, SpecError
from teacher_cache.storage import FileRecord, Grid, Group, open_store, write_atomic
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.region import Region
from teacher_cache.storage.runs import copy_bytes, runs_of

KINDS = pytest.mark.parametrize("kind", ["zarr", "parquet"])


@pytest.fixture(scope="module")
def caches(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("maps")
    for kind in ("zarr", "parquet"):
        tc.build(toy_spec(root / kind, arrays, store__kind=kind), executor="serial")
    return {kind: root / kind for kind in ("zarr", "parquet")}


def opened(caches: dict[str, Path], kind: str, maps: Path) -> tc.Cache:
    return tc.open(caches[kind], maps=maps if kind == "parquet" else None)


class TestRegion:
    """Files at their places in one stretch of addresses."""

    def test_files_are_where_they_were_placed(self, tmp_path: Path) -> None:
        """Each slot shows its own file, in whatever order they come; clearing and placing again shows another."""
        region = Region(5, 10_000)
        assert region.slot_bytes % os.sysconf("SC_PAGE_SIZE") == 0
        for slot in (3, 0, 4):
            path = tmp_path / str(slot)
            path.write_bytes(bytes([slot]) * (9_000 + slot))
            with path.open("rb") as file:
                assert bytes(region.place(slot, file.fileno(), 9_000 + slot)) == path.read_bytes()
        assert bytes(region.bytes[3 * region.slot_bytes :][:9_003]) == bytes([3]) * 9_003
        region.clear()
        with (tmp_path / "4").open("rb") as file:
            region.place(0, file.fileno(), 9_004)
        assert region.bytes[0] == 4

    def test_addresses_are_given_back(self) -> None:
        """Ten thousand regions of a tebibyte need what one needs."""
        for _ in range(10_000):
            Region(2**10, 2**30)

    def test_no_file_stays_open(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x" * 100)
        region, before = Region(1, 100), len(os.listdir("/dev/fd"))  # noqa: PTH208 - counts, no names
        with (tmp_path / "file").open("rb") as file:
            region.place(0, file.fileno(), 100)
        assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208
        assert region.bytes[99] == ord("x")


@given(
    chunk=st.integers(1, 9),
    chunks=st.integers(1, 4),
    shape=st.sampled_from([(), (1,), (3,), (130,), (7, 19)]),
    dtype=st.sampled_from(["float16", "uint8", "uint64", "float32"]),
    data=st.data(),
)
def test_any_batch_is_the_array_indexed(
    chunk: int, chunks: int, shape: tuple[int, ...], dtype: str, data: st.DataObject, tmp_path_factory: Any
) -> None:
    """Random rows, runs across chunks and shards, single rows, none: NumPy's own indexing, long rows and short."""
    grid = Grid(chunk * chunks * 3 - 1, chunk * chunks, chunk)
    part = Part("values", dtype, shape)
    group, store = Group("views/v0000", (part,)), open_store("zarr", grid)
    raw = np.random.Generator(np.random.Philox(data.draw(st.integers(0, 99)))).bytes(grid.rows * part.row_bytes)
    values = np.frombuffer(raw, dtype).reshape(grid.rows, *shape)
    root, records = tmp_path_factory.mktemp("array"), {}
    for shard in range(grid.shards):
        start, stop = grid.span(shard)
        for record, file in store.pack(group, shard, {"values": values[start:stop]}):
            write_atomic(root, record.path, file)
            records[record.path] = record
    reader = store.open_group(LocalRoot(root), group, lambda _: records)
    row = st.integers(0, grid.rows - 1)
    for _ in range(3):
        first = data.draw(row)
        for rows in (data.draw(st.lists(row, max_size=9)), list(range(first, grid.rows)), [first], []):
            wanted = np.array(rows, np.int64)
            ready = np.empty((len(rows), *shape), dtype)
            assert reader.gather("values", wanted).tobytes() == values[wanted].tobytes()
            assert reader.gather("values", wanted, ready) is ready
            assert ready.tobytes() == values[wanted].tobytes()


class Runs:
    """Rows in three shards, of which stretches of 4 rows count as long, so that small cases take every way."""

    grid, part = Grid(68, 24, 6), Part("values", "uint16", (5,))
    group = Group("views/v0000", (part,))

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, open_store("zarr", self.grid)
        self.values = np.arange(self.grid.rows * 5, dtype=np.uint16).reshape(-1, 5)
        self.records: dict[str, FileRecord] = {}
        for shard in range(self.grid.shards):
            start, stop = self.grid.span(shard)
            for record, file in self.store.pack(self.group, shard, {"values": self.values[start:stop]}):
                write_atomic(root, record.path, file)
                self.records[record.path] = record
        self.reader = self.store.open_group(LocalRoot(root), self.group, lambda _: self.records)

    def gather(self, rows: list[int]) -> bytes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("teacher_cache.storage.runs._LONG_RUN", 4)
            return self.reader.gather("values", np.array(rows, np.int64)).tobytes()


STRETCHES = st.lists(
    st.tuples(st.integers(0, 67), st.integers(1, 68), st.sampled_from([1, 1, 1, -1, 2, 0])), max_size=6
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@given(stretches=STRETCHES)
def test_any_mix_of_stretches_is_the_array_indexed(runs: Runs, stretches: list[tuple[int, int, int]]) -> None:
    """Stretches that rise, fall, skip or repeat rows, one after the other, across chunks and shards."""
    rows = [first + step * place for first, length, step in stretches for place in range(length)]
    rows = [row for row in rows if 0 <= row < runs.grid.rows]
    assert runs.gather(rows) == runs.values[np.array(rows, np.int64)].tobytes()


@given(places=st.lists(st.integers(-3, 12), min_size=1, max_size=12))
def test_runs_are_stretches_that_rise_by_one(places: list[int]) -> None:
    """What is not one stretch is never taken for one, whatever its ends; and stretches are cut where they break."""
    given_N = np.array(places, np.int64)
    rises = places == list(range(places[0], places[0] + len(places)))
    assert (runs_of(given_N) == [0, len(places)]) == rises
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacher_cache.storage.runs._LONG_RUN", 1)
        found = runs_of(given_N)
    if found is not None:
        breaks = [place for place in range(1, len(places)) if places[place] != places[place - 1] + 1]
        assert found == [0, *breaks, len(places)]


@given(first=st.integers(0, 60), length=st.integers(1, 67), shard=st.integers(0, 2), place=st.integers(0, 255))
def test_a_flip_in_what_a_scan_touches_is_found(
    first: int, length: int, shard: int, place: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each time it is read, by the rows of its chunk; the rows of other chunks are given out."""
    runs = Runs(tmp_path_factory.mktemp("flip"))
    path = runs.root / f"data/views/v0000/values/c/{shard}/0"
    changed = bytearray(path.read_bytes())
    # Four chunks of 60 bytes, each with a checksum that is left as it is.
    chunk, inside = divmod(place * 240 // 256, 60)
    changed[chunk * 64 + inside] ^= 1
    path.write_bytes(changed)
    rows = list(range(first, min(first + length, runs.grid.rows)))
    hit = {row // 6 for row in rows} & {shard * 4 + chunk}
    for _ in range(2):
        if hit:
            with pytest.raises(CorruptionError, match=f"c/{shard}/0: chunk {chunk} must have crc32c"):
                runs.gather(rows)
        else:
            assert runs.gather(rows) == runs.values[rows].tobytes()


def test_bytes_are_copied_wherever_they_lie() -> None:
    """Sources and targets at every distance within a word of each other, in blocks with gaps between them."""
    source = np.arange(20_000, dtype=np.uint32).view(np.uint8)
    for at in range(9):
        block = np.ndarray((2, 3, 4_097), np.uint8, source, at, (30_000, 4_101, 1))
        target = np.zeros((2, 3, 4_097), np.uint8)
        copy_bytes(target, block)
        assert (target == block).all()


@KINDS
def test_reading_into_memory_that_is_there(kind: str, caches: dict[str, Path], tmp_path: Path) -> None:
    """The target lies in the buffers, and the next read overwrites it."""
    cache = opened(caches, kind, tmp_path)
    ready = cache.buffers("logits", 5)
    for rows in ([3, 1, 20, 20, 0], [26, 2, 3, 4, 5]):
        target = cache.read("logits", 1, rows, out=ready)
        assert isinstance(target, tc.DenseTarget)
        assert target.values.data_ptr() == ready["values"].ctypes.data
        assert torch.equal(target.values, cache.read("logits", 1, rows).dense().values)  # type: ignore[union-attr]


def _child(cache: tc.Cache, rows: list[int], sink: Any) -> None:
    sink.put(cache.read("logits", 1, rows).dense().values.numpy())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("zarr", "fork"),
        ("parquet", "fork"),
        ("zarr", "spawn"),
        pytest.param("parquet", "spawn", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forked_and_spawned_workers_read(kind: str, method: str, caches: dict[str, Path], tmp_path: Path) -> None:
    """Rows that the parent has mapped, and rows that it has not; the parent reads on."""
    cache = opened(caches, kind, tmp_path)
    wanted = expected_logits(cache.render(1, range(ROWS)))
    cache.read("logits", 1, range(10))
    context = multiprocessing.get_context(method)
    sink = context.Queue()
    # A spawned one imports everything anew, for seconds.
    count = 2 if method == "fork" else 1
    workers = [context.Process(target=_child, args=(cache, list(range(ROWS)), sink)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert (sink.get(timeout=120) == wanted).all()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert (cache.read("logits", 1, range(ROWS)).dense().values.numpy() == wanted).all()  # type: ignore[union-attr]


class TestMapsOfParquet:
    """Shards that are kept decoded in a folder."""

    def test_they_are_made_once_and_used_by_all(self, caches: dict[str, Path], tmp_path: Path) -> None:
        wanted = tc.open(caches["parquet"]).read("logits", 0, range(ROWS)).dense().values  # type: ignore[union-attr]
        first = opened(caches, "parquet", tmp_path)
        assert not any(tmp_path.iterdir()), "opening makes nothing"
        assert torch.equal(first.read("logits", 0, range(ROWS)).dense().values, wanted)  # type: ignore[union-attr]
        made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert torch.equal(
            opened(caches, "parquet", tmp_path).read("logits", 0, range(ROWS)).dense().values,  # type: ignore[union-attr]
            wanted,
        )
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == made

    def test_the_cache_is_not_touched(self, caches: dict[str, Path], tmp_path: Path) -> None:
        before = tree(caches["parquet"])
        opened(caches, "parquet", tmp_path).read("feature:stem", 1, range(ROWS))
        assert tree(caches["parquet"]) == before

    def test_a_damaged_map_is_found(self, caches: dict[str, Path], tmp_path: Path) -> None:
        """A flipped bit in a map is never read; what says that a map is there is not trusted either."""
        wanted = opened(caches, "parquet", tmp_path).read("logits", 0, range(ROWS)).dense().values  # type: ignore[union-attr]
        (path,) = tmp_path.rglob("logits/v0000/values/c/0/0")
        data = bytearray(path.read_bytes())
        data[5] ^= 4
        path.write_bytes(bytes(data))
        with pytest.raises(CorruptionError, match="it is made again"):
            opened(caches, "parquet", tmp_path).read("logits", 0, range(ROWS))
        for record in tmp_path.rglob("*.json"):
            record.write_bytes(record.read_bytes()[:-9])
        again = opened(caches, "parquet", tmp_path).read("logits", 0, range(ROWS)).dense().values  # type: ignore[union-attr]
        assert torch.equal(again, wanted)

    def test_a_folder_that_cannot_be_written(self, caches: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CacheError, match="name another folder"):
            opened(caches, "parquet", tmp_path / "file").read("logits", 0, [0])

    def test_zarr_needs_none(self, caches: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="is for Parquet"):
            tc.open(caches["zarr"], maps=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the maps of the process")
def test_opening_is_lazy_and_bounded(caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is mapped before it is read, and no more than the limit after; a low limit of open files is no matter."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(caches["zarr"]))

    monkeypatch.setattr("teacher_cache.storage.zarr_groups._MOST_FILES", 3)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Caches of earlier tests are in cycles: their maps go when they are collected.
    gc.collect()
    cache = tc.open(caches["zarr"])
    assert mapped() == 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 8, before[1]))  # noqa: PTH208
    try:
        for view in (0, 1, 0):
            for row in range(ROWS):
                cache.read("logits", view, [row])
                cache.read("feature:stem", view, [row])
                assert mapped() <= 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
