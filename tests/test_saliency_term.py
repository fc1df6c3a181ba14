"""Saliency as a term: a second backward pass, at the pixels that the teacher saw, in any precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_builds import toy_spec
from toy_models import SmallNet
from toy_students import Net, assert_resumes, images, seeded, trained

import teacher_cache as tc
from student_train import KD, CachedRows, CrossEntropy, Objective, Saliency, Taps, TrainSpec, ViewStream, fit, losses
from student_train.objective import Shapes
from student_train.stream import Batch, Mixing
from student_train.train import rehearse
from teacher_cache.errors import SpecError
from teacher_cache.spec import NormalizeSpec
from teacher_cache.views import normalize

SHAPES = Shapes({}, {"saliency": (1, 8, 8)}, (1, 8, 8))
THEIRS = NormalizeSpec(mean=(0.4,), std=(0.2,))


@pytest.fixture(scope="module")
def cache(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients of a teacher that normalises its own way."""
    path = tmp_path_factory.mktemp("saliency") / "cache"
    fields = {"logits": {"encoding": "dense_f32"}, "saliency": {"encoding": "dense_f32"}}
    teacher = {"model": "toy_models:SmallNet", "micro_batch": 4, "fields": fields, "normalize": THEIRS.model_dump()}
    tc.build(toy_spec(path, arrays, teacher=teacher), "serial")
    return path


@pytest.fixture
def batch(cache: Path) -> Batch:
    """All rows of one view."""
    return next(iter(ViewStream(tc.open(cache), batch_size=27, fields=("logits", "saliency"))))


def test_it_is_its_function_of_the_students_own_gradient(batch: Batch) -> None:
    """Beside another term; the gradient of the loss is that of differences, which see the second backward pass."""
    student, objective = seeded(Net).double(), Objective([Saliency(0.5), CrossEntropy(0.1)])
    student.act = torch.nn.Softplus()
    objective.join(SHAPES)
    with objective.taps(student) as answer:
        said = answer(images(batch).double())
    loss, values = objective(said, batch)
    shown = images(batch).double().requires_grad_()
    assert batch.labels_B is not None
    own = student(shown)[torch.arange(27), batch.labels_B].sum()
    (gradient,) = torch.autograd.grad(own, shown)
    wanted = losses.saliency_loss(gradient, batch.targets["saliency"])
    assert float(values["saliency"]) == pytest.approx(float(wanted), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, student.maps.weight)

    def value(step: float) -> float:
        with torch.no_grad():
            student.maps.weight[1, 0, 1, 2] += step
        with objective.taps(student) as answer:
            found = float(objective(answer(images(batch).double()), batch)[0].detach())
        with torch.no_grad():
            student.maps.weight[1, 0, 1, 2] -= step
        return found

    numeric = (value(1e-3) - value(-1e-3)) / 2e-3
    assert float(slope[1, 0, 1, 2]) == pytest.approx(numeric, rel=0.02)
    plain = 0.1 * torch.nn.functional.cross_entropy(student(images(batch).double()), batch.labels_B)
    (without,) = torch.autograd.grad(plain, student.maps.weight)
    assert (slope - without).abs().max() > 1e-3


def test_normalising_otherwise_than_the_teacher_does_not_count(cache: Path, batch: Batch) -> None:
    """The teacher's own weights behind another normalisation, made up for in the first layer: no loss is left."""
    ours = NormalizeSpec(mean=(0.0,), std=(0.5,))

    class Shifted(SmallNet):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return super().forward((images_BCHW * 0.5 - 0.4) / 0.2)

    for student, spec in ((SmallNet(), THEIRS), (Shifted(), ours)):
        objective = Objective([Saliency()])
        objective.join(replace(SHAPES, normalization=spec))
        with objective.taps(student.eval()) as answer:
            loss, _ = objective(answer(normalize(batch.views_BCHW, spec)), batch)
        assert float(loss.detach()) < 1e-8
    spread = NormalizeSpec(mean=(0.0,) * 3, std=(0.5, 0.25, 1.0))
    joint = Saliency().joint(Shapes({}, {"saliency": (3, 2, 2)}, (3, 2, 2), spread))
    assert joint(torch.ones(1, 3, 1, 1)).flatten().tolist() == [2, 4, 1]


def test_a_run_tells_the_term_how_the_student_normalises(cache: Path) -> None:
    """Of one channel it would not show in the value."""
    objective, ours = Objective([Saliency()]), NormalizeSpec(mean=(0.0,), std=(0.5,))
    stream = ViewStream(tc.open(cache), batch_size=9, fields=("saliency",))
    fit(Net(), stream, objective, TrainSpec(epochs=1, batch_size=9, device="cpu"), normalization=ours)
    joint = objective._joints["saliency"]  # type: ignore[index]
    assert joint.normalization == ours  # type: ignore[union-attr]


