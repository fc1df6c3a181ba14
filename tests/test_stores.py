"""The laws of storage, one suite over every store."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, grids, parts, values_of

from teacher_cache.encodings import Part
from teacher_cache.errors import BuildError, CorruptionError
from teacher_cache.storage import (
    FileRecord,
    Grid,
    Group,
    GroupReader,
    Store,
    crc32c,
    open_store,
    write_atomic,
    write_together,
)
from teacher_cache.storage.files import make_folder
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.root import remove_unfinished

KINDS = pytest.mark.parametrize("kind", ["zarr", "parquet"])
RAGGED = pytest.mark.parametrize("ragged", [False, True], ids=["plain", "ragged"])
TOMBSTONE = 2**32 - 1
Packed = list[list[tuple[FileRecord, bytes]]]


@st.composite
def groups(draw: st.DrawFn, path: str = "teachers/t/logits/v0001") -> Group:
    """One part of any type and shape; or such a part beside two whose rows differ in length, and their count."""
    part = draw(parts())
    if draw(st.booleans()):
        return Group(path, (part,))
    # 2,100 elements a row are more than one chunk takes, so that chunks and rows are out of step.
    cap = draw(st.sampled_from([1, 2, 3, 5, 2100]))
    dtypes = st.sampled_from(["float16", "float32", "uint8", "uint16"])
    ragged = [Part(name, draw(dtypes), (cap,), ragged=True) for name in ("depths", "indices")]
    return Group(path, (ragged[0], Part("count", "uint32", ()), part, ragged[1]))


def columns_of(group: Group, rows: int, seed: int) -> dict[str, Any]:
    """Random rows as a build packs them: some ragged ones full, some empty, some of tombstones."""
    columns: dict[str, Any] = {part.name: values_of(part, rows, seed) for part in group.parts}
    if group.ragged:
        random = np.random.Generator(np.random.Philox(seed + 1))
        most = random.choice([0, 1, group.cap])
        count = random.integers(0, most + 1, rows, np.uint32)
        count[random.random(rows) < 0.2] = TOMBSTONE
        columns["count"] = count
        for part in group.ragged:
            columns[part.name] = filled(part, columns[part.name], read_back(columns)["count"])
    return columns


def filled(part: Part, values: Any, count: Any) -> Any:
    """The same rows with the fill value beyond their counts."""
    fill = np.array(part.fill, part.dtype)
    return np.stack(
        [np.append(row[:n], np.repeat(fill, part.shape[0] - n)) for row, n in zip(values, count, strict=True)]
    )


def read_back(columns: dict[str, Any]) -> dict[str, Any]:
    """What is gathered of packed columns: all of them as they were, but a tombstone's count is 0."""
    if "count" not in columns:
        return columns
    count = columns["count"]
    return {**columns, "count": np.where(count == TOMBSTONE, 0, count).astype(np.uint32)}


def read_from(kind: str, group: Group, path: str) -> list[str]:
    """The parts that cannot be read without a file."""
    if kind == "parquet":
        return [part.name for part in group.parts]
    array = path.split("/c/")[0].rpartition("/")[2]
    return ["count", *(part.name for part in group.ragged)] if array == "offsets" else [array]


def pack_all(store: Store, group: Group, grid: Grid, columns: dict[str, Any]) -> Packed:
    """Every shard of a group."""
    spans = [grid.span(shard) for shard in range(grid.shards)]
    cut = [{name: values[a:b] for name, values in columns.items()} for a, b in spans]
    return [store.pack(group, shard, rows) for shard, rows in enumerate(cut)]


