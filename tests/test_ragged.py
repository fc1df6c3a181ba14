"""Rows of different lengths: the conversion, and what a reader finds in files that are sound and do not agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from teacher_cache.encodings import Part
from teacher_cache.errors import BuildError, CorruptionError, SpecError
from teacher_cache.storage import FileRecord, Grid, Group, crc32c, open_store
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.ragged import flatten, lengths_of, offsets_of, pad, places_of
from teacher_cache.storage.zarr_files import layout_of

KINDS = pytest.mark.parametrize("kind", ["zarr", "parquet"])
TOMBSTONE = 2**32 - 1
COUNT = Part("count", "uint32", ())


def group_of(cap: int, *dtypes: str) -> Group:
    """Ragged parts `a`, `b`, … and their count."""
    ragged = (Part(name, dtype, (cap,), ragged=True) for name, dtype in zip("abcd", dtypes, strict=False))
    return Group("teachers/t/logits/v0002", (*ragged, COUNT))


def columns_of(group: Group, counts: list[int], start: int = 1) -> dict[str, Any]:
    """Padded columns: the elements of each ragged part are start, start + 1, …, one row after the other."""
    count = np.array(counts, np.uint32)
    lengths = lengths_of(group, {"count": count})
    elements = np.arange(start, start + lengths.sum())
    padded = {part.name: pad(elements.astype(part.dtype), lengths, part) for part in group.ragged}
    return {**padded, "count": count}


class Written:
    """Files of one group in a folder, each with a record that is true of it, whatever it holds."""

    def __init__(self, root: Path, kind: Any, grid: Grid, group: Group) -> None:
        self.root, self.grid, self.group, self.store = root, grid, group, open_store(kind, grid)
        self.records: dict[str, FileRecord] = {}

    def write(self, record: FileRecord, data: bytes) -> None:
        path = self.root / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.records[record.path] = record

    def pack(self, columns: Mapping[str, Any], only: str = "", group: Group | None = None) -> None:
        """Packs columns and writes the files with `only` in their path."""
        for record, data in self.store.pack(group or self.group, 0, columns):
            if only in record.path:
                self.write(record, data)

    def gather(self, part: str, rows: list[int]) -> Any:
        reader = self.store.open_group(LocalRoot(self.root), self.group, lambda _: self.records)
        return reader.gather(part, np.array(rows, np.int64))

    def damage(self) -> list[CorruptionError]:
        return list(self.store.damage(LocalRoot(self.root), self.group, 0, self.records))


@st.composite
def padded_rows(draw: st.DrawFn) -> tuple[Part, Any, Any]:
    """A ragged part, the lengths of some rows, and the rows themselves, padded; elements may equal the fill."""
    cap = draw(st.integers(1, 7))
    part = Part("values", draw(st.sampled_from(["float16", "float32", "uint8", "uint16"])), (cap,), ragged=True)
    lengths = np.array(draw(st.lists(st.integers(0, cap), max_size=9)), np.int64)
    raw = np.random.Generator(np.random.Philox(draw(SEEDS))).bytes(len(lengths) * part.row_bytes)
    padded = np.frombuffer(raw, part.dtype).reshape(len(lengths), cap).copy()
    for row, length in enumerate(lengths):
        padded[row, length:] = part.fill
    return part, lengths, padded


@given(rows=padded_rows())
def test_flat_and_padded_are_opposites(rows: tuple[Part, Any, Any]) -> None:
    part, lengths, padded = rows
    flat = flatten(padded, lengths)
    assert flat.tobytes() == b"".join(row[:length].tobytes() for row, length in zip(padded, lengths, strict=True))
    again = pad(flat, lengths, part)
    assert again.dtype == part.dtype
    assert again.shape == padded.shape
    assert again.tobytes() == padded.tobytes()


@given(rows=padded_rows())
def test_offsets_are_where_rows_end(rows: tuple[Part, Any, Any]) -> None:
    """Row r is elements offsets[r − 1] to offsets[r]; its shard's first row begins at 0."""
    _, lengths, padded = rows
    offsets, flat = offsets_of(lengths), flatten(padded, lengths)
    assert offsets.dtype == np.uint32
    assert len(offsets) == len(lengths)
    for row, length in enumerate(lengths):
        start = int(offsets[row - 1]) if row else 0
        assert flat[start : int(offsets[row])].tobytes() == padded[row, :length].tobytes()


