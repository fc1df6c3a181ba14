"""The training loop: it learns, it stops and goes on exactly, and what it leaves behind is a plain student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_builds import numpy_source, toy_spec

import student_train
import teacher_cache as tc
from student_train import KD, Batch, CrossEntropy, Objective, TrainSpec, ViewStream, fit
from student_train import terms as tc_terms
from student_train.checkpoint import load_checkpoint, save_model
from student_train.evaluate import accuracy
from student_train.opening import open_data
from student_train.recipes import FitSpec, StudentSpec
from student_train.run import _run_fingerprint, evaluate_weights, rehearse_one, train_one
from student_train.students import open_student
from teacher_cache.encodings import DenseTarget
from teacher_cache.errors import CacheNotFoundError, MismatchError, NonFiniteError, SpecError
from teacher_cache.spec import parse
from teacher_cache.teachers.weights import read_state_dict

TRAIN = TrainSpec(epochs=3, batch_size=8, lr=0.05, device="cpu")
SMALL = StudentSpec(model="small_cnn", arguments={"width": 4})


def fit_spec(run: Path, built: Path, arrays: Path, **changes: Any) -> FitSpec:
    described: dict[str, Any] = {
        "run": str(run),
        "data": {"cache": str(built)},
        "student": SMALL.model_dump(),
        "train": TRAIN.model_dump(),
        "evaluate": {"source": numpy_source(arrays), "views": {"recipe": []}},
        "objective": [{"kind": "kd", "temperature": 2}, {"kind": "cross_entropy", "weight": 0.1}],
    }
    return parse(FitSpec, {**described, **changes}, "test")


def weights(student: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in student.state_dict().values()])


def test_the_loss_falls(built: Path) -> None:
    student = open_student(SMALL, 10, 1, seed=0)
    stream = ViewStream(tc.open(built), batch_size=8)
    result = fit(student, stream, Objective([KD(temperature=2)]), TRAIN.model_copy(update={"epochs": 12}))
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    assert [entry["epoch"] for entry in result.history] == list(range(1, 13))
    entry = result.history[0]
    assert entry["seconds"] == pytest.approx(entry["data_seconds"] + entry["step_seconds"])


def test_the_objective_is_the_weighted_sum() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    target = DenseTarget(torch.randn(4, 10, generator=torch.Generator().manual_seed(1)))
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    batch = Batch(0, 0, 0, np.arange(4), images, torch.arange(4), {"logits": target})
    loss, values = Objective([KD(weight=0.9, temperature=3), CrossEntropy(weight=0.1)])(logits, batch)
    assert float(loss) == pytest.approx(0.9 * float(values["kd"]) + 0.1 * float(values["cross_entropy"]))
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    assert float(values["cross_entropy"]) == pytest.approx(float(expected))


def test_a_cache_that_grows_meanwhile(arrays: Path, tmp_path: Path) -> None:
    """Trained on what is sealed; a cache of which nothing is sealed yet is refused before the first batch."""

    def stop(_done: int, _total: int, built: int) -> None:
        if built:
            raise KeyboardInterrupt

    path = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        tc.build(toy_spec(path, arrays), "serial", stop)
    spec = fit_spec(tmp_path / "run", path, arrays)
    with pytest.raises(CacheNotFoundError, match=r"must have a part that is sealed.*Finish the build"):
        open_data(spec)
    tc.build(toy_spec(path, arrays), "serial")
    with pytest.raises(KeyboardInterrupt):
        tc.build(toy_spec(path, arrays, views__count=3), "serial", stop)
    assert (tc.open(path).views, open_data(spec).train.views) == (3, 2)
    assert len(train_one(spec, open_data(spec), spec.objective, 0, tmp_path / "run").history) == TRAIN.epochs


def test_a_run_that_was_stopped_ends_with_the_same_bits(built: Path, arrays: Path, tmp_path: Path) -> None:
    """Stopped after each epoch in turn by an exception from the log, as by Ctrl-C."""
    spec = fit_spec(tmp_path / "whole", built, arrays)
    opened = open_data(spec)
    whole = train_one(spec, opened, spec.objective, 0, tmp_path / "whole")
    stopped = tmp_path / "stopped"

    def stop(entry: dict[str, float]) -> None:
        raise KeyboardInterrupt

    for _ in range(TRAIN.epochs):
        with pytest.raises(KeyboardInterrupt):
            train_one(spec, opened, spec.objective, 0, stopped, stop)
    resumed = train_one(spec, opened, spec.objective, 0, stopped)
    for name in ("loss", "kd", "accuracy", "lr"):
        assert [entry[name] for entry in resumed.history] == [entry[name] for entry in whole.history]
    a, b = (read_state_dict(str(folder / "model.safetensors")) for folder in (tmp_path / "whole", stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_a_checkpoint_of_another_configuration_is_refused(built: Path, arrays: Path, tmp_path: Path) -> None:
    spec = fit_spec(tmp_path, built, arrays)
    train_one(spec, open_data(spec), spec.objective, 0, tmp_path)
    other = fit_spec(tmp_path, built, arrays, objective=[{"kind": "cross_entropy"}])
    with pytest.raises(MismatchError, match=r"checkpoint\.pt"):
        train_one(other, open_data(other), other.objective, 0, tmp_path)


def test_a_cache_that_was_built_again_for_another_teacher_is_other_data(arrays: Path, tmp_path: Path) -> None:
    """Same path, other weights: the finished student of the old teacher must not be handed out."""
    spec = fit_spec(tmp_path / "run", tmp_path / "cache", arrays)
    for scale in (1.0, 2.0):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        tc.build(toy_spec(tmp_path / "cache", arrays, teacher__arguments={"scale": scale}), executor="serial")
        if scale == 1.0:
            train_one(spec, open_data(spec), spec.objective, 0, tmp_path / "run")
    with pytest.raises(MismatchError, match=r"checkpoint\.pt"):
        train_one(spec, open_data(spec), spec.objective, 0, tmp_path / "run")


def test_checkpoints_need_a_name(built: Path, tmp_path: Path) -> None:
    student, stream = open_student(SMALL, 10, 1, seed=0), ViewStream(tc.open(built), batch_size=8)
    with pytest.raises(SpecError, match="run"):
        fit(student, stream, Objective([KD()]), TRAIN, folder=tmp_path)


def test_two_terms_of_one_kind_are_both_logged() -> None:
    logits = torch.zeros(2, 10)
    targets = {"logits": DenseTarget(torch.arange(20.0).view(2, 10))}
    batch = Batch(0, 0, 0, np.arange(2), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, targets)
    _, values = Objective([KD(temperature=1), KD(temperature=4)])(logits, batch)
    assert set(values) == {"kd_0", "kd_1"}
    assert values["kd_0"] != values["kd_1"]


def test_a_checkpoint_holds_a_plain_student(built: Path, arrays: Path, tmp_path: Path) -> None:
    spec = fit_spec(tmp_path, built, arrays)
    result = train_one(spec, open_data(spec), spec.objective, 0, tmp_path)
    raw = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    student = open_student(SMALL, 10, 1, seed=5)
    student.load_state_dict(raw["student"], strict=True)
    assert load_checkpoint(tmp_path, raw["run"]) is not None
    assert evaluate_weights(spec, tmp_path / "model.safetensors").accuracy == result.history[-1]["accuracy"]


def test_seeds_decide_initial_weights_and_nothing_global() -> None:
    before = torch.get_rng_state()
    a, b, c = (open_student(SMALL, 10, 1, seed) for seed in (1, 1, 2))
    assert torch.equal(weights(a), weights(b))
    assert not torch.equal(weights(a), weights(c))
    assert torch.equal(before, torch.get_rng_state())


def test_an_objective_that_the_stream_cannot_feed_is_refused(built: Path) -> None:
    student = open_student(SMALL, 10, 1, seed=0)
    stream = ViewStream(tc.open(built), batch_size=8, fields=())
    with pytest.raises(SpecError, match=r"stream\.fields"):
        fit(student, stream, Objective([KD()]), TRAIN)


def test_a_loss_that_is_not_finite_stops_the_run(built: Path) -> None:
    student = open_student(SMALL, 10, 1, seed=0)
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"train\.lr"):
        fit(student, ViewStream(tc.open(built), batch_size=8), Objective([KD()]), TRAIN)


def test_accuracy_is_measured_in_evaluation_mode(arrays: Path, built: Path, tmp_path: Path) -> None:
    """Batch norm in training mode would make it depend on the batch; the mode is put back."""
    opened = open_data(fit_spec(tmp_path, built, arrays))
    student = open_student(SMALL, 10, 1, seed=0).train()
    found = {accuracy(student, opened.test, None, batch_size=size) for size in (1, 5, 27)}
    assert len(found) == 1
    assert student.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": []}, "objective"),
        ({"objective": [{"kind": "kd", "temperature": 0}]}, "temperature"),
        ({"objective": [{"kind": "kd", "temprature": 2}]}, "Did you mean `temperature`"),
        ({"train": {"epochs": 0}}, r"train\.epochs"),
        ({"data": {}}, "cache"),
        ({"stduent": {}}, "stduent"),
    ],
)
def test_wrong_configurations_are_refused(
    change: dict[str, Any], message: str, built: Path, arrays: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        fit_spec(tmp_path, built, arrays, **change)


def test_save_model_writes_what_a_teacher_can_load(tmp_path: Path) -> None:
    student = open_student(SMALL, 10, 1, seed=3)
    state = read_state_dict(str(save_model(tmp_path, student)))
    assert set(state) == set(student.state_dict())


def test_threads_are_set_while_training_and_put_back(built: Path, arrays: Path, tmp_path: Path) -> None:
    spec = fit_spec(tmp_path, built, arrays, train={**TRAIN.model_dump(), "threads": 1})
    before, seen = torch.get_num_threads(), []
    train_one(spec, open_data(spec), spec.objective, 0, tmp_path, lambda entry: seen.append(torch.get_num_threads()))
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("ema", [None, 0.9])
def test_features_and_an_evaluation(ema: float | None, built: Path, arrays: Path, tmp_path: Path) -> None:
    """The evaluation runs the student too, in several batches, and the average is a copy of it."""
    train = TRAIN.model_copy(update={"ema": ema, "epochs": 2}).model_dump()
    objective = [{"kind": "cross_entropy"}, {"kind": "feature", "node": "stem", "field": "feature:stem"}]
    spec = fit_spec(tmp_path, built, arrays, train=train, objective=objective)
    result = train_one(spec, open_data(spec), spec.objective, 0, tmp_path)
    assert set(result.history[-1]) >= {"feature", "cross_entropy", "accuracy"}
    assert evaluate_weights(spec, tmp_path / "model.safetensors").accuracy == result.history[-1]["accuracy"]


def test_a_run_of_an_earlier_release_goes_on(built: Path, arrays: Path, tmp_path: Path) -> None:
    """What it could not be told is no part of its name as long as it says nothing."""
    spec = fit_spec(tmp_path, built, arrays)
    opened, seen = open_data(spec), list[dict[str, Any]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("student_train.run.fingerprint", lambda _kind, _version, body: seen.append(body) or "name")
        _run_fingerprint(spec, opened, spec.objective, 0)
        other = fit_spec(tmp_path, built, arrays, train={**TRAIN.model_dump(), "ema": 0.9, "warmup": 0.1})
        _run_fingerprint(other, opened, other.objective, 0)
    now, later = seen
    assert set(now["train"]) == {
        *("epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "schedule", "drop_last"),
        *("check_views", "views_per_decode", "threads"),
    }
    assert now["terms"][0] == {"kind": "kd", "weight": 1.0, "temperature": 2.0, "field": "logits"}
    assert set(later["train"]) - set(now["train"]) == {"ema", "warmup"}


def test_terms_that_keep_something_are_configured_and_go_on(arrays: Path, tmp_path: Path) -> None:
    """A temperature, projections, a queue and a second backward pass, beside each other in one run."""
    fields = {"logits": None, "feature:second": {"pool": "mean"}, "flow:first,second": None, "saliency": None}
    tc.build(toy_spec(tmp_path / "cache", arrays, teacher__model="toy_models:Stages", teacher__fields=fields), "serial")
    objective = [
        {"kind": "ctkd", "rise": 0.5},
        {"kind": "flow", "nodes": ["first", "second"], "field": "flow:first,second"},
        {"kind": "seed", "node": "second", "field": "feature:second", "queue": 40},
        {"kind": "saliency", "weight": [[0, 0], [0.3, 0], [0.3, 1]]},
    ]
    student = {"model": "toy_models:Stages", "arguments": {"widths": [2, 4]}}
    spec = fit_spec(tmp_path / "whole", tmp_path / "cache", arrays, objective=objective, student=student)
    opened = open_data(spec)
    rehearse_one(spec, opened, spec.objective, 0)
    whole = train_one(spec, opened, spec.objective, 0, tmp_path / "whole")
    assert set(whole.history[-1]) >= {"ctkd", "flow", "seed", "saliency", "accuracy"}

    def stop(_entry: dict[str, float]) -> None:
        raise KeyboardInterrupt

    for _ in range(TRAIN.epochs):
        with pytest.raises(KeyboardInterrupt):
            train_one(spec, opened, spec.objective, 0, tmp_path / "stopped", stop)
    train_one(spec, opened, spec.objective, 0, tmp_path / "stopped")
    a, b = (read_state_dict(str(tmp_path / name / "model.safetensors")) for name in ("whole", "stopped"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {name.split(".")[0] for name in a} == {"first", "second", "head"}


def test_another_normalisation_is_another_run(built: Path, arrays: Path, tmp_path: Path) -> None:
    """Views of the student's own bring it along; a checkpoint of the one must not go on with the other."""
    names = set()
    for mean in (0.5, 0.1):
        views = {"recipe": [{"normalize": {"mean": [mean], "std": [0.5]}}]}
        spec = fit_spec(tmp_path, built, arrays, data={"cache": str(built), "views": views})
        names.add(_run_fingerprint(spec, open_data(spec), spec.objective, 0))
    assert len(names) == 2