@contextmanager
def written(store: Store, group: Group, packed: Packed) -> Iterator[Path]:
    """The packed files and the store's metadata in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in store.metadata([group]).items():
            write_atomic(Path(folder), name, data)
        for shard in packed:
            for record, data in shard:
                write_atomic(Path(folder), record.path, data)
        yield Path(folder)


def gather(store: Store, root: Path, group: Group, grid: Grid, packed: Packed, part: str, rows: Any) -> Any:
    """Rows of the whole array, all at once, and again one by one into an array that is there already."""
    reader = opened(store, root, group, packed)
    together = reader.gather(part, np.asarray(rows, np.int64))
    alone = np.empty_like(together)
    for place, row in enumerate(rows):
        assert reader.gather(part, np.array([row]), alone[place : place + 1]).base is not None
    assert alone.tobytes() == together.tobytes()
    return together


def opened(store: Store, root: Path, group: Group, packed: Packed) -> GroupReader:
    """A reader of what was written."""
    return store.open_group(LocalRoot(root), group, lambda shard: {record.path: record for record, _ in packed[shard]})


def small(kind: str, seed: int = 0, ragged: bool = False) -> tuple[Store, Group, Grid, Packed, dict[str, Any]]:
    """Two shards, the last with three rows of four, of two parts; with `ragged`, two more and their count."""
    grid = Grid(7, 4, 2)
    plain = (Part("digest", "uint64", ()), Part("params", "int32", (3,)))
    more = (Part("depths", "float16", (3,), True), Part("indices", "uint8", (3,), True), Part("count", "uint32", ()))
    group = Group("views/v0000", (*plain, *more) if ragged else plain)
    store = open_store(kind, grid)  # type: ignore[arg-type]
    columns = {part.name: values_of(part, grid.rows, seed) for part in group.parts}
    if ragged:
        # One chunk of two, and one that is full; with another seed two, and one that is not.
        counts = [[2, 0, TOMBSTONE, 3, 1, 3, 2], [3, 1, TOMBSTONE, 3, 2, 1, 0]]
        columns["count"] = np.array(counts[seed % 2], np.uint32)
        for part in group.ragged:
            columns[part.name] = filled(part, columns[part.name], read_back(columns)["count"])
    return store, group, grid, pack_all(store, group, grid, columns), columns


@KINDS
@given(grid=grids(), group=groups(), seed=SEEDS, data=st.data())
def test_what_is_packed_is_gathered(kind: Any, grid: Grid, group: Group, seed: int, data: st.DataObject) -> None:
    """Rows come back bit for bit, in the order asked for, repeats too, from ragged shards too."""
    store, columns = open_store(kind, grid), columns_of(group, grid.rows, seed)
    packed = pack_all(store, group, grid, columns)
    assert [r.path for shard in packed for r, _ in shard] == [
        path for shard in range(grid.shards) for path in store.paths(group, shard)
    ]
    rows = data.draw(st.lists(st.integers(0, grid.rows - 1), min_size=1, max_size=8))
    with written(store, group, packed) as root:
        for part in group.parts:
            found = gather(store, root, group, grid, packed, part.name, rows)
            assert found.dtype == part.dtype
            assert found.shape == (len(rows), *part.shape)
            assert found.tobytes() == read_back(columns)[part.name][rows].tobytes()
        for shard in range(grid.shards):
            start, stop = grid.span(shard)
            reader = opened(store, root, group, packed)
            some = start + np.array(data.draw(st.lists(st.integers(0, stop - start - 1), max_size=8)), np.int64)
            for name, values in read_back(columns).items():
                assert reader.gather(name, some).tobytes() == values[some].tobytes()
                reader.clear()
                assert reader.gather(name, some).tobytes() == values[some].tobytes()
            assert (
                list(store.damage(LocalRoot(root), group, shard, {record.path: record for record, _ in packed[shard]}))
                == []
            )


@KINDS
@given(grid=grids(), group=groups(), seed=SEEDS)
def test_packing_is_pure_and_records_tell_the_truth(kind: Any, grid: Grid, group: Group, seed: int) -> None:
    """Same arrays, same bytes; a record has the size of its file."""
    store, columns = open_store(kind, grid), columns_of(group, grid.rows, seed)
    first, second = (pack_all(store, group, grid, columns) for _ in range(2))
    assert first == second
    for record, data in (item for shard in first for item in shard):
        assert record.size == len(data)


def test_a_checksum_of_a_file_that_ends_with_its_own_checksum_is_none() -> None:
    """Why no receipt holds the CRC-32C of a whole shard: it is one constant, whatever the shard holds."""
    framed = [data + crc32c(data).to_bytes(4, "little") for data in (b"one", b"another", bytes(1000))]
    assert len({crc32c(data) for data in framed}) == 1


@KINDS
@RAGGED
def test_gathered_rows_are_copies(kind: str, ragged: bool) -> None:
    """Writing to what was gathered changes neither the file nor the next read."""
    store, group, grid, packed, columns = small(kind, ragged=ragged)
    with written(store, group, packed) as root:
        reader = opened(store, root, group, packed)
        for part in group.parts:
            row = columns[part.name][:1].tobytes()
            reader.gather(part.name, np.array([0]))[:] = 0
            assert reader.gather(part.name, np.array([0])).tobytes() == row
            assert gather(store, root, group, grid, packed, part.name, [0]).tobytes() == row


@given(grid=grids(), part=parts(), seed=SEEDS)
def test_zarr_itself_writes_the_same_bytes(grid: Grid, part: Part, seed: int) -> None:
    """Our shard files are, byte for byte, those that zarr-python writes for the same array.

    One difference is meant: of a ragged last shard zarr leaves out the chunks that lie wholly beyond the array,
    and we write them with the fill value, so that every shard of an array has one size and one index.
    """
    store, group = open_store("zarr", grid), Group("g/v0000", (part,))
    values = values_of(part, grid.rows, seed)
    packed = pack_all(store, group, grid, {"values": values})
    with written(store, group, []) as root:
        with zarr.config.set({"array.write_empty_chunks": True}):
            array = zarr.open_array(str(root / "data/g/v0000/values"), mode="r+")
            array[:] = values
        for number, [(record, data)] in enumerate(packed):
            start, stop = grid.span(number)
            used = -(-(stop - start) // grid.chunk_rows)
            theirs = (root / record.path).read_bytes()
            chunks = used * (grid.chunk_rows * part.row_bytes + 4)
            assert theirs[:chunks] == data[:chunks]
            if used == grid.shard_rows // grid.chunk_rows:
                assert theirs == data


@given(grid=grids(), group=groups().filter(lambda group: group.ragged), seed=SEEDS)
def test_zarr_itself_writes_the_same_ragged_bytes(grid: Grid, group: Group, seed: int) -> None:
    """Of the elements of a shard, written as whole chunks; chunks that hold nothing are left out by both."""
    store, columns = open_store("zarr", grid), columns_of(group, grid.rows, seed)
    packed = pack_all(store, group, grid, columns)
    files = {record.path: data for shard in packed for record, data in shard}
    with written(store, group, []) as root, zarr.config.set({"array.write_empty_chunks": True}):
        for part in group.ragged:
            array = zarr.open_array(str(root / f"data/{group.path}/{part.name}"), mode="r+")
            assert array.shards is not None
            for shard in range(grid.shards):
                start, stop = grid.span(shard)
                count = read_back(columns)["count"][start:stop]
                rows = [row[:n] for row, n in zip(columns[part.name][start:stop], count, strict=True)]
                elements = np.concatenate(rows)
                whole = -(-len(elements) // array.chunks[0]) * array.chunks[0]
                elements = np.append(elements, np.full(whole - len(elements), part.fill, part.dtype))
                path = f"data/{group.path}/{part.name}/c/{shard}"
                if whole:
                    array[shard * array.shards[0] : shard * array.shards[0] + whole] = elements
                    assert (root / path).read_bytes() == files[path]
                else:
                    assert files[path][:-4] == b"\xff" * (16 * (array.shards[0] // array.chunks[0]))


@given(grid=grids(), group=groups(), seed=SEEDS)
def test_plain_zarr_reads_the_rows(grid: Grid, group: Group, seed: int) -> None:
    """Without a line of ours: group, array, rows, and the attributes of the layout."""
    store, columns = open_store("zarr", grid), columns_of(group, grid.rows, seed)
    with written(store, group, pack_all(store, group, grid, columns)) as root:
        opened = zarr.open_group(str(root / "data"), mode="r")[group.path]
        assert isinstance(opened, zarr.Group)
        arrays = dict(opened.arrays())
        assert len(arrays) == len(group.parts)
        for part in group.parts:
            if part.ragged:
                rows = plain_ragged_rows(arrays["offsets"], arrays[part.name], grid)
                expected = zip(columns[part.name], read_back(columns)["count"], strict=True)
                assert [row.tobytes() for row in rows] == [row[:n].tobytes() for row, n in expected]
            elif not (group.ragged and part.name == "count"):
                array = arrays[part.name]
                assert array.shape == (grid.rows, *part.shape)
                assert np.asarray(array[:]).tobytes() == columns[part.name].tobytes()
                assert array.shards == (grid.shard_rows, *part.shape)
                assert array.chunks == (grid.chunk_rows, *part.shape)


def plain_ragged_rows(offsets: Any, values: Any, grid: Grid) -> list[Any]:
    """Every row of a ragged part, as the page on the format says."""
    (capacity,), (chunk,), (cap_shards,) = values.shards, values.chunks, values.shape
    assert offsets.shape == (grid.rows,)
    assert (offsets.shards, offsets.chunks) == ((grid.shard_rows,), (grid.chunk_rows,))
    assert chunk <= 4096
    assert cap_shards == grid.shards * capacity
    rows, ends = [], offsets[:].tolist()
    for row, end in enumerate(ends):
        shard, inside = divmod(row, grid.shard_rows)
        start = ends[row - 1] if inside else 0
        rows.append(np.asarray(values[shard * capacity + start : shard * capacity + end]))
    return rows


@given(grid=grids(), group=groups(), seed=SEEDS)
def test_plain_pyarrow_reads_the_rows(grid: Grid, group: Group, seed: int) -> None:
    """With the documented decoding: `frombuffer` of a value, dtype and shape from the field's metadata."""
    store, columns = open_store("parquet", grid), columns_of(group, grid.rows, seed)
    stored = [part for part in group.parts if not (group.ragged and part.name == "count")]
    packed = pack_all(store, group, grid, columns)
    with written(store, group, packed) as root:
        paths = [root / record.path for shard in packed for record, _ in shard]
        rows: dict[str, list[bytes]] = {part.name: [] for part in stored}
        for path, shard in zip(paths, range(grid.shards), strict=True):
            file = pq.ParquetFile(path, page_checksum_verification=True)
            assert file.num_row_groups == 1
            assert file.schema_arrow.names == [part.name for part in stored]
            assert file.schema_arrow.metadata[b"place"].decode() == path.relative_to(root).as_posix()
            start, stop = grid.span(shard)
            for part in stored:
                described = file.schema_arrow.field(part.name).metadata
                assert described[b"dtype"].decode() == part.dtype
                assert json.loads(described[b"shape"]) == list(part.shape)
                assert (b"ragged" in described) == part.ragged
                assert described.get(b"ragged", b"true") == b"true"
                column = file.read()[part.name].to_pylist()
                assert len(column) == stop - start
                rows[part.name] += column
            physical = {file.schema.column(n).name: file.schema.column(n).physical_type for n in range(len(stored))}
            for part in stored:
                assert physical[part.name] == ("BYTE_ARRAY" if part.ragged else "FIXED_LEN_BYTE_ARRAY")
    for part in stored:
        lengths = read_back(columns)["count"] if part.ragged else [None] * grid.rows
        expected = [row[:n] if part.ragged else row for row, n in zip(columns[part.name], lengths, strict=True)]
        shape = (-1,) if part.ragged else part.shape
        for value, row in zip(rows[part.name], expected, strict=True):
            assert np.frombuffer(value, part.dtype).reshape(shape).tobytes() == row.tobytes()


