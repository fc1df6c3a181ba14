"""`repair` computes exactly what is bad, writes exactly what was committed, and says what it cannot make."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cli
import toy_models
from test_injections import CACHES, build_small, write_images
from toy_builds import committed, toy_spec, tree, write_arrays

import teacher_cache as tc
from teacher_cache.errors import BuildError, CacheNotFoundError, MismatchError

run = test_cli.run


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Data that a test may change."""
    return write_arrays(tmp_path / "arrays")


@pytest.fixture(params=["zarr", "parquet"])
def cache(request: pytest.FixtureRequest, arrays: Path, tmp_path: Path) -> Path:
    """A sealed cache of two views in four shards."""
    store = {"kind": request.param, "shard_rows": 8, "chunk_rows": 4}
    tc.build(toy_spec(tmp_path / "cache", arrays, store=store), executor="serial")
    return tmp_path / "cache"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each question to the teacher had."""
    asked: list[int] = []
    real = toy_models.PixelSums.forward

    def counted(self: toy_models.PixelSums, images: object) -> object:
        asked.append(len(images))  # type: ignore[arg-type]
        return real(self, images)  # type: ignore[arg-type]

    monkeypatch.setattr(toy_models.PixelSums, "forward", counted)
    return asked


def shard_files(root: Path, view: int, shard: int) -> list[Path]:
    return [root / path for path in committed(tc.open(root))[view, shard]]


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def stop_after(rows: int) -> Callable[[int, int, int], None]:
    def progress(done: int, _total: int, _built: int) -> None:
        if done >= rows:
            raise KeyboardInterrupt

    return progress


def test_nothing_to_do(cache: Path, answers: list[int]) -> None:
    """A sound cache is left as it is, and nobody is asked; again and again."""
    before = stamps(cache)
    for _ in range(2):
        report = tc.repair(cache)
        assert report.ok
        assert (report.written, report.removed, report.uncommitted, report.rows) == ((), (), (), 0)
    assert stamps(cache) == before
    assert answers == []


def test_exactly_the_bad_shards(cache: Path, answers: list[int]) -> None:
    """Bad files alone are written; of the teacher the two shards' micro-batches are asked and no other."""
    before, old = tree(cache), stamps(cache)
    first, other = shard_files(cache, 1, 2)[-1], shard_files(cache, 0, 3)[0]
    spoil(first)
    other.unlink()
    told: list[tuple[int, int, int]] = []
    report = tc.repair(cache, progress=lambda *figures: told.append(figures))
    bad = {path.relative_to(cache).as_posix() for path in (first, other)}
    assert set(report.written) == bad
    assert (report.ok, report.rows) == (True, 8 + 3)
    assert report.rows_per_second > 0
    assert told[0] == (0, 11, 0)
    assert told[-1] == (11, 11, 11)
    assert answers == [4, 4, 4], "27 rows are shards of 8, 8, 8 and 3; micro-batches have 4"
    assert tree(cache) == before
    assert {name for name, stamp in stamps(cache).items() if old[name] != stamp} == bad
    assert tc.verify(cache, recompute=10, views=10).ok


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone", "folder", "link", "foreign", "moved"])
def test_every_kind_of_damage(how: str, cache: Path, tmp_path: Path) -> None:
    before = tree(cache)
    path, other = shard_files(cache, 0, 1)[0], shard_files(cache, 0, 2)[0]
    data = path.read_bytes()
    if how == "flip":
        spoil(path)
    elif how in ("cut", "empty", "foreign"):
        path.write_bytes({"cut": data[:-3], "empty": b"", "foreign": other.read_bytes()}[how])
    elif how == "moved":
        path.replace(other)
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to(other)
    problems = tc.verify(cache).problems
    assert problems
    assert all(problem.todo == f"Run: teacher-cache repair {cache}" for problem in problems)
    assert tc.repair(cache).ok
    assert tc.verify(cache).ok
    assert tree(cache) == before
    assert not path.is_symlink()


def test_metadata_is_a_function_of_the_manifest(arrays: Path, tmp_path: Path, answers: list[int]) -> None:
    """No teacher, no source."""
    tc.build(toy_spec(tmp_path / "cache", arrays), executor="serial")
    shutil.rmtree(arrays)
    answers.clear()
    before = tree(tmp_path / "cache")
    names = sorted(name for name in before if name.endswith("zarr.json"))
    (tmp_path / "cache" / names[0]).unlink()
    spoil(tmp_path / "cache" / names[-1])
    assert tc.repair(tmp_path / "cache").written == (names[0], names[-1])
    assert tree(tmp_path / "cache") == before
    assert answers == []