@given(rows=padded_rows(), data=st.data())
def test_any_rows_are_found_again(rows: tuple[Part, Any, Any], data: st.DataObject) -> None:
    """In any order, with repeats, and none."""
    part, lengths, padded = rows
    numbers = st.lists(st.integers(0, max(len(lengths) - 1, 0)), max_size=12 if len(lengths) else 0)
    chosen = np.array(data.draw(numbers), np.int64)
    starts = (offsets_of(lengths).astype(np.int64) - lengths)[chosen]
    places = places_of(starts, lengths[chosen])
    assert places.dtype == np.int64
    found = pad(flatten(padded, lengths)[places], lengths[chosen], part)
    assert found.tobytes() == padded[chosen].tobytes()


class TestDeclarations:
    """What cannot be is refused at birth, or before a byte is written."""

    def test_a_ragged_part_has_one_dimension(self) -> None:
        for shape in [(), (2, 3), (0,)]:
            with pytest.raises(ValueError, match=r"must be \(cap,\)"):
                Part("values", "float16", shape, ragged=True)

    @pytest.mark.parametrize(
        "count", [(), (Part("count", "uint16", ()),), (Part("count", "uint32", (1,)),), 2 * (COUNT,)]
    )
    def test_ragged_parts_have_one_count(self, count: tuple[Part, ...]) -> None:
        with pytest.raises(ValueError, match="need one part `count`"):
            Group("g", (Part("values", "float16", (3,), ragged=True), *count))

    def test_ragged_parts_have_one_shape_and_the_name_of_offsets_is_taken(self) -> None:
        values = Part("values", "float16", (3,), ragged=True)
        with pytest.raises(ValueError, match="one shape"):
            Group("g", (values, Part("indices", "uint8", (4,), ragged=True), COUNT))
        with pytest.raises(ValueError, match="`offsets` is taken"):
            Group("g", (values, COUNT, Part("offsets", "uint8", ())))

    def test_a_group_without_ragged_parts_may_use_the_names(self, tmp_path: Path) -> None:
        """`count` and `offsets` mean nothing where no part is ragged."""
        group = Group("g", (COUNT, Part("offsets", "uint8", ())))
        for kind in ("zarr", "parquet"):
            written = Written(tmp_path / kind, kind, Grid(2, 2, 1), group)
            written.pack({"count": np.array([7, TOMBSTONE], np.uint32), "offsets": np.array([9, 1], np.uint8)})
            assert written.gather("count", [1, 0]).tolist() == [TOMBSTONE, 7]
            assert written.gather("offsets", [0]).tolist() == [9]

    @KINDS
    def test_shards_of_more_than_uint32_elements_are_refused(self, kind: Any) -> None:
        """Before anything is allocated, by the metadata of a build that begins and by packing."""
        group = group_of(2**16, "float16")
        columns = {"a": np.empty((0, 2**16), np.float16), "count": np.empty(0, np.uint32)}
        large, fits = (open_store(kind, Grid(rows, rows, 1)) for rows in (2**16, 2**16 - 1))
        with pytest.raises(SpecError, match=r"store\.shard_rows: times 65536"):
            large.metadata([group])
        with pytest.raises(SpecError, match=r"store\.shard_rows: times 65536"):
            large.pack(group, 0, columns)
        fits.metadata([group])
        with pytest.raises(SpecError):
            # The largest number stands for what nobody wrote, so it is no offset.
            open_store(kind, Grid(1, 1, 1)).metadata([group_of(2**32 - 1, "uint8")])

    @KINDS
    def test_a_row_with_more_than_its_places_is_refused(self, kind: Any) -> None:
        group = group_of(2, "uint8")
        columns = {"a": np.zeros((2, 2), np.uint8), "count": np.array([2, 3], np.uint32)}
        with pytest.raises(BuildError, match=r"v0002/count: must be at most 2, the places of a row \(found: 3\)"):
            open_store(kind, Grid(2, 2, 1)).pack(group, 0, columns)


