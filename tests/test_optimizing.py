"""Steps of the optimiser: schedules, accumulation, clipping, precision, running averages; and going on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_terms import Net, cache, seeded
from torch import nn

import teacher_cache as tc
from student_train import KD, AttentionTransfer, Feature, Objective, TrainSpec, ViewStream, fit
from student_train.optimizing import Stepper, learning_rate_factor
from teacher_cache.errors import RequestError
from teacher_cache.spec import parse

__all__ = ["cache"]

CPU = torch.device("cpu")


def train(**changes: Any) -> TrainSpec:
    described = {"epochs": 2, "batch_size": 9, "lr": 0.1, "momentum": 0, "weight_decay": 0, "device": "cpu"}
    return parse(TrainSpec, described | changes, "test")


class TestSchedules:
    """What the learning rate is multiplied by."""

    def test_ends(self) -> None:
        assert learning_rate_factor(train(), 0) == 1
        assert learning_rate_factor(train(), 0.5) == pytest.approx(0.5)
        assert learning_rate_factor(train(), 1) == pytest.approx(0, abs=1e-12)
        assert learning_rate_factor(train(schedule="constant"), 0.7) == 1

    def test_steps(self) -> None:
        told = train(schedule="step", milestones=[0.25, 0.5], step_factor=0.2)
        found = [learning_rate_factor(told, place) for place in (0, 0.24, 0.25, 0.49, 0.5, 1)]
        assert found == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])

    def test_one_cycle_is_torch_s(self) -> None:
        """Its constants, at each of a thousand steps."""
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=1001, cycle_momentum=False)
        told = train(schedule="one_cycle")
        for step in range(1000):
            # Their peak is half a step early: at 0.3 · 1001 − 1.
            assert learning_rate_factor(told, step / 1000) == pytest.approx(theirs.get_last_lr()[0], abs=4e-3)
            optimizer.step()
            theirs.step()

    @given(place=st.floats(0, 0.1), schedule=st.sampled_from(["cosine", "constant", "step", "one_cycle"]))
    def test_warmup_is_a_line_to_where_the_schedule_is(self, place: float, schedule: str) -> None:
        warm, cold = train(schedule=schedule, warmup=0.1), train(schedule=schedule)
        assert learning_rate_factor(warm, place) == pytest.approx(
            place / 0.1 * learning_rate_factor(cold, 0.1), abs=1e-9
        )
        assert learning_rate_factor(warm, 0.1 + place) == learning_rate_factor(cold, 0.1 + place)

    @pytest.mark.parametrize(
        "wrong", [{"milestones": [0.5, 0.5]}, {"milestones": [0.7, 0.2]}, {"milestones": [1]}, {"warmup": 1}]
    )
    def test_nonsense_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(RequestError):
            train(schedule="step", **wrong)


def steps(told: TrainSpec, batches: int, losses: int) -> list[torch.Tensor]:
    """The weight of a student of one number after each batch; the gradients are 1, 2, 3, …"""
    student = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        student.weight.zero_()
    stepper = Stepper(student, [], told, batches, CPU)
    found = []
    for number in range(losses):
        stepper.take(student(torch.full((1, 1), float(number % batches + 1))).sum(), number % batches)
        found.append(student.weight.detach().clone())
    return found


def test_accumulated_gradients_are_the_mean_of_their_batches() -> None:
    """Five batches by twos: the last step of an epoch is made of one, as large as a step of its own."""
    found = steps(train(schedule="constant", accumulate=2), 5, 10)
    changes = [-float(after - before) / 0.1 for before, after in zip([torch.zeros(1, 1), *found], found, strict=False)]
    assert changes == pytest.approx([0, 1.5, 0, 3.5, 5] * 2, abs=1e-6)


def test_the_run_is_as_many_steps_as_are_made() -> None:
    told = train(accumulate=2)
    stepper = Stepper(nn.Linear(1, 1), [], told, 5, CPU)
    assert (stepper.total, stepper.progress, stepper.lr) == (6, 0, 0.1)
    student = nn.Linear(1, 1)
    stepper = Stepper(student, [], told, 5, CPU)
    for number in range(10):
        stepper.take(student(torch.ones(1, 1)).sum(), number % 5)
    assert (stepper.progress, stepper.lr) == (1, pytest.approx(0, abs=1e-9))


def test_a_gradient_is_clipped_with_all_weights_together() -> None:
    """The student's and the joint's are one vector."""
    student, joint = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    before = [student.weight.detach().clone(), joint.weight.detach().clone()]
    stepper = Stepper(student, joint.parameters(), train(schedule="constant", clip_norm=0.5, lr=1), 1, CPU)
    stepper.take((3 * student.weight + 4 * joint.weight).sum(), 0)
    moved = [
        float(old - new) for old, new in zip(before, [student.weight.detach(), joint.weight.detach()], strict=True)
    ]
    assert moved == pytest.approx([0.3, 0.4], abs=1e-6)


def test_the_average_is_kept_and_given_out(cache: Path) -> None:
    """After each step: decay · average + (1 − decay) · weights, buffers too; the student ends with it."""
    student = seeded(Net, True)
    stepper = Stepper(student, [], train(ema=0.75, schedule="constant"), 3, CPU)
    average = {name: value.clone() for name, value in student.state_dict().items()}
    for number in range(3):
        stepper.take(student(torch.full((2, 1, 8, 8), 0.1 * number)).square().mean(), number)
        for name, value in student.state_dict().items():
            # The first step begins the average.
            average[name] = value.clone() if number == 0 else average[name] + 0.25 * (value - average[name])
    for name, value in stepper.averaged.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, average[name], atol=1e-6), name
    plain, averaged = seeded(Net), seeded(Net)
    for one, ema in ((plain, None), (averaged, 0.9)):
        fit(one, ViewStream(tc.open(cache), batch_size=9), Objective([KD()]), train(ema=ema))
    assert not torch.equal(plain.head.weight, averaged.head.weight)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(precision: str, cache: Path) -> None:
    """The student computes in it, weights and losses stay float32, and the loss falls as in float32."""
    seen: set[torch.dtype] = set()
    ends = {}
    for told in ("float32", precision):
        student = seeded(Net)
        student.maps.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
        stream, run = ViewStream(tc.open(cache), batch_size=9), train(precision=told, epochs=10, lr=0.02)
        history = fit(student, stream, Objective([KD()]), run).history
        assert history[-1]["loss"] < history[0]["loss"]
        assert student.maps.weight.dtype == torch.float32
        ends[told] = history[-1]["loss"]
    assert seen == {torch.float32, getattr(torch, precision)}
    assert ends[precision] == pytest.approx(ends["float32"], rel=0.01)


def test_a_step_that_the_scaler_skips_is_no_step() -> None:
    """A gradient beyond float16, between two that fit: schedule, average and weights stay, the scale alone falls."""
    student = nn.Linear(1, 1, bias=False)
    stepper = Stepper(student, [], train(precision="float16", ema=0.9, momentum=0.9), 3, CPU)
    seen = []
    for number, size in enumerate((1.0, float("inf"), 1.0)):
        stepper.take(student(torch.ones(1, 1)).sum() * size, number)
        state = stepper.state_dict()
        average = {name: value.clone() for name, value in state["average"].items()}
        seen.append((stepper.progress, stepper.lr, float(student.weight.detach()), average, state["scaler"]["scale"]))
    first, skipped, last = seen
    assert skipped[:3] == first[:3]
    assert skipped[3] == first[3]
    assert skipped[4] == first[4] / 2
    assert [entry[0] for entry in (first, last)] == pytest.approx([1 / 6, 2 / 6])
    assert last[2] < first[2]
    assert last[1] < first[1]
    assert last[3]["n_averaged"] == 2 * first[3]["n_averaged"] == 2


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9, "clip_norm": 1.0}, {"accumulate": 2, "schedule": "one_cycle", "momentum": 0.9}]
)
def test_a_run_with_joints_goes_on_exactly(changes: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    """Stopped after every epoch: weights, projections, averages and schedule end with the same bits."""

    def run(folder: Path, stops: bool) -> dict[str, torch.Tensor]:
        told = train(epochs=3, lr=0.001, **changes)
        while True:
            student = seeded(Net)
            objective = Objective(
                [KD(), Feature("maps", "feature:stem", 1e-3), AttentionTransfer("maps", "attention:stem")]
            )
            stream = ViewStream(tc.open(cache), batch_size=9, fields=objective.fields)
            torch.manual_seed(7)

            def stop(_entry: dict[str, float]) -> None:
                if stops:
                    raise KeyboardInterrupt

            try:
                fit(student, stream, objective, told, folder=folder, run="r", log=stop)
            except KeyboardInterrupt:
                continue
            joints = {f"joint {name}": value for name, value in enumerate(objective.parameters())}
            return {**student.state_dict(), **joints}

    whole, stopped = run(tmp_path / "whole", False), run(tmp_path / "stopped", True)
    assert whole.keys() == stopped.keys()
    for name, value in whole.items():
        assert torch.equal(value, stopped[name]), name