def test_strays_go_when_asked(cache: Path) -> None:
    """They stay otherwise, and are what is left; folders that they leave empty go too."""
    before = tree(cache)
    (cache / "data/new/deep").mkdir(parents=True)
    (cache / "data/new/deep/x").write_bytes(b"")
    (cache / "empty").mkdir()
    (cache / "link").symlink_to("nowhere")
    strays = {"data/new/deep/x", "empty/", "link"}
    report = tc.repair(cache)
    assert {problem.place for problem in report.left} == strays
    assert all("--remove-strays" in problem.todo for problem in report.left)
    assert set(tc.repair(cache, remove_strays=True).removed) == strays
    assert tree(cache) == before
    assert tc.verify(cache).ok
    assert not (cache / "data/new").exists()
    assert not (cache / "link").is_symlink()


def test_a_file_in_a_folders_place(cache: Path) -> None:
    """It must go before what was below it can be written."""
    before = tree(cache)
    folder = shard_files(cache, 0, 0)[0].parent
    shutil.rmtree(folder)
    folder.write_bytes(b"")
    with pytest.raises(BuildError, match="cannot be written"):
        tc.repair(cache)
    assert tc.repair(cache, remove_strays=True).ok
    assert tree(cache) == before


@pytest.mark.parametrize("stem", ["manifest", "samples-", "receipts-", "references-"])
def test_what_cannot_be_made(stem: str, cache: Path, answers: list[int]) -> None:
    """The manifest and its tables: nothing is touched, and what to do is said."""
    path = next(cache.glob(f"{stem}*"))
    spoil(path)
    before = stamps(cache)
    report = tc.repair(cache, remove_strays=True)
    assert not report.ok
    assert path.name in {problem.place for problem in report.left}
    assert all("copy" in problem.todo for problem in report.left)
    assert stamps(cache) == before
    assert answers == []
    with pytest.raises(CacheNotFoundError):
        tc.repair(cache / "data")


