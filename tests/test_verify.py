"""`verify` finds whatever is wrong, and nothing where nothing is."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_builds import toy_spec, tree, write_arrays

import teacher_cache as tc
from teacher_cache.errors import CacheNotFoundError
from teacher_cache.signed import signed
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.parquet_tables import lists_of
from teacher_cache.tables import write_table


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A cache to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


def data_files(root: Path) -> list[Path]:
    return sorted(p for p in (root / "data").rglob("*") if p.is_file() and p.name != "zarr.json")


def test_a_good_cache_is_ok(built: Path) -> None:
    """With every check on; and verifying changes nothing."""
    before = tree(built)
    report = tc.verify(built, recompute=30, views=30)
    assert report.ok, report.problems
    assert report.files == len(data_files(built))
    assert report.bytes == sum(path.stat().st_size for path in data_files(built))
    assert tree(built) == before


@settings(max_examples=60)
@given(which=st.floats(0, 1, exclude_max=True), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_every_flip_anywhere_is_found(built: Path, which: float, where: float, flip: int) -> None:
    """Any byte of any file of the cache, data, metadata, tables and manifest; the file is named."""
    files = sorted(path for path in built.rglob("*") if path.is_file())
    path = files[int(which * len(files))]
    original = path.read_bytes()
    changed = bytearray(original)
    changed[int(where * len(original))] ^= flip
    stat = path.stat()
    try:
        path.write_bytes(changed)
        report = tc.verify(built)
    finally:
        path.write_bytes(original)
    assert stat.st_size == path.stat().st_size
    assert not report.ok
    assert any(problem.place == path.relative_to(built).as_posix() for problem in report.problems)
    assert all(problem.what and problem.todo for problem in report.problems)


def test_every_file_counts(copied: Path) -> None:
    """Each file in turn missing, empty, shorter or longer."""
    for path in sorted(path for path in copied.rglob("*") if path.is_file()):
        original = path.read_bytes()
        name = path.relative_to(copied).as_posix()
        for data in (None, b"", original[:-1], original + b"\0"):
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
            if name == "manifest.json" and data is None:
                with pytest.raises(CacheNotFoundError):
                    tc.verify(copied)
            else:
                assert any(problem.place == name for problem in tc.verify(copied).problems), (name, data)
            path.write_bytes(original)
    assert tc.verify(copied).ok


def test_every_swap_is_found(copied: Path) -> None:
    """Two data files in each other's places: both are named."""
    files = data_files(copied)
    for first, second in itertools.pairwise(files):
        one, other = first.read_bytes(), second.read_bytes()
        if one == other:
            continue
        first.write_bytes(other)
        second.write_bytes(one)
        places = {problem.place for problem in tc.verify(copied).problems}
        assert {path.relative_to(copied).as_posix() for path in (first, second)} <= places
        first.write_bytes(one)
        second.write_bytes(other)


@pytest.mark.parametrize("name", ["notes.txt", "data/extra", "data/views/v0000/a.tmp", "receipts/v0000/s000000.json"])
def test_a_stray_file_is_found(name: str, copied: Path) -> None:
    (copied / name).parent.mkdir(parents=True, exist_ok=True)
    (copied / name).write_bytes(b"x")
    (problem,) = tc.verify(copied).problems
    assert problem.place == name


def test_what_is_no_file_is_a_stray_too(copied: Path) -> None:
    """Links wherever they lead, and folders that lead to no file."""
    (copied / "data/nowhere").symlink_to("gone")
    (copied / "data/views/again").symlink_to(copied / "data/views")
    (copied / "data/empty/deep").mkdir(parents=True)
    found = {problem.place for problem in tc.verify(copied).problems}
    assert found == {"data/nowhere", "data/views/again", "data/empty/deep/"}


def test_a_known_folder_may_be_a_link(copied: Path, tmp_path: Path) -> None:
    """Data on another disk: what is behind the link is checked as if it were here."""
    (copied / "data").rename(tmp_path / "elsewhere")
    (copied / "data").symlink_to(tmp_path / "elsewhere")
    assert tc.verify(copied).ok
    (tmp_path / "elsewhere/stray").write_bytes(b"")
    assert [problem.place for problem in tc.verify(copied).problems] == ["data/stray"]


