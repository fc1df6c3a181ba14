"""`abandon`: what was being added is gone, what was sealed is as it was, whenever it is killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import test_cli
from test_growing import STORES, Crashed, Data, Wish, cache_files, data, die_before
from toy_builds import tree

import teacher_cache as tc
from teacher_cache.build import build
from teacher_cache.errors import BuildError, CacheNotFoundError, SpecError

run = test_cli.run
__all__ = ["data"]

WISHES = {
    "views": Wish(views=3),
    "rows": Wish(rows=14),
    "field": Wish(fields=("logits", "feature:stem", "logits@k3")),
    "teacher": Wish(fields=("logits",), teacher="other"),
}


def stop_after(rows: int) -> Callable[[int, int, int], None]:
    def progress(_done: int, _total: int, built: int) -> None:
        if built >= rows:
            raise KeyboardInterrupt

    return progress


def begun(wish: Wish, path: Path, data: Data, kind: str) -> dict[str, str]:
    """A sealed cache, and an addition to it of which one shard is committed; gives the tree of before."""
    build(Wish().spec(path, data, store__kind=kind), "serial")
    before = tree(path)
    with pytest.raises(KeyboardInterrupt):
        build(wish.spec(path, data, store__kind=kind), "serial", stop_after(1))
    assert tree(path) != before
    return before


@STORES
@pytest.mark.parametrize("what", WISHES)
def test_the_cache_is_as_it_was(what: str, kind: str, data: Data, tmp_path: Path) -> None:
    """Byte for byte, without a folder too many; and grows in another way afterwards."""
    before = begun(WISHES[what], tmp_path / "cache", data, kind)
    folders = {path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("*") if path.is_dir()}
    report = tc.abandon(tmp_path / "cache")
    assert (report.addition, report.shards) == (1, 1)
    assert report.files > 0
    assert tree(tmp_path / "cache") == before
    left = {path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("*") if path.is_dir()}
    assert left < folders
    assert tc.verify(tmp_path / "cache").ok
    other = Wish(views=3, fields=("logits",)).spec(tmp_path / "cache", data, store__kind=kind)
    assert build(other, "serial").shards_built == 3


@STORES
def test_killed_at_any_change(kind: str, data: Data, tmp_path: Path) -> None:
    """The same command goes on; readers of what is sealed never notice."""
    before = begun(WISHES["views"], tmp_path / "begun", data, kind)
    point = 0
    while True:
        path = shutil.copytree(tmp_path / "begun", tmp_path / f"{point}")
        with pytest.MonkeyPatch.context() as patch:
            try:
                die_before(patch, point)
                tc.abandon(path)
                break
            except Crashed:
                pass
        assert len(tc.open(path, sealed=True).read("logits", 1, range(9)).dense().values) == 9
        if tc.open(path).manifest.state == "building":
            tc.abandon(path)
        else:
            with pytest.raises(SpecError, match="everything is sealed"):
                tc.abandon(path)
        assert cache_files(path) == before, point
        point += 1
    assert point > 10


def test_nothing_to_give_up(data: Data, tmp_path: Path) -> None:
    """A sealed cache, and one that is being begun: the error says what to do instead."""
    build(Wish().spec(tmp_path / "sealed", data), "serial")
    before = tree(tmp_path / "sealed")
    with pytest.raises(SpecError, match=r"everything is sealed.*There is nothing to give up"):
        tc.abandon(tmp_path / "sealed")
    assert tree(tmp_path / "sealed") == before
    with pytest.raises(KeyboardInterrupt):
        build(Wish().spec(tmp_path / "first", data), "serial", stop_after(1))
    with pytest.raises(SpecError, match="Remove the whole cache"):
        tc.abandon(tmp_path / "first")


def test_not_while_it_is_built(data: Data, tmp_path: Path) -> None:
    path, errors = tmp_path / "cache", list[BuildError]()
    build(Wish().spec(path, data), "serial")

    def progress(_done: int, _total: int, built: int) -> None:
        if built and not errors:
            with pytest.raises(BuildError, match="while another process builds it") as caught:
                tc.abandon(path)
            errors.append(caught.value)

    build(Wish(views=3).spec(path, data), "serial", progress)
    assert errors
    assert tc.verify(path).ok


def test_the_command(run: test_cli.Run, data: Data, tmp_path: Path) -> None:
    before = begun(WISHES["views"], tmp_path / "cache", data, "zarr")
    code, out, _ = run("teacher-cache", "abandon", str(tmp_path / "cache"))
    assert code == 0
    assert "given up" in out
    assert tree(tmp_path / "cache") == before
    code, _, error = run("teacher-cache", "abandon", str(tmp_path / "cache"))
    assert code == 2
    assert "everything is sealed" in error


def test_nothing_of_a_builder_that_was_killed_stays(data: Data, tmp_path: Path) -> None:
    """Its lease and its claims are no part of the cache that is left."""
    before = begun(WISHES["views"], tmp_path / "cache", data, "zarr")
    for folder, name in (("builders", "0" * 32), ("claims", "v0002-s000001")):
        (tmp_path / "cache" / folder).mkdir()
        (tmp_path / "cache" / folder / f"{name}.json").write_bytes(b"gone")
    tc.abandon(tmp_path / "cache")
    assert tree(tmp_path / "cache") == before
    assert tc.verify(tmp_path / "cache").ok


def test_where_there_is_no_cache_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError):
        tc.abandon(tmp_path / "typo" / "path")
    assert list(tmp_path.iterdir()) == []
