"""Relational losses against their formulas in NumPy, what they do not see, and batches without relations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_laws import Array, dense, drawn, pair, slope, student_of

from student_train.losses import angle_loss, distance_loss, similarity_loss

Relation = Callable[..., torch.Tensor]
SEEDS = st.integers(0, 10_000)
SCALES = st.sampled_from([1e-2, 0.5, 3.0, 1e3])


def huber(difference: Array) -> Array:
    size = np.abs(difference)
    return np.where(size < 1, 0.5 * size**2, size - 0.5)


def distances(features: Array) -> Array:
    """[B, B], divided by the mean of those above 0."""
    found = np.sqrt(((features[:, None] - features[None]) ** 2).sum(axis=-1))
    return np.asarray(found / found[found > 0].mean())


def cosines(features: Array) -> Array:
    """[B, B, B]: at the first row, of the lines to the second and to the third."""
    rows = len(features)
    found = np.zeros((rows, rows, rows))
    for j, i, k in np.ndindex(rows, rows, rows):
        first, second = features[i] - features[j], features[k] - features[j]
        lengths = np.linalg.norm(first) * np.linalg.norm(second)
        found[j, i, k] = first @ second / lengths if lengths else 0
    return found


def similarities(features: Array) -> Array:
    gram = features @ features.T
    return np.asarray(gram / np.linalg.norm(gram, axis=1, keepdims=True))


REFERENCES: dict[Relation, Callable[[Array, Array], float]] = {
    distance_loss: lambda s, t: huber(distances(s) - distances(t)).mean(),
    angle_loss: lambda s, t: huber(cosines(s) - cosines(t)).mean(),
    similarity_loss: lambda s, t: ((similarities(s) - similarities(t)) ** 2).sum() / len(s) ** 2,
}
EVERY = pytest.mark.parametrize("loss", REFERENCES, ids=lambda loss: loss.__name__)


@EVERY
@given(seed=SEEDS, rows=st.integers(2, 6))
def test_it_equals_the_formula(loss: Relation, seed: int, rows: int) -> None:
    """Student and teacher of different widths; a far-off row takes the Huber loss into its straight part."""
    student, teacher = drawn(seed, rows, 4), drawn(seed + 1, rows, 9)
    student[0] *= 1 + seed % 20
    found = loss(torch.tensor(student), dense(teacher))
    assert float(found) == pytest.approx(REFERENCES[loss](student, teacher), rel=1e-6, abs=1e-12)


@EVERY
@given(seed=SEEDS, scale=SCALES)
def test_it_is_invariant_under_scale_and_rotation(loss: Relation, seed: int, scale: float) -> None:
    student, teacher = pair(seed, 5, 4)
    rotation, _ = np.linalg.qr(drawn(seed + 1, 4, 4))
    here = float(loss(torch.tensor(student), dense(teacher)))
    for changed in (scale * student, student @ rotation):
        assert float(loss(torch.tensor(changed), dense(teacher))) == pytest.approx(here, rel=1e-5, abs=1e-9)
    assert float(loss(torch.tensor(student), dense(scale * teacher @ rotation))) == pytest.approx(here, rel=1e-5)


@given(seed=SEEDS)
def test_only_similarity_sees_where_the_origin_is(seed: int) -> None:
    student, teacher = pair(seed, 5, 4)
    moved = student + 3 * drawn(seed + 1, 1, 4)
    for loss in (distance_loss, angle_loss):
        here, there = (float(loss(torch.tensor(each), dense(teacher))) for each in (student, moved))
        assert there == pytest.approx(here, rel=1e-6)
    here, there = (float(similarity_loss(torch.tensor(each), dense(teacher))) for each in (student, moved))
    assert there != pytest.approx(here, rel=1e-6)


@EVERY
def test_maps_are_flattened(loss: Relation) -> None:
    student, teacher = drawn(1, 4, 3, 2, 2), drawn(2, 4, 5, 3, 3)
    deep = loss(torch.tensor(student), dense(teacher))
    flat = loss(torch.tensor(student.reshape(4, 12)), dense(teacher.reshape(4, 45)))
    assert torch.equal(deep, flat)


def test_the_distances_of_near_rows_far_from_the_origin_are_kept() -> None:
    """Out of inner products in float32, distances of 0.01 at 100 from the origin would be noise."""
    near = 100 + 0.01 * drawn(3, 5, 8)
    # As float32 holds them.
    near = near.astype(np.float32).astype(np.float64)
    teacher = drawn(4, 5, 8)
    for loss in (distance_loss, angle_loss):
        found = float(loss(torch.tensor(near).float(), dense(teacher)))
        assert found == pytest.approx(REFERENCES[loss](near, teacher), rel=1e-4)


@EVERY
def test_equal_rows_have_finite_gradients(loss: Relation) -> None:
    """Under the root of a distance of 0 the slope is infinite, and times 0 NaN."""
    features = drawn(5, 5, 4)
    features[3] = features[1]
    student, teacher = student_of(features), drawn(6, 5, 4)
    value = loss(student, dense(teacher))
    gradient = slope(value, student)
    assert float(value.detach()) == pytest.approx(REFERENCES[loss](features, teacher), rel=1e-4)
    assert gradient.isfinite().all()
    assert gradient[0].abs().sum() > 0


@EVERY
def test_a_batch_of_one_has_no_relations(loss: Relation) -> None:
    student = student_of(drawn(7, 1, 4))
    value = loss(student, dense(drawn(8, 1, 4)))
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(slope(value, student), torch.zeros(1, 4), rtol=0, atol=1e-6)


@EVERY
def test_rows_that_are_all_equal_get_no_absurd_gradient(loss: Relation) -> None:
    student = student_of(np.tile(drawn(9, 1, 4), (5, 1)))
    value = loss(student, dense(drawn(10, 5, 4)))
    gradient = slope(value, student)
    assert value.isfinite()
    assert gradient.abs().max() < 10
    if loss is not similarity_loss:
        assert torch.equal(gradient, torch.zeros(5, 4))


def test_all_distances_equal_is_a_simplex_and_not_nothing() -> None:
    """A regular simplex: all relative distances are 1, whatever the edge."""
    simplex = np.eye(4)
    student = drawn(11, 4, 4)
    expected = REFERENCES[distance_loss](student, simplex)
    for edge in (1.0, 1e-3, 1e3):
        assert float(distance_loss(torch.tensor(student), dense(edge * simplex))) == pytest.approx(expected)
    assert float(distance_loss(torch.tensor(7 * simplex), dense(simplex))) == pytest.approx(0, abs=1e-12)