@KINDS
@RAGGED
@given(data=st.data())
def test_no_flip_is_read(kind: str, ragged: bool, data: st.DataObject) -> None:
    """Any change of any byte is found on the way to the rows of its chunk, or is no part of what was read."""
    store, group, grid, packed, columns = small(kind, data.draw(st.integers(0, 1)), ragged)
    shard = data.draw(st.integers(0, grid.shards - 1))
    record, original = data.draw(st.sampled_from(packed[shard]))
    place = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[place] ^= data.draw(st.integers(1, 255))
    spoilt = read_from(kind, group, record.path)
    with written(store, group, packed) as root:
        (root / record.path).write_bytes(changed)
        for part in group.parts:
            start, stop = grid.span(shard)
            if part.name in spoilt:
                with pytest.raises(CorruptionError, match="views/v0000"):
                    # All chunks: also the last one's padding is under its chunk's checksum.
                    gather(store, root, group, grid, packed, part.name, range(start, stop))
            for other in {1 - shard} if part.name in spoilt else {0, 1}:
                rows = list(range(*grid.span(other)))
                found = gather(store, root, group, grid, packed, part.name, rows)
                assert found.tobytes() == read_back(columns)[part.name][rows].tobytes()


@given(place=st.integers(0, 39), row=st.integers(0, 3))
def test_zarr_checks_the_chunk_that_is_read(place: int, row: int) -> None:
    """A flip inside one chunk leaves the rows of the other readable, and never gives a wrong row."""
    store, group, grid, packed, columns = small("zarr")
    record, original = packed[0][0]
    assert len(original) == 2 * (2 * 8 + 4) + 2 * 16 + 4
    changed = bytearray(original)
    changed[place] ^= 1
    with written(store, group, packed) as root:
        (root / record.path).write_bytes(changed)
        in_data, chunk = place % 20 < 16, place // 20
        if in_data and row // 2 != chunk:
            found = gather(store, root, group, grid, packed, "digest", [row])
            assert (found == columns["digest"][[row]]).all()
        else:
            with pytest.raises(CorruptionError):
                gather(store, root, group, grid, packed, "digest", [row])


