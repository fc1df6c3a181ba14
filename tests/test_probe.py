"""A micro-batch that does not fit into memory: halved where that is allowed, and only before a cache is begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy_builds import addition_of, toy_spec, tree
from typer.testing import CliRunner

import teacher_cache as tc
from teacher_cache.build import build
from teacher_cache.cli import app
from teacher_cache.cost import estimate
from teacher_cache.errors import BuildError, MismatchError, TeacherError
from teacher_cache.spec import BuildSpec


def spec_of(path: Path, arrays: Path, **changes: Any) -> BuildSpec:
    """16 rows in a micro-batch, and room for 4."""
    told = {"teacher__model": "toy_models:OutOfMemory", "teacher__micro_batch": 16, "compute__on_oom": "halve"}
    return toy_spec(path, arrays, **{**told, **changes})


def test_it_is_halved_until_it_fits(arrays: Path, tmp_path: Path) -> None:
    """The cache is that of the micro-batch that fits, in every byte but the note of what was asked for."""
    build(spec_of(tmp_path / "halved", arrays), "serial")
    build(spec_of(tmp_path / "asked", arrays, teacher__micro_batch=4, compute__on_oom="fail"), "serial")
    halved, asked = tree(tmp_path / "halved"), tree(tmp_path / "asked")
    assert {name for name in halved if halved[name] != asked.get(name)} == {"manifest.json"}
    one, other = addition_of(tmp_path / "halved"), addition_of(tmp_path / "asked")
    assert one.identity == other.identity
    assert one.model_copy(update={"micro_batch_asked": None}) == other
    assert (one.spec["teacher"]["micro_batch"], one.micro_batch_asked) == (4, 16)
    assert tc.open(tmp_path / "halved").spec.teacher.micro_batch == 4
    assert tc.verify(tmp_path / "halved", recompute=20).ok
    shown = CliRunner().invoke(app, ["describe", str(tmp_path / "halved")]).stdout
    assert "4 rows (16 asked for" in shown


def test_down_to_one_row_and_no_further(arrays: Path, tmp_path: Path) -> None:
    build(spec_of(tmp_path / "one", arrays, teacher__arguments={"room": 1}), "serial")
    assert addition_of(tmp_path / "one").spec["teacher"]["micro_batch"] == 1
    with pytest.raises(TeacherError, match=r"teacher\.micro_batch: must fit into memory.*found: 1\)"):
        build(spec_of(tmp_path / "none", arrays, teacher__arguments={"room": 0}), "serial")
    assert not (tmp_path / "none").exists()


def test_without_leave_it_fails(arrays: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"must fit into memory.*found: 16\)") as caught:
        build(spec_of(tmp_path / "cache", arrays, compute__on_oom="fail"), "serial")
    assert "on_oom: halve" in caught.value.hint
    assert not (tmp_path / "cache").exists()


def test_a_build_that_goes_on_takes_what_was_found(arrays: Path, tmp_path: Path) -> None:
    """It does not try more where there is room meanwhile, and not less where there is not: both change the bytes."""
    build(spec_of(tmp_path / "whole", arrays), "serial")
    path = tmp_path / "cache"

    def stop(done: int, _total: int, _built: int) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(spec_of(path, arrays), "serial", stop)
    manifest = addition_of(path)
    with pytest.raises(MismatchError, match="numerics"):
        build(spec_of(path, arrays, teacher__micro_batch=2), "serial")
    with pytest.raises(TeacherError, match=r"must fit into memory.*found: 8\)"):
        build(spec_of(path, arrays, teacher__micro_batch=8), "serial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toy_models.OutOfMemory.forward", lambda *_: pytest.fail("asked with more rows"))
        with pytest.raises(BaseException, match="asked with more rows"):
            build(spec_of(path, arrays), "serial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toy_models.OutOfMemory.forward", _no_room)
        with pytest.raises(TeacherError, match=r"must fit into memory.*found: 4\)"):
            build(spec_of(path, arrays), "serial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toy_models.OutOfMemory.__init__", _more_room)
        build(spec_of(path, arrays, compute__on_oom="fail"), "serial")
    assert addition_of(path).spec == manifest.spec
    assert tree(path) == tree(tmp_path / "whole")


def _no_room(_self: Any, images: Any) -> Any:
    import torch

    raise torch.OutOfMemoryError(f"no room for {len(images)}")


def _more_room(self: Any, room: int = 4, later: int | None = None) -> None:
    import toy_models

    toy_models.PixelSums.__init__(self)
    self.room, self.later = 64, later


@pytest.mark.parametrize("on_oom", ["fail", "halve"])
def test_a_worker_that_runs_out_later(on_oom: str, arrays: Path, tmp_path: Path) -> None:
    """The build ends and says what to do; a smaller micro-batch would be another cache."""
    arguments = {"room": 16, "later": 3}
    spec = spec_of(tmp_path / "cache", arrays, teacher__arguments=arguments, compute__on_oom=on_oom)
    with pytest.raises(BuildError, match=r"images/0 … images/7: ran out of memory on a micro-batch of 16") as caught:
        build(spec, "serial")
    assert "run the same command again" in caught.value.hint
    assert "teacher.micro_batch" in caught.value.hint


def test_while_an_encoding_is_chosen(arrays: Path, tmp_path: Path) -> None:
    """Planning asks for real answers there."""
    fields = {"logits": {"encoding": {"max_kl": 0.1}}}
    arguments = {"room": 16, "later": 3}
    spec = spec_of(tmp_path / "cache", arrays, teacher__fields=fields, teacher__arguments=arguments)
    with pytest.raises(TeacherError, match="must fit into memory"):
        build(spec, "serial")


def test_what_a_build_will_cost_is_measured_with_it(arrays: Path, tmp_path: Path) -> None:
    assert estimate(spec_of(tmp_path / "cache", arrays), 1).teacher_seconds_per_row > 0
