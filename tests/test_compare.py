"""`compare`: paired seeds, an interval that is right, and results that are not trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_builds import numpy_source

from student_train import compare as module
from student_train.compare import compare, difference
from student_train.recipes import CompareSpec
from teacher_cache.errors import RequestError, TeacherCacheError
from teacher_cache.spec import parse


def compare_spec(run: Path, built: Path, arrays: Path) -> CompareSpec:
    described: dict[str, Any] = {
        "run": str(run),
        "data": {"cache": str(built)},
        "student": {"model": "small_cnn", "arguments": {"width": 4}},
        "train": {"epochs": 2, "batch_size": 8, "device": "cpu"},
        "evaluate": {"source": numpy_source(arrays), "views": {"recipe": []}},
        "arms": {"ce": [{"kind": "cross_entropy"}], "same": [{"kind": "cross_entropy"}], "kd": [{"kind": "kd"}]},
        "seeds": [3, 4],
    }
    return parse(CompareSpec, described, "test")


def test_the_interval_is_students_t() -> None:
    """Worked by hand: differences 1, 2, 3 have mean 2, s = 1, t(0.975, 2) = 4.3027, reach 4.3027/√3."""
    found = difference("kd", [2.0, 4.0, 6.0], "ce", [1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2)
    assert found.high - found.mean == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert not found.significant
    assert difference("kd", [2.0, 3.1, 4.0], "ce", [1.0, 2.0, 3.0]).significant


def test_equal_arms_are_equal_so_the_pairs_are_paired(built: Path, arrays: Path, tmp_path: Path) -> None:
    comparison = compare(compare_spec(tmp_path / "run", built, arrays))
    losses = {
        arm: [[entry["loss"] for entry in seed] for seed in history] for arm, history in comparison.history.items()
    }
    assert losses["ce"] == losses["same"] != losses["kd"]
    assert losses["ce"][0] != losses["ce"][1]
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written == json.loads(json.dumps(comparison.to_json()))
    # The last epoch counts, never the best.
    assert written["arms"]["kd"]["accuracy"] == [seed[-1]["accuracy"] for seed in comparison.history["kd"]]


def test_finished_cells_are_not_trained_again(
    built: Path, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = compare_spec(tmp_path / "run", built, arrays)
    first = compare(spec)
    seen: list[tuple[str, int]] = []
    again = compare(spec, lambda arm, seed, entry: seen.append((arm, seed)))
    assert seen == []
    assert again.accuracy == first.accuracy
    assert module.Difference("a", "b", 0.0, 0.0, 0.0).significant is False


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ({"kind": "feature", "node": "nowhere", "field": "feature:stem"}, "must be a module of the student"),
        ({"kind": "feature", "node": "head", "field": "feature:nope"}, "feature:nope"),
        ({"kind": "attention", "node": "stem", "field": "feature:stem"}, "attention.stem"),
    ],
)
def test_an_arm_that_cannot_be_trained_is_refused_before_the_first(
    term: dict[str, Any], said: str, built: Path, arrays: Path, tmp_path: Path
) -> None:
    """Fields, nodes and what they put out: nobody trains for hours before that is looked at."""
    spec = compare_spec(tmp_path / "run", built, arrays)
    arms = {"ce": [{"kind": "cross_entropy"}], "wrong": [{"kind": "cross_entropy"}, term]}
    spec = parse(CompareSpec, {**spec.model_dump(mode="json"), "arms": arms}, "test")
    with pytest.raises(TeacherCacheError, match=said):
        compare(spec)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"milestones": [0.3]}, "`milestones` is for `schedule: step`"),
        ({"step_factor": 0.5}, "is for `schedule: step`"),
    ],
)
def test_what_a_schedule_does_not_use_is_refused(
    train: dict[str, Any], said: str, built: Path, arrays: Path, tmp_path: Path
) -> None:
    body = compare_spec(tmp_path / "run", built, arrays).model_dump(mode="json")
    with pytest.raises(RequestError, match=said):
        parse(CompareSpec, {**body, "train": {**body["train"], **train}}, "test")


def test_a_wrong_weight_is_named_with_its_arm(built: Path, arrays: Path, tmp_path: Path) -> None:
    body = compare_spec(tmp_path / "run", built, arrays).model_dump(mode="json")
    arms = {**body["arms"], "kd": [{"kind": "kd", "weight": [[0.5, 1], [0.2, 1]]}]}
    with pytest.raises(RequestError, match=r"arms\.kd\.objective\.0.*weight.*in the order of progress"):
        parse(CompareSpec, {**body, "arms": arms}, "test")
