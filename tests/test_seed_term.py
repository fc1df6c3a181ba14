"""SEED as a term: a queue that training alone feeds, once a batch, and that goes on from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_builds import toy_spec
from toy_students import Net, assert_equal, assert_resumes, images, seeded, trained

import teacher_cache as tc
from student_train import SEED, Objective, Schedule, Taps, ViewStream, losses
from student_train.objective import Shapes
from student_train.train import rehearse
from teacher_cache.errors import SpecError

FIELD = "feature:norm"
SHAPES = Shapes({"maps": (3, 8, 8)}, {FIELD: (4,)})


@pytest.fixture(scope="module")
def cache(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of four numbers, and no logits."""
    path = tmp_path_factory.mktemp("seed") / "cache"
    fields = {FIELD: {"pool": "mean", "encoding": "dense_f32"}}
    tc.build(toy_spec(path, arrays, teacher__model="toy_models:SmallNet", teacher__fields=fields), "serial")
    return path


def units(rows: torch.Tensor) -> np.ndarray:
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()


def test_it_is_its_function_with_the_queue_that_training_fed(cache: Path) -> None:
    """Over three batches, by hand beside the objective; the gradient reaches student and projection."""
    student, objective = seeded(Net), Objective([SEED("maps", FIELD, 0.5, queue=12)])
    objective.join(SHAPES)
    joint, known = objective._joints["seed"], losses.FeatureQueue(12, 4)  # type: ignore[index]
    with Taps(student, objective.nodes) as answer:
        for batch in ViewStream(tc.open(cache), batch_size=9, fields=objective.fields):
            said = answer(images(batch))
            loss, _ = objective(said, batch)
            projected = joint.projection(said.nodes["maps"].mean((2, 3)))  # type: ignore[union-attr, operator]
            expected = losses.seed_loss(projected, batch.targets[FIELD], known)
            assert float(loss.detach()) == pytest.approx(0.5 * float(expected.detach()), rel=1e-6)
            objective.remember(batch)
            known.push(batch.targets[FIELD])
    assert len(known) == 12
    loss.backward()  # type: ignore[no-untyped-call]
    for weight in (student.maps.weight, *objective.parameters()):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def test_a_run_feeds_each_batch_once(cache: Path) -> None:
    """Also where the term does not count at first: 54 rows of two epochs, as the cache has them."""
    late = SEED("maps", FIELD, Schedule(((0, 0), (0.5, 0), (0.5, 1))), queue=100)
    early = SEED("maps", FIELD, Schedule(((0, 1), (0.5, 1), (0.5, 0))), queue=100)
    _, _, state = trained([late, early], cache, epochs=2)
    cached = np.concatenate([units(tc.open(cache).read(FIELD, view, range(27)).dense().values) for view in (0, 1)])
    for kept in state.values():
        queue = kept["_extra_state"]
        assert queue["filled"] == 54
        found = queue["rows"][:54].numpy()
        np.testing.assert_allclose(found[np.lexsort(found.T)], cached[np.lexsort(cached.T)], rtol=1e-6)


def test_only_what_is_trained_on_is_kept(cache: Path) -> None:
    """Neither a look at a batch's terms, nor a rehearsal, nor an evaluation of the loss."""
    student, objective = seeded(Net), Objective([SEED("maps", FIELD, queue=12)])
    stream = ViewStream(tc.open(cache), batch_size=9, fields=objective.fields)
    objective.join(SHAPES)
    batch = stream.peek()
    objective.remember(batch)
    before = objective.state_dict()
    with Taps(student, objective.nodes) as answer:
        objective.each(answer(images(batch)), batch)
        objective(answer(images(batch)), batch)
    assert_equal(before, objective.state_dict())
    rehearse(student, stream, objective)
    assert objective.state_dict()["seed"]["_extra_state"]["filled"] == 0


def test_a_run_that_was_stopped_ends_with_the_same_bits(cache: Path, tmp_path: Path) -> None:
    """The queue is larger than an epoch: it holds rows from before the stop."""
    assert_resumes([SEED("maps", FIELD, queue=40)], cache, tmp_path)


def test_a_student_learns_who_is_like_whom(cache: Path) -> None:
    history, student, _ = trained([SEED("maps", FIELD, queue=27)], cache, epochs=24, lr=0.1)
    # The first epoch begins with an empty queue, against which nothing is to be said.
    assert history[-1]["loss"] < history[1]["loss"]
    assert set(student.state_dict()) == set(Net().state_dict())


def test_equal_widths_need_no_projection() -> None:
    objective = Objective([SEED("maps", "f")])
    objective.join(Shapes({"maps": (4,)}, {"f": (4,)}))
    assert list(objective.parameters()) == []


def test_what_does_not_fit_is_refused() -> None:
    for node, field, message in (
        ((3, 8, 8), (4, 8, 8), r"must be one vector a row \(found: \[4, 8, 8\]\). Cache it with `pool: mean`"),
        ((16, 32), (4,), r"seed\.maps: must put out a vector or a map"),
    ):
        with pytest.raises(SpecError, match=message):
            Objective([SEED("maps", "f")]).join(Shapes({"maps": node}, {"f": field}))
    for wrong in ({"queue": 0}, {"student_temperature": 0.0}, {"teacher_temperature": math.nan}, {"weight": 0.0}):
        with pytest.raises(SpecError, match=r"seed\."):
            SEED("maps", "f", **wrong)  # type: ignore[arg-type]
