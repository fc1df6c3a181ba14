"""Several processes train one student: as one alone would, from where one or more have stopped, and all end alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_builds import numpy_source
from toy_students import Net, seeded, trained

import teacher_cache as tc
from student_train import KD, Feature, Objective, Schedule, Share, ViewStream
from student_train.learner import Learner, has_idle_parts
from student_train.opening import open_data
from student_train.recipes import FitSpec
from student_train.run import train_one
from student_train.terms import CrossEntropy
from student_train.together import World, joining
from teacher_cache.errors import SpecError
from teacher_cache.spec import parse
from teacher_cache.teachers.weights import read_state_dict

OBJECTIVE = [
    {"kind": "kd", "temperature": 2},
    {"kind": "cross_entropy", "weight": 0.1},
    {"kind": "seed", "node": "maps", "field": "feature:stem", "queue": 20, "weight": 0.1},
    {"kind": "feature", "node": "maps", "field": "feature:stem", "weight": [[0, 1], [0.75, 1], [0.75, 0]]},
]


def described(run: Path, built: Path, arrays: Path) -> dict[str, Any]:
    """Everything at once: a projection that is idle in the last quarter, clipping, accumulation, an average."""
    train = {"epochs": 4, "batch_size": 6, "lr": 0.05, "clip_norm": 1, "accumulate": 2, "ema": 0.9, "device": "cpu"}
    return {
        "run": str(run),
        "data": {"cache": str(built)},
        "student": {"model": "toy_students:student"},
        "train": {**train, "view_order": "random"},
        "evaluate": {"source": numpy_source(arrays), "views": {"recipe": []}},
        "objective": OBJECTIVE,
    }


ZARR = pytest.mark.parametrize("built", ["zarr"], indirect=True)
"""Where the store has no part in it."""


def launch(config: Path, processes: int = 2) -> str:
    """`torchrun`, as a user would; what was written on standard output."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*run, "-m", "student_train.cli", "fit", str(config), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def fit_alone(described: dict[str, Any], stop_after: int | None = None) -> list[dict[str, float]]:
    spec = parse(FitSpec, described, "test")

    def log(entry: dict[str, float]) -> None:
        if entry["epoch"] == stop_after:
            raise KeyboardInterrupt

    return train_one(spec, open_data(spec), spec.objective, 0, Path(spec.run), log).history


def written(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@ZARR
def test_two_processes_train_what_one_does_and_go_on_where_one_stopped(
    built: Path, arrays: Path, tmp_path: Path
) -> None:
    """Their gradients are added in another order, so weights differ by rounding and no more."""
    alone = fit_alone(described(tmp_path / "alone", built, arrays))
    both = described(tmp_path / "both", built, arrays)
    with pytest.raises(KeyboardInterrupt):
        fit_alone(both, stop_after=1)
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(both))
    said = launch(tmp_path / "fit.yaml")
    history = written(tmp_path / "both")
    assert json.loads(said)["loss"] == history[-1]["loss"]
    assert len(history) == len(alone) == 4
    for ours, theirs in zip(alone, history, strict=True):
        for name in (
            "loss",
            "kd",
            "cross_entropy",
            "seed",
            "accuracy",
            "lr",
            *(["feature"] if ours["epoch"] < 4 else []),
        ):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), (ours["epoch"], name)
    one, other = (read_state_dict(str(tmp_path / name / "model.safetensors")) for name in ("alone", "both"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_a_world_of_one_changes_nothing() -> None:
    world = World()
    values = {"loss": (torch.tensor(6.0), 3)}
    assert world.summed(values, torch.device("cpu")) == {"loss": (6.0, 3.0)}
    assert (world.share, world.first, world.told({"a": 1.0})) == (Share(0, 1), True, {"a": 1.0})
    state = torch.get_rng_state()
    world.reseed(1, 2)
    assert torch.equal(torch.get_rng_state(), state)
    with joining("cpu") as joined:
        assert joined == world


def test_each_process_draws_numbers_of_its_own() -> None:
    """A student with dropout would otherwise drop the same places of every process's rows."""
    drawn = set()
    with torch.random.fork_rng():
        for rank in (1, 2, 3):
            for epoch in (0, 1):
                World(rank, 4).reseed(7, epoch)
                drawn.add(float(torch.rand(())))
                World(rank, 4).reseed(7, epoch)
                assert float(torch.rand(())) in drawn
    assert len(drawn) == 6


def test_a_stream_of_another_share_is_refused(built: Path) -> None:
    from student_train import Objective, TrainSpec, fit

    stream = ViewStream(tc.open(built), batch_size=8, drop_last=True, share=Share(1, 2))
    with pytest.raises(SpecError, match=r"stream\.share: must be 0 of 1"):
        fit(Net(), stream, Objective([CrossEntropy()]), TrainSpec(epochs=1, device="cpu"))


@ZARR
@pytest.mark.parametrize(("idle", "expected"), [(True, True), (False, False)])
def test_idle_weights_are_found_and_nothing_is_left_of_the_trial(built: Path, idle: bool, expected: bool) -> None:
    """`Net` has a layer that nothing runs through."""
    from student_train import Objective

    net = seeded(Net, True)
    if not idle:
        net.idle.requires_grad_(False)
    objective, stream = Objective([CrossEntropy()]), ViewStream(tc.open(built), batch_size=8)
    before, drawn = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    with objective.taps(net) as answer:
        assert has_idle_parts(Learner(net, answer, objective, None), stream.peek()) is expected
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert net.training


@ZARR
class TestCompiled:
    """`torch.compile` makes the forward pass; the student stays the plain module."""

    @pytest.mark.parametrize("terms", [[CrossEntropy()], [CrossEntropy(), Feature(node="maps", field="feature:stem")]])
    def test_a_compiled_run_is_the_same_up_to_rounding(
        self, terms: list[Any], built: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiled = []

        def with_eager(student: torch.nn.Module) -> Any:
            """Dynamo's tracing without a C++ compiler: what hooks and flags see is decided there."""
            compiled.append(student)
            return torch._dynamo.optimize("aot_eager")(student)

        plain, student, _ = trained(terms, built, epochs=2)
        monkeypatch.setattr(torch, "compile", with_eager)
        history, other, _ = trained(terms, built, epochs=2, compile=True)
        assert len(compiled) == 1
        assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in plain], rel=1e-5)
        assert list(student.state_dict()) == list(other.state_dict())
        for name, value in student.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-6)

    @pytest.mark.slow
    def test_inductor(self, built: Path) -> None:
        plain, _, _ = trained([CrossEntropy()], built, epochs=2)
        history, _, _ = trained([CrossEntropy()], built, epochs=2, compile=True)
        assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in plain], rel=1e-4)


