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
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SEEDS, grids, parts, values_of

from teacher_cache.encodings import Part
from teacher_cache.errors import BuildError, CorruptionError
from teacher_cache.storage import FileRecord, Grid, Group, Store, crc32c, open_store, write_atomic
from teacher_cache.storage.files import remove_temporary

KINDS = pytest.mark.parametrize("kind", ["zarr", "parquet"])
Packed = list[list[tuple[FileRecord, bytes]]]


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
    """Rows of the whole array, through `open_shard`."""
    shards, inside = np.divmod(np.asarray(rows), grid.shard_rows)
    readers = {
        int(n): store.open_shard(root, group, int(n), {record.path: record for record, _ in packed[n]})
        for n in np.unique(shards)
    }
    gathered = [readers[int(n)].gather(part, np.array([i])) for n, i in zip(shards, inside, strict=True)]
    return np.concatenate(gathered)


def small(kind: str, seed: int = 0) -> tuple[Store, Group, Grid, Packed, dict[str, Any]]:
    """Two shards, the last ragged, of two parts."""
    grid = Grid(7, 4, 2)
    group = Group("views/v0000", (Part("digest", "uint64", ()), Part("params", "int32", (3,))))
    store = open_store(kind, grid)  # type: ignore[arg-type]
    columns = {part.name: values_of(part, grid.rows, seed) for part in group.parts}
    return store, group, grid, pack_all(store, group, grid, columns), columns


@KINDS
@given(grid=grids(), part=parts(), seed=SEEDS, data=st.data())
def test_what_is_packed_is_gathered(kind: Any, grid: Grid, part: Part, seed: int, data: st.DataObject) -> None:
    """Rows come back bit for bit, in the order asked for, repeats too, from ragged shards too."""
    store, group = open_store(kind, grid), Group("teachers/t/logits/v0001", (part,))
    values = values_of(part, grid.rows, seed)
    packed = pack_all(store, group, grid, {"values": values})
    assert [r.path for shard in packed for r, _ in shard] == [
        path for shard in range(grid.shards) for path in store.paths(group, shard)
    ]
    rows = data.draw(st.lists(st.integers(0, grid.rows - 1), min_size=1, max_size=8))
    with written(store, group, packed) as root:
        found = gather(store, root, group, grid, packed, "values", rows)
    assert found.dtype == part.dtype
    assert found.shape == (len(rows), *part.shape)
    assert found.tobytes() == values[rows].tobytes()


@KINDS
@given(grid=grids(), part=parts(), seed=SEEDS)
def test_packing_is_pure_and_records_tell_the_truth(kind: Any, grid: Grid, part: Part, seed: int) -> None:
    """Same arrays, same bytes; a record has the size of its file."""
    store, group = open_store(kind, grid), Group("g/v0000", (part,))
    values = {"values": values_of(part, grid.rows, seed)}
    first, second = (pack_all(store, group, grid, values) for _ in range(2))
    assert first == second
    for record, data in (item for shard in first for item in shard):
        assert record.size == len(data)


def test_a_checksum_of_a_file_that_ends_with_its_own_checksum_is_none() -> None:
    """Why no receipt holds the CRC-32C of a whole shard: it is one constant, whatever the shard holds."""
    framed = [data + crc32c(data).to_bytes(4, "little") for data in (b"one", b"another", bytes(1000))]
    assert len({crc32c(data) for data in framed}) == 1


@KINDS
def test_gathered_rows_are_copies(kind: str) -> None:
    """Writing to what was gathered changes neither the file nor the next read."""
    store, group, grid, packed, columns = small(kind)
    with written(store, group, packed) as root:
        reader = store.open_shard(root, group, 0, {record.path: record for record, _ in packed[0]})
        reader.gather("params", np.array([1]))[:] = 0
        assert (reader.gather("params", np.array([1])) == columns["params"][1:2]).all()
        assert (gather(store, root, group, grid, packed, "params", [1]) == columns["params"][1:2]).all()


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


@given(grid=grids(), part=parts(), seed=SEEDS)
def test_plain_zarr_reads_the_rows(grid: Grid, part: Part, seed: int) -> None:
    """Without a line of ours: group, array, rows, and the attributes of the layout."""
    store, group = open_store("zarr", grid), Group("teachers/t/logits/v0000", (part,))
    values = values_of(part, grid.rows, seed)
    with written(store, group, pack_all(store, group, grid, {"values": values})) as root:
        array = zarr.open_group(str(root / "data"), mode="r")["teachers/t/logits/v0000/values"]
        assert isinstance(array, zarr.Array)
        assert array.shape == (grid.rows, *part.shape)
        assert np.asarray(array[:]).tobytes() == values.tobytes()
        assert array.shards == (grid.shard_rows, *part.shape)
        assert array.chunks == (grid.chunk_rows, *part.shape)


@given(grid=grids(), part=parts(), seed=SEEDS)
def test_plain_pyarrow_reads_the_rows(grid: Grid, part: Part, seed: int) -> None:
    """With the documented decoding: `frombuffer` of a value, dtype and shape from the field's metadata."""
    store, group = open_store("parquet", grid), Group("teachers/t/logits/v0000", (part,))
    values = values_of(part, grid.rows, seed)
    packed = pack_all(store, group, grid, {"values": values})
    with written(store, group, packed) as root:
        paths = [root / record.path for shard in packed for record, _ in shard]
        rows = []
        for path, shard in zip(paths, range(grid.shards), strict=True):
            file = pq.ParquetFile(path, page_checksum_verification=True)
            assert file.num_row_groups == 1
            field = file.schema_arrow.field("values")
            shape = json.loads(field.metadata[b"shape"])
            start, stop = grid.span(shard)
            column = file.read()["values"].to_pylist()
            assert len(column) == stop - start
            rows += [np.frombuffer(v, field.metadata[b"dtype"].decode()).reshape(shape) for v in column]
            assert file.schema_arrow.metadata[b"place"].decode() == path.relative_to(root).as_posix()
    assert np.stack(rows).tobytes() == values.tobytes()


