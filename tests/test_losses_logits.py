"""Logit matching, standardised logits and a learned temperature against their formulas in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_laws import Array, dense, drawn, pair, slope, softmax, student_of

from student_train.losses import (
    learned_temperature,
    logit_mse,
    reversal_weight,
    reversed_gradient,
    soft_label_loss,
    soft_target_loss,
    standardised,
    standardised_target,
)
from teacher_cache.encodings import TopKLogits
from teacher_cache.errors import MismatchError, SpecError

SEEDS = st.integers(0, 10_000)


def kl(student: Array, teacher: Array, temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float((p * (np.log(p) - np.log(q))).sum(axis=1).mean())


@given(seed=SEEDS, classes=st.integers(2, 12))
def test_logit_mse_is_the_mean_over_batch_and_classes(seed: int, classes: int) -> None:
    student, teacher = pair(seed, 5, classes, spread=3.0)
    centred = [logits - logits.mean(axis=1, keepdims=True) for logits in (student, teacher)]
    expected = ((centred[0] - centred[1]) ** 2).mean()
    assert float(logit_mse(torch.tensor(student), dense(teacher))) == pytest.approx(expected, rel=1e-6)


@given(seed=SEEDS)
def test_a_constant_of_a_row_means_nothing_to_logit_mse(seed: int) -> None:
    student, teacher = pair(seed, 5, 6)
    shifts = drawn(seed + 1, 5, 1, spread=10.0)
    here, there = (float(logit_mse(torch.tensor(student), dense(teacher + each))) for each in (0, shifts))
    assert here == pytest.approx(there, rel=1e-6)
    assert float(logit_mse(torch.tensor(teacher), dense(teacher + shifts))) == pytest.approx(0, abs=1e-12)


@given(seed=SEEDS)
def test_soft_targets_become_half_the_logit_mse(seed: int) -> None:
    """Hinton et al., section 2.1; with T² forgotten they become nothing, with `mean` a C-th of it."""
    student, teacher = pair(seed, 4, 8)
    half = float(logit_mse(torch.tensor(student), dense(teacher))) / 2
    limit = [float(soft_target_loss(torch.tensor(student), dense(teacher), at)) for at in (30.0, 100.0)]
    assert limit[1] == pytest.approx(half, rel=3e-2, abs=2e-2)
    assert kl(student, teacher, 1e4) * 1e8 == pytest.approx(half, rel=1e-3)
    assert limit[0] == pytest.approx(limit[1], rel=0.1, abs=2e-2)


@given(seed=SEEDS, scale=st.floats(0.1, 100), shift=st.floats(-10, 10))
def test_standardised_rows_have_mean_0_and_deviation_1(seed: int, scale: float, shift: float) -> None:
    logits = drawn(seed, 5, 7)
    expected = (logits - logits.mean(axis=1, keepdims=True)) / (logits.std(axis=1, ddof=1, keepdims=True) + 1e-7)
    for each in (logits, scale * logits + shift):
        np.testing.assert_allclose(standardised(torch.tensor(each)).numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(standardised_target(dense(logits)).values.numpy(), expected, rtol=1e-6)


def test_the_deviation_is_that_of_a_sample() -> None:
    """As in the authors' code; their equation divides by C, which changes what T means by √(C / (C − 1))."""
    assert float(standardised(torch.tensor([[1.0, -1.0]])).max()) == pytest.approx(1 / math.sqrt(2), rel=1e-6)


def test_one_class_and_constant_rows_standardise_to_zeros() -> None:
    for logits in (torch.tensor([[5.0]]), torch.full((2, 3), 0.1), torch.zeros(2, 3)):
        assert torch.equal(standardised(logits), torch.zeros_like(logits))