@ZARR
class TestDeterministic:
    def test_it_holds_for_the_run_and_no_longer(self, built: Path) -> None:
        seen = []
        trained([CrossEntropy()], built, epochs=1, deterministic=True, log=lambda _: seen.append(_now()))
        trained([CrossEntropy()], built, epochs=1, log=lambda _: seen.append(_now()))
        assert seen == [True, False]
        assert _now() is False


def _now() -> bool:
    return torch.are_deterministic_algorithms_enabled()


@ZARR
def test_metrics_can_be_read_by_tensorboard(built: Path, arrays: Path, tmp_path: Path) -> None:
    """Also of a run that was stopped: each epoch is there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = {**described(tmp_path / "run", built, arrays), "tensorboard": True}
    with pytest.raises(KeyboardInterrupt):
        fit_alone(spec, stop_after=2)
    history = fit_alone(spec)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) >= {"loss", "kd", "accuracy", "data_seconds"}
    for name in ("loss", "accuracy"):
        points = [(event.step, event.value) for event in read.Scalars(name)]
        assert points == [(entry["epoch"], pytest.approx(entry[name])) for entry in history]


@ZARR
def test_the_time_split_adds_up(built: Path) -> None:
    history, _, _ = trained([CrossEntropy()], built)
    for entry in history:
        parts = [entry[name] for name in ("decode_seconds", "view_seconds", "target_seconds")]
        assert min(parts[:2]) > 0
        assert entry["seconds"] == pytest.approx(entry["data_seconds"] + entry["step_seconds"])
        assert sum(parts) <= entry["data_seconds"], "without workers, making batches is waiting for them"


def test_a_copy_of_a_compiled_student_that_is_listened_to_is_a_plain_student(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running average is such a copy: its hooks find a listener who is not listening."""
    monkeypatch.setattr(torch, "compile", lambda student: torch._dynamo.optimize("aot_eager")(student))
    terms = [CrossEntropy(), Feature(node="maps", field="feature:stem")]
    history, _, _ = trained(terms, built, epochs=1, compile=True, ema=0.9)
    assert len(history) == 1


def test_what_is_differentiated_twice_is_not_compiled(built: Path) -> None:
    from student_train import Saliency

    with pytest.raises(SpecError, match=r"train\.compile"):
        Objective([Saliency()]).taps(Net(), compiled=True)


def test_a_term_that_comes_and_goes_is_not_always_there() -> None:
    """With or without something that is trained beside it: parts of the student may be read by it alone."""
    assert Objective([CrossEntropy()]).always
    assert not Objective([CrossEntropy(), KD(weight=Schedule(((0, 1), (0.5, 0))))]).always