@KINDS
@RAGGED
@given(data=st.data())
def test_no_truncation_is_read(kind: str, ragged: bool, data: st.DataObject) -> None:
    """Shorter, empty, longer or missing files are corruption, never fill values."""
    store, group, grid, packed, _ = small(kind, data.draw(st.integers(0, 1)), ragged)
    record, original = data.draw(st.sampled_from(packed[0]))
    length = data.draw(st.one_of(st.just(0), st.integers(0, len(original) - 1), st.just(None), st.just(-1)))
    with written(store, group, packed) as root:
        if length is None:
            (root / record.path).unlink()
        else:
            (root / record.path).write_bytes(original + b"\0" if length == -1 else original[:length])
        for part in read_from(kind, group, record.path):
            with pytest.raises(CorruptionError):
                gather(store, root, group, grid, packed, part, [0])


@KINDS
@RAGGED
def test_a_shard_of_fewer_rows_is_refused(kind: str, ragged: bool) -> None:
    """Written and signed as it is, with other rows than the plan has: whichever of them is asked for."""
    store, group, grid, packed, columns = small(kind, 0, ragged)
    fewer = open_store(kind, Grid(grid.rows, 2, 2))  # type: ignore[arg-type]
    short = fewer.pack(group, 0, {name: values[:2] for name, values in columns.items()})
    with written(store, group, [short, packed[1]]) as root:
        for part in ("digest", "params"):
            for row in (0, 3):
                with pytest.raises(CorruptionError):
                    gather(store, root, group, grid, [short, packed[1]], part, [row])