@KINDS
def test_rows_come_back_padded(kind: Any, tmp_path: Path) -> None:
    """Known answers: empty and full rows, a tombstone, any order, repeats, no rows at all."""
    group = group_of(3, "uint8", "float32")
    written = Written(tmp_path, kind, Grid(5, 5, 1), group)
    written.pack(columns_of(group, [2, 0, TOMBSTONE, 3, 1]))
    assert written.gather("count", [0, 1, 2, 3, 4]).tolist() == [2, 0, 0, 3, 1]
    assert written.gather("count", [3]).dtype == np.uint32
    assert written.gather("a", [3, 2, 0, 3]).tolist() == [[3, 4, 5], [255] * 3, [1, 2, 255], [3, 4, 5]]
    assert written.gather("a", []).shape == (0, 3)
    nan = np.nan
    np.testing.assert_array_equal(written.gather("b", [4, 1]), np.array([[6, nan, nan], [nan] * 3], np.float32))


@KINDS
def test_what_is_beyond_a_row_is_not_stored(kind: Any) -> None:
    """Padding leaves no trace: rows cost what they hold."""
    group, grid = group_of(1000, "float32"), Grid(4, 4, 1)
    store = open_store(kind, grid)
    plain = columns_of(group, [1, 2, 0, 1])
    other = {**plain, "a": np.where(np.isnan(plain["a"]), 5, plain["a"])}
    assert store.pack(group, 0, plain) == store.pack(group, 0, other)
    sizes = [sum(len(data) for _, data in store.pack(group, 0, columns_of(group, [n] * 4))) for n in (0, 1000)]
    assert sizes[0] < 3000
    assert sizes[1] >= sizes[0] + 16_000


@KINDS
def test_a_shard_without_an_element(kind: Any, tmp_path: Path) -> None:
    """Of tombstones and empty rows only: Zarr's flat files are an index."""
    group, grid = group_of(3, "uint16"), Grid(3, 4, 2)
    written = Written(tmp_path, kind, grid, group)
    written.pack(columns_of(group, [0, TOMBSTONE, 0]))
    assert written.damage() == []
    assert written.gather("a", [0, 1, 2, 2]).tolist() == [[65_535] * 3] * 4
    assert written.gather("count", [2, 1]).tolist() == [0, 0]
    if kind == "zarr":
        flat = (tmp_path / group.path.join(["data/", "/a/c/0"])).read_bytes()
        assert flat == b"\xff" * 32 + crc32c(b"\xff" * 32).to_bytes(4, "little")