def test_a_machine_that_computes_other_bytes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is changed: neither the bad file nor its neighbours, and the error says why."""
    spoil(shard_files(cache, 0, 1)[0])
    before = stamps(cache)
    real = toy_models.Pixels.forward
    monkeypatch.setattr(toy_models.Pixels, "forward", lambda self, images: real(self, images) + 2.0**-6)
    with pytest.raises(MismatchError, match="This machine computes other bytes") as caught:
        tc.repair(cache)
    assert "torch" in caught.value.hint
    assert stamps(cache) == before


def test_another_teacher(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(shard_files(cache, 0, 1)[0])
    before = stamps(cache)
    real = toy_models.PixelSums.__init__

    def changed(self: toy_models.PixelSums, *arguments: int) -> None:
        real(self, *arguments)
        self.head.weight.data[0, 0] += 2.0**-10

    monkeypatch.setattr(toy_models.PixelSums, "__init__", changed)
    with pytest.raises(MismatchError, match="teacher: must be the one that made this cache"):
        tc.repair(cache)
    assert stamps(cache) == before


def test_a_sample_that_has_changed(cache: Path, arrays: Path) -> None:
    """Its shard cannot be made again, and is named; the others are."""
    for shard in (0, 1, 2):
        spoil(shard_files(cache, 1, shard)[0])
    images = np.load(arrays / "images.npy")
    images[9] ^= 1
    np.save(arrays / "images.npy", images)
    report = tc.repair(cache)
    assert [problem.place for problem in report.left] == ["images/9"]
    assert len(report.written) == 2
    assert {problem.place for problem in tc.verify(cache).problems} == {
        shard_files(cache, 1, 1)[0].relative_to(cache).as_posix()
    }
    images[9] ^= 1
    np.save(arrays / "images.npy", images)
    assert tc.repair(cache).ok


def test_the_data_may_be_elsewhere(cache: Path, arrays: Path, tmp_path: Path) -> None:
    spoil(shard_files(cache, 0, 0)[0])
    arrays.rename(tmp_path / "moved")
    moved = toy_spec(cache, tmp_path / "moved").source
    assert tc.repair(cache, source=moved).ok


def test_ctrl_c_and_again(cache: Path) -> None:
    """What was written stays, nothing is half written, and the same call goes on with the rest."""
    before = tree(cache)
    for shard in range(4):
        spoil(shard_files(cache, 0, shard)[0])
    with pytest.raises(KeyboardInterrupt):
        tc.repair(cache, progress=stop_after(16))
    assert len(tc.verify(cache).problems) == 2
    report = tc.repair(cache)
    assert (report.ok, report.rows) == (True, 8 + 3)
    assert tree(cache) == before


@pytest.mark.parametrize("fields", ["ragged", "sparse"])
@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_tombstones_constants_and_ragged_rows(store: str, fields: str, tmp_path: Path) -> None:
    """Every data file of a cache with all of them, one after the other and all at once."""
    root = build_small(tmp_path / "cache", write_images(tmp_path / "images", 1), store, fields, None)
    before = tree(root)
    files = [root / path for files in committed(tc.open(root)).values() for path in files]
    for path in (files[0], files[-1]):
        spoil(path)
        assert tc.repair(root).written == (path.relative_to(root).as_posix(),)
        assert tree(root) == before
    shutil.rmtree(root / "data")
    assert tc.repair(root).ok
    assert tree(root) == before
    assert tc.verify(root, views="all", recompute=20).ok


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_cache_that_is_being_built(store: str, tmp_path: Path, answers: list[int]) -> None:
    """What is bad is no longer committed; the next build makes it, and ends with the bytes of an undamaged one."""
    images = write_images(tmp_path / "images", 1)
    whole = build_small(tmp_path / "whole", images, store, "sparse", None)
    root = build_small(tmp_path / "cache", images, store, "sparse", 3)
    receipts = sorted((root / "receipts").glob("*/*"))
    assert len(receipts) == 3
    spoil(receipts[0])
    bad = shard_files(whole, 0, 1)[0].relative_to(whole)
    (root / bad).unlink()
    (root / bad).mkdir()
    answers.clear()
    report = tc.repair(root)
    assert set(report.uncommitted) == {"receipts/v0000/s000000.json", "receipts/v0000/s000001.json"}
    assert (report.ok, report.written, answers) == (True, (), [])
    assert {problem.what for problem in tc.verify(root).problems} == {"is not committed"}
    assert tc.repair(root).uncommitted == ()
    spec = tc.open(root).spec
    tc.build(spec, executor="serial")
    assert tree(root) == tree(whole)


def test_another_caches_manifest_takes_no_receipt_away(tmp_path: Path) -> None:
    """All receipts seem foreign then: it is the manifest that is wrong."""
    for seed, name in ((1, "one"), (2, "two")):
        build_small(tmp_path / name, write_images(tmp_path / f"images-{name}", seed), *CACHES["zarr, building"])
    shutil.copy(tmp_path / "two/manifest.json", tmp_path / "one/manifest.json")
    before = tree(tmp_path / "one")
    report = tc.repair(tmp_path / "one")
    assert not report.ok
    assert tree(tmp_path / "one") == before


def _unfolded(table: str) -> str:
    """The last column of a table, its lines put together again."""
    cells = [line.split("│")[-2].strip() for line in table.splitlines() if line.startswith("│")]
    return "".join(cells)


def test_the_command(run: test_cli.Run, cache: Path) -> None:
    """0 where all is well, 1 where something is left, 2 where there is no cache."""
    before = tree(cache)
    path = shard_files(cache, 0, 1)[0]
    spoil(path)
    code, out, _ = run("teacher-cache", "verify", cache)
    assert code == 1
    assert f"teacher-cache repair {cache}".replace(" ", "") in _unfolded(out).replace(" ", "")
    code, out, _ = run("teacher-cache", "repair", cache, "--json")
    assert code == 0
    assert path.relative_to(cache).as_posix() in out
    assert tree(cache) == before
    (cache / "stray").write_bytes(b"")
    code, out, _ = run("teacher-cache", "repair", cache)
    assert (code, "belongs to no receipt" in out) == (1, True)
    code, out, _ = run("teacher-cache", "repair", cache, "--remove-strays")
    assert (code, "sound" in out) == (0, True)
    assert run("teacher-cache", "repair", cache / "nowhere")[0] == 2
    assert not os.path.lexists(cache / "stray")


def test_what_a_build_sealed_meanwhile_is_no_stray(cache: Path, arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the lease a build began and ended: its files belong to something by now."""
    module, looks = importlib.import_module("teacher_cache.repair"), list[int]()
    real = module.find_damage
    (cache / "stray").write_bytes(b"")

    def look(opened: tc.Cache) -> Any:
        if not looks:
            # While the first look is under way: what it finds then is held against the manifest of before.
            spec = toy_spec(cache, arrays, store=opened.manifest.store.model_dump(), views__count=3)
            looks.append(tc.build(spec, "serial").shards_built)
        return real(opened)

    monkeypatch.setattr(module, "find_damage", look)
    report = tc.repair(cache, remove_strays=True)
    assert looks == [4]
    assert (report.ok, report.removed) == (True, ("stray",))
    assert tc.verify(cache, views=20, recompute=20).ok
    assert tc.open(cache).views == 3


def test_leases_of_builders_that_are_gone_are_strays(cache: Path) -> None:
    """Those and nothing else go; our own, that the repair takes, is none of them."""
    before = tree(cache)
    for folder in ("builders", "claims"):
        (cache / folder).mkdir()
        (cache / folder / "lead.json").write_bytes(b"gone")
    report = tc.repair(cache, remove_strays=True)
    assert (report.ok, report.removed) == (True, ("builders/lead.json", "claims/lead.json"))
    assert tree(cache) == before
    assert not (cache / "claims").exists()