def test_taps_keep_inputs_only_where_they_are_asked_for(batch: Batch) -> None:
    student, shown = seeded(Net), images(batch)
    with Objective([KD()]).taps(student) as answer, torch.no_grad():
        said = answer(shown)
        assert said.inputs_BCHW is None
        assert not said.logits_BC.requires_grad
    with Objective([KD(), Saliency()]).taps(student) as answer, torch.no_grad():
        said = answer(shown)
    assert said.inputs_BCHW is not None
    assert torch.equal(said.inputs_BCHW, shown)
    assert not shown.requires_grad
    assert said.logits_BC.requires_grad


@pytest.mark.parametrize("precision", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_student_learns_it_in_any_precision(precision: str, cache: Path) -> None:
    """Beside cross-entropy; with clipping, which has to see gradients that no scaler has multiplied."""
    terms = [Saliency(), CrossEntropy(0.01)]
    history, student, _ = trained(terms, cache, epochs=10, lr=0.1, precision=precision)
    assert history[-1]["saliency"] < 0.9 * history[0]["saliency"]
    assert all(weight.isfinite().all() for weight in student.parameters())


@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_small_gradients_do_not_vanish_in_float16(size: float, batch: Batch) -> None:
    """2⁻²⁴ is the least that float16 holds."""
    student, objective = seeded(Net), Objective([Saliency()])
    with torch.no_grad():
        student.head.weight.mul_(size)
    objective.join(SHAPES)
    values = []
    for enabled in (True, False):
        with objective.taps(student) as answer, torch.autocast("cpu", torch.float16, enabled=enabled):
            values.append(float(objective(answer(images(batch)), batch)[1]["saliency"]))
    assert values[0] == pytest.approx(values[1], rel=0.02)


def test_a_run_that_was_stopped_ends_with_the_same_bits(cache: Path, tmp_path: Path) -> None:
    assert_resumes([Saliency(), KD()], cache, tmp_path, lambda: Net(True))


def test_a_rehearsal_computes_it_and_leaves_no_gradient(cache: Path) -> None:
    student, objective = seeded(Net), Objective([Saliency()])
    rehearse(student, ViewStream(tc.open(cache), batch_size=9, fields=("saliency",)), objective)
    assert all(weight.grad is None for weight in student.parameters())


def test_what_does_not_fit_is_refused(cache: Path, arrays: Path, tmp_path: Path, batch: Batch) -> None:
    objective = Objective([Saliency()])
    with pytest.raises(SpecError, match=r"needs what the student was shown .*objective\.taps\(student\)"):
        objective(torch.zeros(27, 10), batch)
    with objective.taps(seeded(Net)) as answer:
        said = answer(images(batch))
    with pytest.raises(SpecError, match="must be joined to the student first"):
        objective(said, batch)
    objective.join(SHAPES)
    mixed = replace(batch, mixing=Mixing(np.arange(27), batch.labels_B, torch.full((27,), 0.5)))
    with pytest.raises(SpecError, match="mixed views have two"):
        objective(said, mixed)
    with pytest.raises(SpecError, match="a sequence has no label's logit"):
        objective(replace(said, logits_BC=torch.zeros(27, 4, 10)), batch)
    with pytest.raises(SpecError, match=r"saliency\.input: must be views of \[1, 8, 8\], as saliency is"):
        objective.join(replace(SHAPES, inputs=(1, 6, 6)))
    unlabelled = ViewStream(tc.open(cache), batch_size=9, fields=("saliency",))
    unlabelled.data.labels = None  # type: ignore[misc]
    with pytest.raises(SpecError, match="reads labels, and the data has none"):
        rehearse(seeded(Net), unlabelled, objective)


def test_views_of_another_size_are_refused_before_the_first_step(arrays: Path, tmp_path: Path) -> None:
    fields = {"saliency": {"encoding": "dense_f16"}}
    recipe = [{"random_resized_crop": {"size": 8}}]
    teacher = {"model": "toy_models:SmallNet", "micro_batch": 4, "fields": fields}
    tc.build(toy_spec(tmp_path / "cache", arrays, teacher=teacher, views__recipe=recipe), "serial")
    stream = ViewStream(CachedRows(tc.open(tmp_path / "cache"), size=6), batch_size=9, fields=("saliency",))
    with pytest.raises(SpecError, match=r"saliency\.input.*found: \[1, 6, 6\]"):
        fit(SmallNet(), stream, Objective([Saliency()]), TrainSpec(epochs=1, batch_size=9, device="cpu"))


def test_taps_by_hand_need_not_keep_inputs() -> None:
    with Taps(seeded(Net), ["maps"]) as answer:
        assert answer(torch.zeros(1, 1, 8, 8)).inputs_BCHW is None