@pytest.mark.parametrize(("theta", "expected"), [(0.0, 11.0), (1.0, 15.621171572600098), (-50.0, 1.0), (50.0, 21.0)])
def test_learned_temperature_is_in_1_to_21(theta: float, expected: float) -> None:
    assert float(learned_temperature(torch.tensor(theta))) == pytest.approx(expected, rel=1e-6)
    assert learned_temperature(torch.tensor(theta).half()).dtype == torch.float32


@given(seed=SEEDS, theta=st.floats(-2, 2))
def test_the_temperature_gets_the_gradient_of_the_whole_loss(seed: int, theta: float) -> None:
    """Through the student's softmax, the teacher's, and T²: against the difference quotient in float64."""
    student, teacher = pair(seed, 3, 5, spread=2.0)

    def at(value: float) -> float:
        temperature = 1 + 20 / (1 + math.exp(-value))
        return temperature**2 * kl(student, teacher, temperature)

    parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    loss = soft_target_loss(torch.tensor(student), dense(teacher), learned_temperature(parameter))
    expected = (at(theta + 1e-5) - at(theta - 1e-5)) / 2e-5
    assert float(loss.detach()) == pytest.approx(at(theta), rel=1e-9)
    assert float(slope(loss, parameter)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_reversed_temperature_climbs() -> None:
    """θ is trained by the optimiser that lowers the student's loss, and raises it."""
    student, teacher = pair(1, 4, 5, spread=2.0)
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def loss(turned: torch.Tensor) -> torch.Tensor:
        return soft_target_loss(torch.tensor(student), dense(teacher), learned_temperature(turned))

    straight, turned = slope(loss(theta), theta), slope(loss(reversed_gradient(theta, 0.25)), theta)
    assert torch.equal(turned, -0.25 * straight)
    assert float(loss(theta.detach() - turned)) > float(loss(theta.detach()))
    assert torch.equal(reversed_gradient(theta, 0.25), theta)
    assert float(slope(reversed_gradient(theta, 0.0) * 3, theta)) == 0


def test_the_weight_rises_along_half_a_cosine() -> None:
    expected = [0.0, 0.5 - 0.5 * math.cos(math.pi * 0.25), 0.5, 1.0, 1.0]
    assert [reversal_weight(epoch) for epoch in (0, 2.5, 5, 10, 300)] == pytest.approx(expected)
    assert reversal_weight(1, rise=2) == pytest.approx(0.5)
    for epoch, rise in ((1.0, 0.0), (-1.0, 10.0), (math.nan, 10.0)):
        with pytest.raises(SpecError):
            reversal_weight(epoch, rise)


def test_a_sparse_target_has_no_learned_temperature() -> None:
    encoding = TopKLogits(5, 2)
    target = encoding.decode(encoding.encode(torch.tensor(drawn(1, 3, 5)).float()))
    with pytest.raises(MismatchError, match="plain number"):
        soft_target_loss(torch.zeros(3, 5), target, torch.tensor(2.0))


@given(seed=SEEDS, temperature=st.sampled_from([1.0, 2.5, 8.0]))
def test_soft_labels_are_logarithms(seed: int, temperature: float) -> None:
    """Probabilities in the place of their logarithms would give another number."""
    student, teacher = pair(seed, 3, 5)
    p = softmax(teacher / temperature)
    loss = soft_label_loss(torch.tensor(student), torch.tensor(np.log(p)), temperature)
    assert float(loss) == pytest.approx(temperature**2 * kl(student, teacher, temperature), rel=1e-9, abs=1e-12)
    wrong = soft_label_loss(torch.tensor(student), torch.tensor(p), temperature)
    assert float(wrong) != pytest.approx(float(loss), rel=1e-2)


def test_soft_labels_without_mass_have_no_weight() -> None:
    log_p = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    logits = student_of(torch.zeros(1, 3))
    loss = soft_label_loss(logits, log_p, 1.0)
    assert float(loss.detach()) == pytest.approx(math.log(3))
    torch.testing.assert_close(slope(loss, logits), torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]))
