"""DIST against its formula in NumPy, and what Pearson's correlation does not see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_laws import Array, dense, drawn, pair, slope, softmax, student_of

from student_train.losses import correlations, dist_loss

SEEDS = st.integers(0, 10_000)


def pearson(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (np.sqrt((a**2).sum() * (b**2).sum()) + 1e-8))


def reference(student: Array, teacher: Array, temperature: float, beta: float, gamma: float) -> float:
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    rows = np.mean([pearson(a, b) for a, b in zip(q, p, strict=True)])
    classes = np.mean([pearson(a, b) for a, b in zip(q.T, p.T, strict=True)])
    return float(temperature**2 * (beta * (1 - rows) + gamma * (1 - classes)))


@given(seed=SEEDS, temperature=st.sampled_from([1.0, 4.0]), rows=st.integers(2, 6), classes=st.integers(2, 9))
def test_dist_equals_the_formula(seed: int, temperature: float, rows: int, classes: int) -> None:
    student, teacher = pair(seed, rows, classes, spread=2.0)
    loss = dist_loss(torch.tensor(student), dense(teacher), temperature, 2.0, 0.5)
    assert float(loss) == pytest.approx(reference(student, teacher, temperature, 2.0, 0.5), rel=1e-6, abs=1e-9)


def test_the_constants_are_those_of_the_authors_code() -> None:
    student, teacher = pair(1, 5, 7)
    expected = reference(student, teacher, 1.0, 1.0, 1.0)
    assert float(dist_loss(torch.tensor(student), dense(teacher))) == pytest.approx(expected)


@given(seed=SEEDS, scale=st.floats(0.1, 50), shift=st.floats(-5, 5))
def test_correlations_are_invariant_under_positive_affine_maps(seed: int, scale: float, shift: float) -> None:
    """And turn round under a negative one: it is a correlation, not a distance."""
    student, teacher = (torch.tensor(each) for each in pair(seed, 4, 6))
    here = correlations(student, teacher)
    torch.testing.assert_close(correlations(scale * student + shift, teacher), here, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(correlations(student, scale * teacher + shift), here, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(correlations(-scale * student, teacher), -here, rtol=1e-5, atol=1e-6)
    # A row against itself is 1, less the constant below the fraction.
    lengths_R = scale * torch.linalg.vector_norm(teacher - teacher.mean(1, keepdim=True), dim=1) ** 2
    expected_R = lengths_R / (lengths_R + 1e-8)
    torch.testing.assert_close(correlations(scale * teacher + shift, teacher), expected_R)


@given(seed=SEEDS)
def test_scipy_agrees(seed: int) -> None:
    from scipy.stats import pearsonr

    student, teacher = pair(seed, 3, 8)
    expected = [pearsonr(a, b).statistic for a, b in zip(student, teacher, strict=True)]
    found = correlations(torch.tensor(student), torch.tensor(teacher)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_constant_of_a_row_of_logits_means_nothing() -> None:
    """It is cancelled by the softmax, so that also the relation along the batch is free of it."""
    student, teacher = pair(2, 5, 6)
    here = dist_loss(torch.tensor(student), dense(teacher))
    there = dist_loss(torch.tensor(student + drawn(3, 5, 1)), dense(teacher + drawn(4, 5, 1)))
    torch.testing.assert_close(here, there)


def test_a_student_without_opinion_gets_no_slope() -> None:
    """A head of zeros makes all rows even: the formula's slope there is 10⁸ times the teacher's spread."""
    logits = student_of(torch.zeros(4, 6))
    loss = dist_loss(logits, dense(drawn(5, 4, 6)), 3.0)
    assert float(loss.detach()) == pytest.approx(9 * 2)
    assert torch.equal(slope(loss, logits), torch.zeros(4, 6))


def test_a_batch_of_one_has_no_relation_along_it() -> None:
    student, teacher = pair(6, 1, 6)
    q, p = softmax(student)[0], softmax(teacher)[0]
    loss = dist_loss(torch.tensor(student), dense(teacher))
    assert float(loss) == pytest.approx(2 - pearson(q, p), rel=1e-6)


def test_positions_of_sequences_are_rows() -> None:
    student, teacher = pair(7, 6, 5)
    flat = dist_loss(torch.tensor(student), dense(teacher))
    deep = dist_loss(torch.tensor(student).reshape(2, 3, 5), dense(teacher.reshape(2, 3, 5)))
    torch.testing.assert_close(flat, deep)
