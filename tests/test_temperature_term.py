"""A learned temperature as a term: the student goes down its loss, θ goes up, and both go on from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_builds import toy_spec
from toy_students import Net, assert_resumes, images, seeded, trained

import teacher_cache as tc
from student_train import LearnedTemperatureKD, Objective, ViewStream, losses
from student_train.objective import Shapes
from student_train.stream import Batch
from student_train.train import rehearse
from teacher_cache.errors import MismatchError, SpecError

FIELDS = {"logits": {"encoding": "dense_f32"}, "logits@small": {"encoding": {"kind": "top_k", "k": 3}}}


@pytest.fixture(scope="module")
def cache(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits, dense and sparse."""
    path = tmp_path_factory.mktemp("temperature") / "cache"
    tc.build(toy_spec(path, arrays, teacher__fields=FIELDS), "serial")
    return path


@pytest.fixture
def batch(cache: Path) -> Batch:
    """All rows of one view."""
    return next(iter(ViewStream(tc.open(cache), batch_size=27)))


def at(batch: Batch, progress: float, **arguments: Any) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The value, and the gradients of θ and of the student's first layer."""
    student, objective = seeded(Net), Objective([LearnedTemperatureKD(**arguments)])
    objective.join(Shapes({}, {"logits": (10,)}))
    loss, values = objective(student(images(batch)), batch, progress)
    loss.backward()  # type: ignore[no-untyped-call]
    (theta,) = objective.parameters()
    assert theta.grad is not None
    return float(values["ctkd"]), theta.grad, student.maps.weight.grad


@pytest.mark.parametrize("start", [1.0, -2.0])
def test_it_is_soft_targets_at_its_temperature(start: float, batch: Batch) -> None:
    temperature = 1 + 20 / (1 + math.exp(-start))
    expected = losses.soft_target_loss(seeded(Net)(images(batch)), batch.targets["logits"], temperature)
    value, _, slope = at(batch, 0.5, start=start)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert slope.abs().sum() > 0


def test_the_gradient_of_theta_is_turned_round_by_a_weight_that_rises(batch: Batch) -> None:
    """Half a cosine over the first `rise` of the run; the student's own gradient does not depend on it."""
    theta = torch.tensor(1.0, requires_grad=True)
    logits = seeded(Net)(images(batch))
    losses.soft_target_loss(logits, batch.targets["logits"], losses.learned_temperature(theta)).backward()  # type: ignore[no-untyped-call]
    assert theta.grad is not None
    assert abs(float(theta.grad)) > 1e-5
    _, _, own = at(batch, 1.0, rise=0.4, weight=0.5)
    for progress, share in ((0.0, 0.0), (0.1, 0.14644661), (0.2, 0.5), (0.4, 1.0), (1.0, 1.0)):
        _, slope, students = at(batch, progress, rise=0.4, weight=0.5)
        assert float(slope) == pytest.approx(-0.5 * share * float(theta.grad), rel=1e-4, abs=1e-9)
        assert torch.equal(students, own)


def test_a_run_moves_theta_and_leaves_a_plain_student(cache: Path) -> None:
    history, student, state = trained([LearnedTemperatureKD()], cache, epochs=12)
    assert history[-1]["loss"] < history[0]["loss"]
    assert float(state["ctkd"]["theta"]) != 1.0
    assert set(student.state_dict()) == set(Net().state_dict())


def test_a_run_that_was_stopped_ends_with_the_same_bits(cache: Path, tmp_path: Path) -> None:
    """θ among them."""
    assert_resumes([LearnedTemperatureKD(rise=0.5)], cache, tmp_path)


def test_what_does_not_fit_is_refused(cache: Path, batch: Batch) -> None:
    with pytest.raises(SpecError, match=r"objective\.ctkd: must be joined to the student first"):
        Objective([LearnedTemperatureKD()])(torch.zeros(27, 10), batch)
    sparse = Objective([LearnedTemperatureKD(field="logits@small")])
    stream = ViewStream(tc.open(cache), batch_size=9, fields=sparse.fields)
    with pytest.raises(MismatchError, match="Read a field with a dense encoding"):
        rehearse(seeded(Net), stream, sparse)
    for wrong in ({"rise": 0.0}, {"rise": 1.5}, {"start": math.nan}, {"start": 11.0}, {"weight": 0.0}):
        with pytest.raises(SpecError, match=r"ctkd\."):
            LearnedTemperatureKD(**wrong)  # type: ignore[arg-type]