def test_a_zarr_file_has_the_chunks_that_hold_something(tmp_path: Path) -> None:
    """4,096 elements in a chunk at the most, and the capacity of a shard rounded up to whole ones."""
    group, grid = group_of(3000, "uint32"), Grid(8, 4, 2)
    index = -(-4 * 3000 // 4096) * 16 + 4
    for counts, chunks in [([1, 0, 0, 0], 1), ([3000, 1096, 0, 0], 1), ([3000, 1097, 0, 0], 2), ([3000] * 4, 3)]:
        written = Written(tmp_path / str(sum(counts)), "zarr", grid, group)
        written.pack(columns_of(group, counts))
        assert written.records[f"data/{group.path}/a/c/0"].size == chunks * (4096 * 4 + 4) + index
        assert written.damage() == []
        assert written.gather("a", [1])[0, : counts[1]].tolist() == list(range(counts[0] + 1, sum(counts[:2]) + 1))
        assert (written.gather("a", [1])[0, counts[1] :] == TOMBSTONE).all()


@given(place=st.integers(0, 11), row=st.integers(0, 3))
def test_zarr_checks_the_chunks_that_are_read(place: int, row: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A flip in a chunk is found by rows with elements in it, and leaves the other rows readable."""
    group, grid = group_of(4, "uint8"), Grid(4, 4, 1)
    written = Written(tmp_path_factory.mktemp("flip"), "zarr", grid, group)
    columns = columns_of(group, [4, 2, 3, 1])
    written.pack(columns)
    path = written.root / f"data/{group.path}/a/c/0"
    changed = bytearray(path.read_bytes())
    changed[place // 4 * 8 + place % 4] ^= 1
    path.write_bytes(changed)
    touched = {0: {0}, 1: {1}, 2: {1, 2}, 3: {2}}[row]
    if place // 4 in touched:
        with pytest.raises(CorruptionError, match=f"a/c/0: chunk {place // 4} must have crc32c"):
            written.gather("a", [row])
    else:
        assert (written.gather("a", [row]) == columns["a"][[row]]).all()
    assert [error.field for error in written.damage()] == [f"data/{group.path}/a/c/0"]


def test_a_shorter_zarr_file_with_the_same_first_chunks_is_another(tmp_path: Path) -> None:
    """The digest binds how many chunks there are: a whole file that is cut at a chunk, index and all, is refused."""
    group, grid = group_of(4, "uint8"), Grid(4, 4, 1)
    written = Written(tmp_path, "zarr", grid, group)
    written.pack(columns_of(group, [4, 4, 0, 0]), "/a/")
    (path, short), shorter = next(iter(written.records.items())), (tmp_path / f"data/{group.path}/a/c/0").read_bytes()
    written.pack(columns_of(group, [4, 4, 4, 0]))
    whole = written.records[path]
    longer = (tmp_path / path).read_bytes()
    assert longer[:16] == shorter[:16]
    assert short.digest != whole.digest
    (tmp_path / path).write_bytes(shorter)
    for record in (whole, FileRecord(path, short.size, whole.digest)):
        written.records[path] = record
        assert [error.field for error in written.damage()] == [path]
        with pytest.raises(CorruptionError):
            written.gather("a", [0])


@pytest.mark.parametrize("ragged", [False, True])
def test_a_zarr_files_size_tells_its_chunks(ragged: bool, tmp_path: Path) -> None:
    """Of all sizes only those that a shard can have; and the file has the one that its receipt says."""
    group = group_of(3, "uint8") if ragged else Group("g", (Part("a", "uint8", (3,)),))
    layout = layout_of(group.parts[0], Grid(6, 6, 2))
    sizes = {chunks * (6 + 4) + 3 * 16 + 4: chunks for chunks in (range(4) if ragged else [3])}
    assert {size: found for size in range(200) if (found := layout.present(size)) is not None} == sizes
    written = Written(tmp_path, "zarr", Grid(6, 6, 2), group)
    written.pack(columns_of(group, [3] * 6) if ragged else {"a": np.zeros((6, 3), np.uint8)})
    path = written.store.paths(group, 0)[0]
    record = written.records[path]
    written.records[path] = FileRecord(path, record.size - 10, record.digest)
    with pytest.raises(CorruptionError, match=rf"must have {record.size - 10} bytes \(found: {record.size}\)"):
        written.gather("a", [0])


class TestDisagreement:
    """Files that are sound, each in its place, and do not belong together: a writer's fault, never read."""

    @pytest.mark.parametrize("offsets", [[2, 1, 4, 4], [2, 6, 6, 6], [2, 4, 4, TOMBSTONE], [4, 4, 4, 4]])
    def test_zarr_offsets_that_do_not_rise_as_they_must(self, offsets: list[int], tmp_path: Path) -> None:
        group = group_of(3, "uint8")
        written = Written(tmp_path, "zarr", Grid(4, 4, 2), group)
        written.pack(columns_of(group, [2, 2, 0, 0]), "/a/")
        alone = Group(group.path, (Part("offsets", "uint32", ()),))
        written.pack({"offsets": np.array(offsets, np.uint32)}, group=alone)
        place = f"data/{group.path}/offsets/c/0"
        for part in ("a", "count"):
            with pytest.raises(CorruptionError, match=f"{place}: must rise by 0 to 3 from row to row"):
                written.gather(part, [0, 1, 2, 3])
        assert [error.field for error in written.damage()] == [place]

    @pytest.mark.parametrize("offsets", [[1] * 4, [4, 8, 9, 9], [4, 8, 12, 16]])
    def test_zarr_elements_that_offsets_do_not_tell_of(self, offsets: list[int], tmp_path: Path) -> None:
        """Of two chunks there are elements for 5 to 8."""
        group = group_of(4, "uint8", "uint16")
        written = Written(tmp_path, "zarr", Grid(4, 4, 1), group)
        written.pack(columns_of(group, [4, 4, 0, 0]), "/b/")
        counts = np.diff([0, *offsets]).tolist()
        written.pack(columns_of(group, counts), "/a/")
        written.pack(columns_of(group, counts), "/offsets/")
        assert (written.gather("a", [2]) == columns_of(group, counts)["a"][[2]]).all()
        (error,) = written.damage()
        assert error.field == f"data/{group.path}/b/c/0"
        if offsets[-1] > 8:
            with pytest.raises(CorruptionError, match="b/c/0: must hold the"):
                written.gather("b", [0, 3, 2])

    @staticmethod
    def parquet(root: Path, group: Group, values: Mapping[str, list[bytes]], kind: Any) -> Written:
        """A file of some values, with a record that is true of it."""
        rows = len(next(iter(values.values())))
        written = Written(root, "parquet", Grid(rows, rows, 1), group)
        (path,) = written.store.paths(group, 0)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({name: pa.array(column, kind) for name, column in values.items()}), sink)
        data = sink.getvalue().to_pybytes()
        written.write(FileRecord(path, len(data), f"{crc32c(path.encode() + data):08x}"), data)
        return written

    @pytest.mark.parametrize(
        ("values", "rule"),
        [
            ({"a": [b"12", b""], "b": [b"1234", b"12"]}, r"a, b must have as many elements in a row.*row 1"),
            ({"a": [b"12", b"1"], "b": [b"1234", b"1"]}, "b must have up to 2 elements of 2 bytes in a row"),
            ({"a": [b"123", b"1"], "b": [b"123456", b"12"]}, "a must have up to 2 elements of 1 bytes in a row"),
        ],
    )
    def test_parquet_lengths(self, values: dict[str, list[bytes]], rule: str, tmp_path: Path) -> None:
        group = group_of(2, "uint8", "uint16")
        written = self.parquet(tmp_path, group, values, pa.large_binary())
        for part in ("a", "b", "count"):
            with pytest.raises(CorruptionError, match=rf"000000\.parquet: {rule}"):
                written.gather(part, [0])
        assert len(written.damage()) == 1

    @pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
    def test_parquet_columns_of_another_writer(self, kind: Any, tmp_path: Path) -> None:
        """Arrow's two variable binary types are one in Parquet: both are read."""
        group = group_of(2, "uint8", "uint16")
        values = {"a": [b"\1\2", b"", b"\3"], "b": [b"\1\0\2\0", b"", b"\3\0"]}
        written = self.parquet(tmp_path, group, values, kind)
        assert written.gather("count", [2, 1, 0]).tolist() == [1, 0, 2]
        assert written.gather("a", [2, 0]).tolist() == [[3, 255], [1, 2]]
        assert written.gather("b", [2, 0]).tolist() == [[3, 65_535], [1, 2]]