def test_an_unfinished_build_is_a_problem(arrays: Path, tmp_path: Path) -> None:
    """Holes are listed one by one; what is there is sound."""

    def progress(done: int, _total: int, _built: int) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tc.build(toy_spec(tmp_path / "cache", arrays), "serial", progress)
    report = tc.verify(tmp_path / "cache")
    assert {problem.place for problem in report.problems} == {
        f"view {view}, shard {shard}" for view in range(2) for shard in range(4) if (view, shard) > (0, 1)
    }
    assert all("is not committed" in problem.what for problem in report.problems)


def test_no_cache_at_all(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError):
        tc.verify(tmp_path)


class TestAgainstTheWorld:
    """Views and answers are made again, and compared."""

    def _built(self, tmp_path: Path, **changes: object) -> tuple[Path, Path]:
        folder = write_arrays(tmp_path / "arrays")
        tc.build(toy_spec(tmp_path / "cache", folder, **changes), executor="serial")
        return folder, tmp_path / "cache"

    def test_changed_images(self, tmp_path: Path) -> None:
        """Found by the views; the bytes of the cache themselves are sound."""
        folder, path = self._built(tmp_path)
        np.save(folder / "images.npy", np.load(folder / "images.npy") ^ 1)
        assert tc.verify(path).ok
        report = tc.verify(path, views=5)
        assert "bytes that the teacher saw" in report.problems[0].what
        assert not tc.verify(path, recompute=5).ok

    def test_changed_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One weight of the teacher: it is not the one that made this cache."""
        import toy_models

        _, path = self._built(tmp_path)
        real = toy_models.PixelSums.__init__

        def changed(self: toy_models.PixelSums, *arguments: int) -> None:
            real(self, *arguments)
            self.head.weight.data[0, 0] += 2.0**-10

        monkeypatch.setattr(toy_models.PixelSums, "__init__", changed)
        (problem,) = tc.verify(path, recompute=5).problems
        assert problem.place == "teacher"

    def test_changed_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same weights, other arithmetic: only asking again can find it."""
        import toy_models

        _, path = self._built(tmp_path)
        real: Callable[..., object] = toy_models.Pixels.forward
        monkeypatch.setattr(toy_models.Pixels, "forward", lambda self, images: real(self, images) + 1)
        report = tc.verify(path, recompute=5)
        assert any("answers otherwise" in problem.what for problem in report.problems)
        assert any("logits" in problem.place for problem in report.problems)

    @pytest.mark.parametrize("encoding", ["dense_f32", "dense_f16", {"kind": "top_k", "k": 3}])
    def test_every_encoding_recomputes(self, encoding: object, tmp_path: Path) -> None:
        _, path = self._built(tmp_path, teacher__fields={"logits": {"encoding": encoding}})
        report = tc.verify(path, recompute=40, views=10)
        assert report.ok, report.problems

    @pytest.mark.timeout(60)
    def test_an_image_that_is_broken_now(self, tmp_path: Path) -> None:
        """It could be decoded when the cache was built: found by views and by recompute, and both end."""
        (tmp_path / "images/a").mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8), number * 40).save(tmp_path / f"images/a/{number}.png")
        source = {"kind": "folder", "path": str(tmp_path / "images")}
        arguments = {"classes": 1}
        spec = toy_spec(tmp_path / "cache", tmp_path, source=source, teacher__arguments=arguments)
        tc.build(spec, executor="serial")
        path = tmp_path / "images/a/3.png"
        path.write_bytes(path.read_bytes()[:-12] + bytes(12))
        path.write_bytes(b"\0" * path.stat().st_size)
        assert not tc.verify(spec.cache, views=40).ok
        assert not tc.verify(spec.cache, recompute=40).ok

    def test_tombstones_are_no_problem(self, tmp_path: Path) -> None:
        """Rows without data are not rendered or asked for; their neighbours are."""
        (tmp_path / "images/a").mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8), number * 40).save(tmp_path / f"images/a/{number}.png")
        for number in (0, 4, 5):
            (tmp_path / f"images/a/{number}.png").write_bytes(b"no image")
        source = {"kind": "folder", "path": str(tmp_path / "images")}
        spec = toy_spec(tmp_path / "cache", tmp_path, source=source, teacher__arguments={"classes": 1})
        assert len(tc.build(spec, executor="serial").tombstones) == 3
        assert tc.verify(spec.cache, views=20, recompute=20).ok