class TestWhereARunBegins:
    def test_a_stream_that_was_used_is_refused(self, built: Path) -> None:
        stream = ViewStream(tc.open(built), batch_size=8)
        fit(open_student(SMALL, 10, 1, seed=0), stream, Objective([KD()]), TRAIN)
        with pytest.raises(SpecError, match="must be at its beginning"):
            fit(open_student(SMALL, 10, 1, seed=0), stream, Objective([KD()]), TRAIN)

    def test_gradients_that_were_left_are_no_part_of_the_first_step(self, built: Path) -> None:
        ends = []
        for left in (False, True):
            student = open_student(SMALL, 10, 1, seed=0)
            if left:
                for weight in student.parameters():
                    weight.grad = torch.ones_like(weight)
            fit(student, ViewStream(tc.open(built), batch_size=8), Objective([KD()]), TRAIN)
            ends.append(weights(student))
        assert torch.equal(*ends)

    def test_the_metrics_are_those_of_the_checkpoint(self, built: Path, arrays: Path, tmp_path: Path) -> None:
        """As after a kill between the one and the other."""
        spec = fit_spec(tmp_path, built, arrays)
        train_one(spec, open_data(spec), spec.objective, 0, tmp_path)
        whole = (tmp_path / "metrics.jsonl").read_text()
        (tmp_path / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:1]))
        train_one(spec, open_data(spec), spec.objective, 0, tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_weights_that_are_not_finite_are_not_kept(built: Path, tmp_path: Path) -> None:
    """The last step of an epoch can break them after its loss was fine."""

    def poison(student: torch.nn.Module, _epoch: int) -> dict[str, float]:
        with torch.no_grad():
            next(student.parameters()).fill_(float("nan"))
        return {}

    with pytest.raises(NonFiniteError, match="weights"):
        fit(
            open_student(SMALL, 10, 1, seed=0),
            ViewStream(tc.open(built), batch_size=8),
            Objective([KD()]),
            TRAIN,
            evaluate=poison,
            folder=tmp_path,
            run="test",
        )
    assert not (tmp_path / "checkpoint.pt").exists()


def test_weights_that_are_shared_can_be_saved(tmp_path: Path) -> None:
    shared = torch.nn.Linear(3, 3)
    student = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    state = read_state_dict(str(save_model(tmp_path, student)))
    assert all(torch.equal(state[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: KD(temperature=float("inf")),
        lambda: tc_terms.DIST(rows_weight=0, classes_weight=0),
        lambda: tc_terms.DKD(label_weight=-1, others_weight=0),
        lambda: tc_terms.NKD(others_weight=-1),
        lambda: student_train.Feature(node="a", field="b", distance="l2"),  # type: ignore[arg-type]
        lambda: student_train.Feature(node="a", field="b", kernel=2),  # type: ignore[arg-type]
        lambda: student_train.EnsembleKD(fields=("a", "b"), mean_of="median"),  # type: ignore[arg-type]
    ],
)
def test_terms_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(SpecError):
        make()
