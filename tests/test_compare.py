"""`compare`: paired seeds, an interval that is right, and results that are not trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_builds import numpy_source, toy_spec

import teacher_cache as tc
from student_train import CachedRows, ViewStream
from student_train.compare import compare
from student_train.comparison import Comparison, Difference, difference
from student_train.data import LabelledRows, only
from student_train.evaluate import accuracy, measure
from student_train.held_out import split
from student_train.opening import open_data
from student_train.recipes import CompareSpec, StudentSpec
from student_train.students import open_student
from teacher_cache.errors import MismatchError, RequestError, SpecError, TeacherCacheError
from teacher_cache.spec import NumpySource, ViewSpec, parse
from teacher_cache.views import normalize


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
    assert Difference("a", "b", "kl", 0.0, 0.0, 0.0).significant is False


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


class TestHeldOut:
    """What is chosen is chosen on rows that nothing was trained on, and the test data is seen once."""

    def spec(self, run: Path, built: Path, arrays: Path, **changes: Any) -> CompareSpec:
        described = compare_spec(run, built, arrays).model_dump(mode="json")
        return parse(CompareSpec, {**described, "validation": {"share": 0.3}, **changes}, "test")

    def test_no_batch_has_a_held_out_row(self, built: Path, arrays: Path, tmp_path: Path) -> None:
        opened = open_data(self.spec(tmp_path, built, arrays))
        assert opened.validation is not None
        held = set(opened.validation.alive.tolist())
        trained = {row for batch in ViewStream(opened.train, batch_size=4) for row in batch.rows_B.tolist()}
        assert held
        assert trained
        assert not held & trained
        assert held | trained == set(np.flatnonzero(tc.open(built).alive).tolist())

    def test_the_test_data_is_measured_after_the_last_epoch_only(
        self, built: Path, arrays: Path, tmp_path: Path
    ) -> None:
        comparison = compare(self.spec(tmp_path, built, arrays))
        for seeds in comparison.history.values():
            for history in seeds:
                assert ["accuracy" in entry for entry in history] == [False, True]
                assert all(0 <= entry["validation_accuracy"] <= 1 for entry in history)
        assert comparison.chosen in comparison.history

    def test_the_choice_is_by_the_held_out_rows(self, built: Path, arrays: Path, tmp_path: Path) -> None:
        """Even where the test data would choose another arm."""
        spec = self.spec(tmp_path, built, arrays)
        ends = {"ce": (0.9, 0.1), "same": (0.2, 0.5), "kd": (0.3, 0.4)}
        history = {arm: [[{"accuracy": test, "validation_accuracy": held}]] * 2 for arm, (test, held) in ends.items()}
        assert Comparison(history, spec).chosen == "same"

    def test_a_row_stays_where_it_is_when_others_come(self, arrays: Path) -> None:
        rows = LabelledRows(NumpySource.model_validate(numpy_source(arrays)), ViewSpec(recipe=()))
        _, held = split(rows, 0.4, 7)
        fewer = only(rows, rows.alive[: len(rows.alive) // 2])
        _, held_of_fewer = split(fewer, 0.4, 7)
        assert held_of_fewer.tolist() == [row for row in held.tolist() if row < len(fewer.alive)]
        assert split(rows, 0.4, 8)[1].tolist() != held.tolist()

    def test_a_part_must_not_be_empty(self, arrays: Path) -> None:
        rows = LabelledRows(NumpySource.model_validate(numpy_source(arrays)), ViewSpec(recipe=()))
        with pytest.raises(SpecError, match="both parts"):
            split(rows, 1e-9, 0)

    def test_held_out_rows_must_not_be_mixed_into_others(self, arrays: Path, tmp_path: Path) -> None:
        views = {"recipe": [{"mixup": {"alpha": 1.0}}], "count": 1}
        tc.build(toy_spec(tmp_path / "mixed", arrays, views=views), executor="serial")
        with pytest.raises(SpecError, match="hold out"):
            open_data(self.spec(tmp_path, tmp_path / "mixed", arrays))


class TestAgainstTheTeacher:
    def clean(self, path: Path, arrays: Path, **changes: Any) -> Path:
        tc.build(toy_spec(path, arrays, views={"recipe": [], "count": 1}, **changes), executor="serial")
        return path

    @pytest.mark.parametrize(
        "encoding", ["dense_f16", {"kind": "dense_u8"}, {"kind": "top_k", "k": 3}], ids=["f16", "u8", "top_k"]
    )
    def test_agreement_and_divergence_are_those_of_the_logits(
        self, encoding: Any, arrays: Path, tmp_path: Path
    ) -> None:
        cache = self.clean(tmp_path / "clean", arrays, teacher__fields={"logits": {"encoding": encoding}})
        rows = CachedRows(tc.open(cache))
        student = open_student(StudentSpec(model="small_cnn", arguments={"width": 4}), 10, 1, seed=0).eval()
        found = measure(student, rows, None, teacher="logits", batch_size=5)
        views = tc.open(cache).render(0, rows.alive)
        with torch.no_grad():
            ours_BC = student(normalize(views, None))
        log_p_BC = tc.open(cache).read("logits", 0, rows.alive).log_probs(1.0)
        assert found.agreement == pytest.approx(float((ours_BC.argmax(1) == log_p_BC.argmax(1)).float().mean()))
        divergence = (log_p_BC.exp() * (log_p_BC - ours_BC.log_softmax(1))).sum(1).mean()
        assert found.kl == pytest.approx(float(divergence), rel=1e-4)
        assert found.accuracy == pytest.approx(accuracy(student, rows, None))

    def test_a_comparison_says_it_of_every_arm(self, built: Path, arrays: Path, tmp_path: Path) -> None:
        cache = self.clean(tmp_path / "clean", arrays)
        described = compare_spec(tmp_path / "run", built, arrays).model_dump(mode="json")
        spec = parse(CompareSpec, {**described, "evaluate": {"cache": str(cache)}}, "test")
        comparison = compare(spec)
        assert comparison.measures == ("accuracy", "agreement", "kl")
        assert {(item.arm, item.measure) for item in comparison.differences} == {
            (arm, measure) for arm in ("same", "kd") for measure in comparison.measures
        }
        written = json.loads((tmp_path / "run" / "result.json").read_text())
        assert written["arms"]["kd"]["kl"] == comparison.values("kl", "kd")
        assert (tmp_path / "run" / "result.png").read_bytes().startswith(b"\x89PNG")

    def test_a_field_that_is_not_there_is_refused_first(self, built: Path, arrays: Path, tmp_path: Path) -> None:
        cache = self.clean(tmp_path / "clean", arrays)
        described = compare_spec(tmp_path / "run", built, arrays).model_dump(mode="json")
        evaluate = {"cache": str(cache), "teacher": "logit"}
        with pytest.raises(MismatchError, match="logits"):
            compare(parse(CompareSpec, {**described, "evaluate": evaluate}, "test"))


def test_the_first_views_alone_are_used(built: Path) -> None:
    frozen = CachedRows(tc.open(built), first_views=1)
    stream = ViewStream(frozen, batch_size=8)
    shown = {int(view) for _ in range(3) for batch in stream for view in batch.view_B}
    assert shown == {0}
    assert frozen.fingerprint != CachedRows(tc.open(built)).fingerprint
    with pytest.raises(SpecError, match="first_views"):
        CachedRows(tc.open(built), first_views=99)


@pytest.mark.parametrize(("ours", "theirs"), [([0.6, 0.6], [0.5, 0.5]), ([0.7, 0.6], [0.6, 0.5])])
def test_pairs_that_do_not_differ_say_nothing_of_chance(ours: list[float], theirs: list[float]) -> None:
    """Two seeds on a small test set often end alike: an interval of no width is no certainty."""
    found = difference("kd", ours, "ce", theirs)
    assert found.mean == pytest.approx(0.1)
    assert not found.spread
    assert not found.significant


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": [0, 0]}, "must be different"),
        ({"seeds": [-1, 0]}, "seeds"),
        ({"arms": {"../out": [{"kind": "kd"}], "b": [{"kind": "kd"}]}}, "arms"),
        ({"arms": {"result.json": [{"kind": "kd"}], "b": [{"kind": "kd"}]}}, "arms"),
        ({"train": {"epochs": 1, "optimizer": "adamw", "momentum": 0.5}}, "momentum"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(
    change: dict[str, Any], said: str, built: Path, arrays: Path, tmp_path: Path
) -> None:
    described = compare_spec(tmp_path / "run", built, arrays).model_dump(mode="json")
    with pytest.raises(RequestError, match=said):
        parse(CompareSpec, {**described, **change}, "test")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": ["horizontal_flip"]}, r"evaluate\.views.*one view with nothing random"),
        ({"recipe": [{"normalize": {"mean": [0.9], "std": [0.1]}}]}, r"evaluate\.views\.recipe\.normalize"),
    ],
)
def test_what_cannot_be_measured_on_is_refused_before_anybody_trains(
    change: dict[str, Any], said: str, built: Path, arrays: Path, tmp_path: Path
) -> None:
    """With rows held out the evaluation data comes last: its mistakes must not."""
    described = compare_spec(tmp_path / "run", built, arrays).model_dump(mode="json")
    evaluate = {"source": numpy_source(arrays), "views": change}
    spec = parse(CompareSpec, {**described, "evaluate": evaluate, "validation": {"share": 0.3}}, "test")
    with pytest.raises(RequestError, match=said):
        compare(spec)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["evaluate", "validation"])
def test_an_arm_with_another_normalisation_than_what_it_is_measured_on_is_refused(
    where: str, built: Path, arrays: Path, tmp_path: Path
) -> None:
    """Arms share their data, and not how their students see it: the first one fits, the second does not."""
    ours, other = {"mean": [0.5], "std": [0.2]}, {"mean": [0.1], "std": [0.2]}
    described = compare_spec(tmp_path / "run", built, arrays).model_dump(mode="json")
    views = {"recipe": [{"normalize": ours}]}
    measured = {
        "evaluate": {"source": numpy_source(arrays), "views": views if where == "evaluate" else {"recipe": []}},
        "validation": {"share": 0.3, "views": views if where == "validation" else None},
    }
    terms = [{"kind": "cross_entropy"}]

    def spec(second: dict[str, Any]) -> CompareSpec:
        arms = {"ce": terms, "second": {"objective": terms, **second}}
        return parse(CompareSpec, {**described, "normalize": ours, **measured, "arms": arms}, "test")

    with pytest.raises(SpecError, match=rf"{where}\.views\.recipe\.normalize.*0\.1"):
        compare(spec({"normalize": other}))
    assert not (tmp_path / "run").exists()
    assert set(compare(spec({"normalize": ours})).history) == {"ce", "second"}