class TestSignedAgain:
    """Someone has edited a manifest or a table and signed it again: every digest is right, and what it says is not."""

    @staticmethod
    def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
        body = json.loads((root / "manifest.json").read_bytes())
        del body["digest"]
        change(body)
        (root / "manifest.json").write_bytes(signed(body))

    @classmethod
    def edit_table(cls, root: Path, stem: str, change: Callable[[dict[str, list[Any]]], object]) -> None:
        old = next(root.glob(f"{stem}-*.parquet"))
        columns = lists_of(old.read_bytes())
        old.unlink()
        change(columns)
        for name in {"samples": ["digest"], "content": ["content"]}.get(stem, []):
            if name in columns:
                columns[name] = np.array(columns[name], np.uint64)  # type: ignore[assignment]
        table = write_table(LocalRoot(root), stem, columns)

        def rename(value: Any) -> Any:
            if isinstance(value, dict):
                named = table.model_dump() if value.get("path") == old.name else value
                return {key: rename(inner) for key, inner in named.items()}
            return [rename(inner) for inner in value] if isinstance(value, list) else value

        cls.edit(root, lambda body: body.update(rename(body)))

    @pytest.mark.parametrize(
        ("path", "value", "says"),
        [
            ("totals.bytes", 7, "bytes must be"),
            ("totals.bytes", 10**9, "bytes must be"),
            ("totals.tombstones", 1, "tombstones must be 0"),
            ("totals.labelled", 55, "labelled must be 54..54"),
            ("totals.correct", 55, "correct must be 0..54"),
            ("totals.fidelity", {}, "fidelity must be that of"),
            ("totals.fidelity.logits.rows", 1e9, "fidelity of logits must be measured on 0..54 rows"),
            ("totals", None, "must have receipts and totals"),
            ("state", "building", "must not have receipts and totals"),
            ("segments.0.rows", 26, "must cover a segment each"),
            ("segments.0.rows", -1, "segments must have rows"),
            ("extent.rows", 26, "must cover a segment each"),
            ("extent.first_row", 1, "must cover a segment each"),
            ("extent.proof", False, "and its proof first"),
            ("extent.views", 3, "must have receipts and totals"),
            ("spec.views.count", 1, "views must be of its spec's 1"),
            ("view_shape", [1, 8, 9], "must hold views of 72 bytes"),
            ("view_shape", [1, 8, 0], "view_shape must be at least 1"),
            ("param_names", ["a"], "param_names must be the recipe's"),
            ("promise", "seeded-global", "promise must be what its spec says, native"),
            ("extent.teacher", "another", "teacher must be what its spec says"),
            ("extent.teacher", "../elsewhere", "must not lead out of their folders"),
            ("identity.encoding", "0" * 32, "identity.encoding must be"),
            ("identity.store", "0" * 32, "identity.store must be"),
            ("identity.view", "0" * 32, "identity.view must be"),
            ("identity.recipe", "0" * 32, "identity.recipe must be"),
            ("identity.source", "0" * 32, "identity.source must be"),
            ("class_names", ["one"], "class_names must be one for each of 10 logits"),
            ("field_shapes.logits", [11], "identity.encoding must be"),
            ("field_shapes", {}, "must name the same"),
            ("fields.logits.encoding", {"kind": "top_k", "k": 99}, "must be at most 10"),
            ("fields.logits.encoding", {"kind": "auto", "max_kl": 1.0}, "encodings that are chosen"),
            ("store.shard_rows", 16, "store must be what its spec says"),
            ("store.shard_rows", 7, "not a multiple"),
            ("spec.views", {}, "its spec cannot be read"),
            ("spec.views.seed", 12, "identity.view must be"),
            ("constants", {"path": "constants-x.parquet", "digest": "0" * 32}, "must be there"),
            ("nonsense", 1, "is not a known key"),
        ],
    )
    def test_a_manifest(self, path: str, value: Any, says: str, copied: Path) -> None:
        def change(body: dict[str, Any]) -> None:
            *outer, last = path.split(".")
            inner: Any = body if path.startswith(("segments", "nonsense")) else body["additions"][0]
            for key in outer:
                inner = inner[int(key) if key.isdecimal() else key]
            inner[last] = value

        self.edit(copied, change)
        whats = [f"{problem.place}: {problem.what}" for problem in tc.verify(copied).problems]
        assert any(says in what for what in whats), whats
        report = tc.repair(copied)
        assert not report.ok
        assert report.written == (), "nothing is changed on its word"

    @pytest.mark.parametrize(
        ("stem", "change", "says"),
        [
            ("samples", lambda c: c["key"].__setitem__(1, c["key"][0]), "keys must be unique"),
            ("samples", lambda c: c["label"].__setitem__(1, 10), "labels must be in 0..9"),
            ("samples", lambda c: c["label"].__setitem__(1, -1), "labels must be in 0..9"),
            ("samples", lambda c: c["label"].__setitem__(1, 9), "source must be"),
            ("samples", lambda c: c["label"].__setitem__(1, None), "must be a table of"),
            ("samples", lambda c: c["digest"].__setitem__(1, 9), "digests must be those of the keys"),
            ("samples", lambda c: c["size"].__setitem__(1, -3), "sizes must be at least 0"),
            ("samples", lambda c: [column.pop() for column in c.values()], "must have the manifest's 27 rows"),
            ("samples", lambda c: c.pop("key"), "must be a table of"),
            ("content", lambda c: c["content"].pop(), "must have the manifest's 27 rows"),
            ("receipts", lambda c: c["shard"].__setitem__(0, 99), "files of view 0"),
            ("receipts", lambda c: c["view"].__setitem__(0, 7), "files of view 0"),
            ("receipts", lambda c: [column.append(column[0]) for column in c.values()], "files of view 0"),
            ("receipts", lambda c: [column.pop() for column in c.values()], "files of view 0"),
            ("receipts", lambda c: c["path"].__setitem__(0, "../outside"), "its receipt names other files"),
            ("receipts", lambda c: c["size"].__setitem__(0, -1), "sizes must be at least 0"),
            ("receipts", lambda c: c["size"].__setitem__(0, c["size"][0] + 1), "must have"),
            ("references", lambda c: c["pixels"].__setitem__(0, b"x"), "must hold views of 64 bytes"),
            ("references", lambda c: c["row"].__setitem__(0, 27), "row 27 must be one of the cache's"),
            ("references", lambda c: c.pop("view"), "must have the columns"),
        ],
    )
    def test_a_table(self, stem: str, change: Callable[[Any], object], says: str, copied: Path) -> None:
        self.edit_table(copied, stem, change)
        whats = [f"{problem.place}: {problem.what}" for problem in tc.verify(copied).problems]
        assert any(says in what for what in whats), whats
        try:
            cache = tc.open(copied)
            cache.read("logits", 0, range(len(cache)))
        except tc.CacheError:
            pass

    def test_a_table_of_another_name_or_kind(self, copied: Path) -> None:
        old = next(copied.glob("samples-*.parquet"))
        old.rename(copied / "s.parquet")
        self.edit(copied, lambda body: body["segments"][0]["samples"][0].update(path="s.parquet"))
        assert any("samples must be named by its digest" in p.what for p in tc.verify(copied).problems)
        self.edit(copied, lambda body: body["segments"][0].update(samples=[body["references"]]))
        assert any("must be a table of" in p.what for p in tc.verify(copied).problems)

    @pytest.mark.parametrize(
        ("key", "value", "says"),
        [
            ("view", 9, "must be of views 0..1|stands in another"),
            ("content", "", "must hold 8 content digests"),
            ("content", "*", "must be a receipt|must hold 8"),
            ("tombstones", [[99, "far"]], "must have tombstones in rows 0..7"),
            ("labelled", 9, "0 ≤ correct ≤ labelled ≤ 8"),
            ("correct", -1, "0 ≤ correct ≤ labelled ≤ 8"),
            ("files", [], "its receipt names other files"),
            ("files", None, "must be a receipt"),
            ("identity", "0" * 32, "belongs to another cache"),
        ],
    )
    def test_a_receipt(self, key: str, value: Any, says: str, arrays: Path, tmp_path: Path) -> None:
        def progress(done: int, _total: int, _built: int) -> None:
            if done >= 16:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tc.build(toy_spec(tmp_path / "cache", arrays), "serial", progress)
        place = tmp_path / "cache/receipts/v0000/s000000.json"
        body = json.loads(place.read_bytes())
        del body["digest"]
        place.write_bytes(signed({**body, key: value}))
        problems = tc.verify(tmp_path / "cache").problems
        assert any(re.search(says, problem.what) for problem in problems), problems
        assert any(problem.place in ("receipts/v0000/s000000.json", "view 0, shard 0") for problem in problems)