@KINDS
@given(data=st.data())
def test_no_flip_is_read(kind: str, data: st.DataObject) -> None:
    """Any change of any byte is found on the way to the rows of its chunk, or is no part of what was read."""
    store, group, grid, packed, columns = small(kind)
    shard = data.draw(st.integers(0, grid.shards - 1))
    record, original = data.draw(st.sampled_from(packed[shard]))
    place = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[place] ^= data.draw(st.integers(1, 255))
    part = "digest" if "digest" in record.path else "params"
    names = [part] if kind == "zarr" else ["digest", "params"]
    with written(store, group, packed) as root:
        (root / record.path).write_bytes(changed)
        start, stop = grid.span(shard)
        for name in names:
            with pytest.raises(CorruptionError, match="views/v0000"):
                # All chunks: also the last one's padding is under its chunk's checksum.
                gather(store, root, group, grid, packed, name, range(start, stop))
        other = 1 - shard
        rows = range(*grid.span(other))
        assert (gather(store, root, group, grid, packed, part, rows) == columns[part][list(rows)]).all()


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
@given(data=st.data())
def test_no_truncation_is_read(kind: str, data: st.DataObject) -> None:
    """Shorter, empty, longer or missing files are corruption, never fill values."""
    store, group, grid, packed, _ = small(kind)
    record, original = data.draw(st.sampled_from(packed[0]))
    length = data.draw(st.one_of(st.just(0), st.integers(0, len(original) - 1), st.just(None), st.just(-1)))
    with written(store, group, packed) as root:
        if length is None:
            (root / record.path).unlink()
        else:
            (root / record.path).write_bytes(original + b"\0" if length == -1 else original[:length])
        part = "digest" if "digest" in record.path else "params"
        with pytest.raises(CorruptionError):
            gather(store, root, group, grid, packed, part, [0])


@KINDS
@given(seed=SEEDS)
def test_no_swap_is_read(kind: str, seed: int) -> None:
    """A sound file in another shard's, view's or part's place is refused, even one with the same rows."""
    grid = Grid(8, 4, 2)
    part = Part("values", "float32", (2,))
    group, other = (Group(f"teachers/t/logits/v{view:04d}", (part,)) for view in (0, 1))
    store = open_store(kind, grid)  # type: ignore[arg-type]
    half = values_of(part, 4, seed)
    packed = pack_all(store, group, grid, {"values": np.concatenate([half, half])})
    elsewhere = pack_all(store, other, grid, {"values": np.concatenate([half, half])})
    for foreign in (packed[1][0][1], elsewhere[0][0][1]):
        with written(store, group, packed) as root:
            (root / packed[0][0][0].path).write_bytes(foreign)
            if kind == "zarr":
                # The same rows give the same file wherever they stand: nothing is wrong then, and none raises.
                assert foreign == packed[0][0][1]
            else:
                with pytest.raises(CorruptionError):
                    gather(store, root, group, grid, packed, "values", [0])
    different = pack_all(store, group, grid, {"values": values_of(part, 8, seed + 1)})
    assume(different[0][0][1] != different[1][0][1])
    with written(store, group, different) as root:
        (root / different[0][0][0].path).write_bytes(different[1][0][1])
        with pytest.raises(CorruptionError):
            gather(store, root, group, grid, different, "values", [0])


@KINDS
def test_a_digest_is_bound_to_content_and_path(kind: str) -> None:
    """Other rows or another place give another digest.

    A CRC-32C of a whole Zarr shard would not do: over data that ends with its own CRC it is a constant.
    """
    _, group, _, packed, columns = small(kind)
    _, _, _, other, _ = small(kind, seed=1)
    moved = pack_all(small(kind)[0], Group("views/v0001", group.parts), Grid(7, 4, 2), columns)
    sets = [{record.digest for shard in item for record, _ in shard} for item in (packed, other, moved)]
    count = sum(len(shard) for shard in packed)
    assert len(sets[0] | sets[1] | sets[2]) == 3 * count
    if kind == "zarr":
        assert crc32c(packed[0][0][1]) == crc32c(other[0][0][1]), "the trap that this test is about"


@KINDS
@given(data=st.data())
def test_damage_names_the_file(kind: Any, data: st.DataObject) -> None:
    """Nothing on sound files; exactly the file that is flipped, cut, gone or swapped."""
    store, group, _, packed, _ = small(kind)
    record, original = data.draw(st.sampled_from(packed[0]))
    how = data.draw(st.sampled_from(["flip", "cut", "gone", "swap"]))
    records = {record.path: record for record, _ in packed[0]}
    with written(store, group, packed) as root:
        assert list(store.damage(root, group, 0, records)) == []
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
        (error,) = store.damage(root, group, 0, records)
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

    def test_leftovers_are_removed_and_nothing_else(self, tmp_path: Path) -> None:
        write_atomic(tmp_path, "a/b", b"x")
        (tmp_path / f"a/b.{'0' * 32}.tmp").write_bytes(b"torn")
        (tmp_path / "a/notes.tmp").write_bytes(b"someone's own")
        assert remove_temporary(tmp_path) == 1
        assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["b", "notes.tmp"]

    def test_crc32c_known_answer(self) -> None:
        """RFC 3720, B.4."""
        assert crc32c(b"123456789") == 0xE3069283
        assert crc32c(bytes(32)) == 0x8A9136AA