@KINDS
@given(group=groups(), seed=SEEDS)
def test_no_swap_is_read(kind: str, group: Group, seed: int) -> None:
    """A sound file in another shard's, view's or part's place is refused, even one with the same rows."""
    grid, other = Grid(8, 4, 2), Group("teachers/t/logits/v0009", group.parts)
    store = open_store(kind, grid)  # type: ignore[arg-type]
    half = columns_of(group, 4, seed)
    twice = {name: np.concatenate([values, values]) for name, values in half.items()}
    packed, elsewhere = pack_all(store, group, grid, twice), pack_all(store, other, grid, twice)
    for number, (record, own) in enumerate(packed[0]):
        for foreign in (packed[1][number][1], elsewhere[0][number][1]):
            if kind == "zarr":
                # The same rows give the same file wherever they stand: nothing is wrong then, and none raises.
                assert foreign == own
                continue
            with written(store, group, packed) as root:
                (root / record.path).write_bytes(foreign)
                with pytest.raises(CorruptionError):
                    gather(store, root, group, grid, packed, group.parts[0].name, [0])
    different = pack_all(store, group, grid, columns_of(group, 8, seed + 1))
    for number, (record, own) in enumerate(different[0]):
        if different[1][number][1] == own:
            continue
        with written(store, group, different) as root:
            (root / record.path).write_bytes(different[1][number][1])
            for part in read_from(kind, group, record.path):
                with pytest.raises(CorruptionError):
                    gather(store, root, group, grid, different, part, [0])