def test_stray_receipts_of_a_build(arrays: Path, tmp_path: Path) -> None:
    """Below `receipts/` nothing but receipts of planned shards: all that are bad are named at once."""

    def progress(done: int, _total: int, _built: int) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tc.build(toy_spec(tmp_path / "cache", arrays), "serial", progress)
    receipts = tmp_path / "cache/receipts"
    (receipts / "notes.txt").write_bytes(b"")
    assert "receipts/notes.txt" in {problem.place for problem in tc.verify(tmp_path / "cache").problems}
    for shard in (0, 1):
        (receipts / f"v0000-s{shard:06d}.json").write_bytes(b"")
    places = {problem.place for problem in tc.verify(tmp_path / "cache").problems}
    assert {f"receipts/v0000-s{shard:06d}.json" for shard in (0, 1)} <= places


@pytest.mark.parametrize("stem", ["manifest.json", "samples-", "receipts-", "data/views/v0000"])
def test_what_cannot_be_read(stem: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without permission is a `CacheError`, and a problem: whoever runs the tests may read anything."""

    def refuse(path: object) -> None:
        if stem in str(path) and not str(path).endswith(".json" if stem.startswith("data") else "\0"):
            raise PermissionError(13, "Permission denied", str(path))

    real_open, real_read = os.open, Path.read_bytes
    monkeypatch.setattr(os, "open", lambda path, *more, **named: (refuse(path), real_open(path, *more, **named))[1])
    monkeypatch.setattr(Path, "read_bytes", lambda path: (refuse(path), real_read(path))[1])
    if stem == "manifest.json":
        with pytest.raises(CacheNotFoundError, match="Permission denied"):
            tc.verify(copied)
    else:
        assert any("Permission denied" in problem.what for problem in tc.verify(copied).problems)


def test_recompute_tells_rounding_from_another_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher a little off is rounding, and noted; beyond the bound it is found, in the row that is furthest."""
    import toy_models

    folder = write_arrays(tmp_path / "arrays")
    sparse = [{"kind": "top_k", "k": 3}, {"kind": "nucleus", "mass": 0.9, "cap": 5}]
    for number, kept in enumerate(["dense_f32", "dense_u8", *sparse]):
        root = tmp_path / f"{number}"
        tc.build(toy_spec(root, folder, teacher__fields={"logits": {"encoding": kept}}), executor="serial")
        real = toy_models.PixelSums.forward
        for factor, found in ((1 + 2.0**-10, False), (1 + 2.0**-3, True)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(toy_models.PixelSums, "forward", lambda self, x, by=factor, f=real: f(self, x) * by)
                report = tc.verify(root, recompute=20)
            assert report.ok != found, (kept, report.problems)
            assert 10 < report.rows_recomputed <= 20
            assert any("other bytes" in note for note in report.notes) != found
