"""`verify` finds whatever is wrong, and nothing where nothing is."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_builds import toy_spec, tree, write_arrays

import teacher_cache as tc
from teacher_cache.errors import CacheNotFoundError


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


@pytest.mark.parametrize("name", ["notes.txt", "data/extra", "data/views/v0000/a.tmp", "receipts/v0000-s000000.json"])
def test_a_stray_file_is_found(name: str, copied: Path) -> None:
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_bytes(b"x")
    (problem,) = tc.verify(copied).problems
    assert problem.place == name


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