@KINDS
@RAGGED
def test_a_digest_is_bound_to_content_and_path(kind: str, ragged: bool) -> None:
    """Other rows or another place give another digest.

    A CRC-32C of a whole Zarr shard would not do: over data that ends with its own CRC it is a constant.
    """
    store, group, grid, packed, columns = small(kind, ragged=ragged)
    _, _, _, other, _ = small(kind, seed=1, ragged=ragged)
    moved = pack_all(store, Group("views/v0001", group.parts), grid, columns)
    sets = [{record.digest for shard in item for record, _ in shard} for item in (packed, other, moved)]
    count = sum(len(shard) for shard in packed)
    assert len(sets[0] | sets[1] | sets[2]) == 3 * count
    if kind == "zarr":
        assert crc32c(packed[0][0][1]) == crc32c(other[0][0][1]), "the trap that this test is about"


@KINDS
@RAGGED
@given(data=st.data())
def test_damage_names_the_file(kind: Any, ragged: bool, data: st.DataObject) -> None:
    """Nothing on sound files; exactly the file that is flipped, cut, gone or swapped."""
    store, group, _, packed, _ = small(kind, data.draw(st.integers(0, 1)), ragged)
    record, original = data.draw(st.sampled_from(packed[0]))
    how = data.draw(st.sampled_from(["flip", "cut", "gone", "swap"]))
    records = {record.path: record for record, _ in packed[0]}
    with written(store, group, packed) as root:
        assert list(store.damage(LocalRoot(root), group, 0, records)) == []
        path = root / record.path
        if how == "flip":
            changed = bytearray(original)
            changed[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
            path.write_bytes(changed)
        elif how == "cut":
            path.write_bytes(original[: data.draw(st.integers(0, len(original) - 1))])
        elif how == "gone":
            path.unlink()
        else:
            number = [item[0].path for item in packed[0]].index(record.path)
            path.write_bytes(packed[1][number][1])
        (error,) = store.damage(LocalRoot(root), group, 0, records)
        assert error.field == record.path


def test_fill_values_mark_what_nobody_wrote() -> None:
    """NaN for floats, the largest number for integers: in the metadata and in the padding of a ragged shard."""
    assert np.isnan(Part("v", "float16", ()).fill)
    assert Part("v", "uint16", ()).fill == 65_535
    assert Part("v", "int32", ()).fill == 2**31 - 1
    store, group, grid, packed, _ = small("zarr")
    with written(store, group, packed) as root, warnings.catch_warnings():
        array = zarr.open_array(str(root / "data/views/v0000/digest"), mode="r")
        assert array.fill_value == 2**64 - 1
        (root / packed[0][0][0].path).unlink()
        assert (np.asarray(array[: grid.shard_rows]) == 2**64 - 1).all()


class TestFiles:
    """`write_atomic`: whole or not at all."""

    def test_writes_and_replaces(self, tmp_path: Path) -> None:
        write_atomic(tmp_path, "a/b/c.bin", b"one")
        write_atomic(tmp_path, "a/b/c.bin", b"two")
        assert (tmp_path / "a/b/c.bin").read_bytes() == b"two"
        assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["c.bin"]

    def test_it_is_on_the_disk_before_it_is_visible(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The file is synced, then renamed, then its folder is synced; so is the parent of a new folder, first."""
        done: list[str] = []
        real = Path.replace

        def sync(handle: int) -> None:
            done.append("file" if stat.S_ISREG(os.fstat(handle).st_mode) else "folder")

        def replace(path: Path, target: Path) -> Path:
            done.append("rename")
            return real(path, target)

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(Path, "replace", replace)
        write_atomic(tmp_path, "a/b", b"x")
        assert done == ["folder", "file", "rename", "folder"]
        write_atomic(tmp_path, "a/b", b"y")
        assert done[4:] == ["file", "rename", "folder"]

    def test_a_failed_write_leaves_the_old_file_and_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_atomic(tmp_path, "c.bin", b"one")

        def full(_handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(BuildError, match="No space left on device") as caught:
            write_atomic(tmp_path, "c.bin", b"two")
        assert caught.value.exit_code == 1
        assert (tmp_path / "c.bin").read_bytes() == b"one"
        assert [p.name for p in tmp_path.rglob("*")] == ["c.bin"]

    def test_a_file_in_a_folders_place_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"")
        with pytest.raises(BuildError, match="cannot be written"):
            write_atomic(tmp_path, "a/b", b"x")

    def test_files_written_together_are_on_the_disk_before_any_is_visible(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each file is synced, then each renamed, then each folder synced, once, and its own name with it."""
        done: list[str] = []
        real = Path.replace

        def sync(handle: int) -> None:
            at = Path(f"/proc/self/fd/{handle}").readlink()
            done.append("file" if stat.S_ISREG(os.fstat(handle).st_mode) else at.relative_to(tmp_path).as_posix())

        def replace(path: Path, target: Path) -> Path:
            done.append("rename")
            return real(path, target)

        (tmp_path / "a").mkdir()
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(Path, "replace", replace)
        for content in (b"x", b"y"):
            done.clear()
            write_together(tmp_path, ((name, content) for name in ("a/c/0", "a/c/1", "a/d/0")))
            assert done == ["file"] * 3 + ["rename"] * 3 + ["a", "a/c", "a/d"]
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert {path.relative_to(tmp_path).as_posix() for path in files} == {"a/c/0", "a/c/1", "a/d/0"}
            assert {path.read_bytes() for path in files} == {content}

    @pytest.mark.parametrize("at", [1, 2])
    def test_a_failure_among_files_written_together_changes_none(
        self, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor does one of what makes their contents, which is raised as it is; nothing is left under another name."""
        write_together(tmp_path, [("a/0", b"one"), ("a/1", b"one")])
        calls = iter(range(9))
        real = os.fsync

        def full(handle: int) -> None:
            if next(calls) == at - 1:
                raise OSError(28, "No space left on device")
            real(handle)

        def contents() -> Iterator[tuple[str, bytes]]:
            yield "a/0", b"two"
            raise ValueError("no rows")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(BuildError, match="No space left on device"):
                write_together(tmp_path, [("a/0", b"two"), ("a/1", b"two")])
        with pytest.raises(ValueError, match="no rows"):
            write_together(tmp_path, contents())
        assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"one", b"one"]

    def test_leftovers_are_removed_and_nothing_else(self, tmp_path: Path) -> None:
        write_atomic(tmp_path, "a/b", b"x")
        (tmp_path / f"a/b.{'0' * 32}.tmp").write_bytes(b"torn")
        (tmp_path / "a/notes.tmp").write_bytes(b"someone's own")
        assert remove_unfinished(LocalRoot(tmp_path)) == 1
        assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["b", "notes.tmp"]

    def test_crc32c_known_answer(self) -> None:
        """RFC 3720, B.4."""
        assert crc32c(b"123456789") == 0xE3069283
        assert crc32c(bytes(32)) == 0x8A9136AA


def test_a_folder_that_another_builder_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mkdir` finds it, and a moment later it is gone: that is no file in the way."""
    mkdir, refused = os.mkdir, list[str]()

    def racing(path: str, *more: int) -> None:
        if str(path).endswith("builders") and len(refused) < 3:
            refused.append(str(path))
            raise FileExistsError(17, "File exists", path)
        mkdir(path, *more)

    monkeypatch.setattr(os, "mkdir", racing)
    make_folder(tmp_path / "cache" / "builders")
    assert (tmp_path / "cache" / "builders").is_dir()
    assert len(refused) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")
