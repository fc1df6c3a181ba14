"""Ensembles of teachers against their formulas in NumPy: three different targets out of the same logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_laws import Array, dense, drawn, softmax

from student_train.losses import (
    geometric_mean,
    majority_vote,
    mean_of_probabilities,
    soft_label_loss,
    soft_target_loss,
)
from teacher_cache.encodings import DenseTarget, SparseTarget, Target, TopKLogits
from teacher_cache.errors import MismatchError, SpecError

SEEDS = st.integers(0, 10_000)
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])


def arithmetic(logits: Array, temperature: float) -> Array:
    return np.asarray(np.mean([softmax(each / temperature) for each in logits], axis=0))


def geometric(logits: Array, temperature: float) -> Array:
    """The product of M probabilities, each to the power 1 / M, normalised."""
    product = np.prod([softmax(each / temperature) ** (1 / len(logits)) for each in logits], axis=0)
    return np.asarray(product / product.sum(axis=1, keepdims=True))


MEANS: dict[Callable[..., torch.Tensor], Callable[[Array, float], Array]] = {
    mean_of_probabilities: arithmetic,
    geometric_mean: geometric,
}
EVERY = pytest.mark.parametrize("mean", MEANS, ids=lambda mean: mean.__name__)


def targets_of(logits: Array) -> list[Target]:
    return [dense(each) for each in logits]


def sparse(values: Array, k: int = 2, tail: str = "uniform") -> SparseTarget:
    encoding = TopKLogits(values.shape[1], k, "f16", "whole", tail)
    return encoding.decode(encoding.encode(torch.tensor(values).float()))


@EVERY
@given(seed=SEEDS, temperature=TEMPERATURES, teachers=st.integers(1, 4))
def test_means_equal_the_formulas(
    mean: Callable[..., torch.Tensor], seed: int, temperature: float, teachers: int
) -> None:
    logits = drawn(seed, teachers, 3, 5, spread=2.0)
    found = mean(targets_of(logits), temperature)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.exp().numpy(), MEANS[mean](logits, temperature), rtol=1e-4, atol=1e-6)


@given(seed=SEEDS, temperature=TEMPERATURES)
def test_the_mean_of_logits_is_the_geometric_mean(seed: int, temperature: float) -> None:
    """And another target than the mean of probabilities, which averages after the softmax."""
    logits = drawn(seed, 3, 4, 5, spread=2.0)
    found = geometric_mean(targets_of(logits), temperature)
    torch.testing.assert_close(found, dense(logits.mean(axis=0)).log_probs(temperature), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, mean_of_probabilities(targets_of(logits), temperature), atol=1e-2)


@EVERY
@given(seed=SEEDS, temperature=TEMPERATURES)
def test_an_ensemble_of_one_is_its_teacher(mean: Callable[..., torch.Tensor], seed: int, temperature: float) -> None:
    teacher, student = drawn(seed, 3, 5), torch.tensor(drawn(seed + 1, 3, 5))
    for count in (1, 3):
        loss = soft_label_loss(student, mean([dense(teacher)] * count, temperature), temperature)
        expected = soft_target_loss(student, dense(teacher), temperature)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)


def test_disagreement_broadens_one_mean_and_not_the_other() -> None:
    """Two teachers, each sure of another class: the mixture halves, the product leaves it to the third."""
    logits = np.array([[[9.0, -9.0, 1.0]], [[-9.0, 9.0, 1.0]]])
    mixture = mean_of_probabilities(targets_of(logits), 1.0).exp()
    product = geometric_mean(targets_of(logits), 1.0).exp()
    np.testing.assert_allclose(mixture[0, :2], [0.5, 0.5], atol=1e-3)
    assert int(product.argmax()) == 2


@given(seed=SEEDS, teachers=st.integers(1, 6))
def test_votes_are_a_histogram(seed: int, teachers: int) -> None:
    logits = drawn(seed, teachers, 4, 3)
    expected = np.zeros((4, 3))
    for each in logits:
        for row, chosen in enumerate(each.argmax(axis=1)):
            expected[row, chosen] += 1 / teachers
    found = majority_vote(targets_of(logits))
    np.testing.assert_allclose(found.exp().numpy(), expected, rtol=1e-6, atol=1e-12)
    student = torch.tensor(drawn(seed + 1, 4, 3))
    loss = soft_label_loss(student, found, 1.0)
    q = softmax(student.numpy())
    voted = expected > 0
    reference = (expected[voted] * (np.log(expected[voted]) - np.log(q[voted]))).sum() / 4
    assert float(loss) == pytest.approx(reference, rel=1e-5, abs=1e-6)


def test_a_vote_without_mass_has_a_finite_gradient() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    soft_label_loss(logits, majority_vote([dense(np.array([[3.0, 1.0, 0.0]]))]), 1.0).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]))


def test_sparse_teachers_take_part() -> None:
    """One dense and one sparse teacher; the sparse one through the policy of its tail."""
    logits = drawn(3, 2, 4, 6, spread=2.0)
    mixed: list[Target] = [dense(logits[0]), sparse(logits[1])]
    decoded: list[Target] = [dense(logits[0]), mixed[1].dense()]
    for temperature in (1.0, 4.0):
        for mean in MEANS:
            torch.testing.assert_close(mean(mixed, temperature), mean(decoded, temperature), rtol=1e-4, atol=1e-4)
    ghost: list[Target] = [dense(logits[0]), sparse(logits[1], tail="ghost")]
    assert torch.equal(majority_vote(ghost), majority_vote(targets_of(logits)))


def test_positions_of_sequences_have_their_own_votes_and_means() -> None:
    logits = drawn(4, 3, 6, 5)
    deep = [dense(each.reshape(2, 3, 5)) for each in logits]
    assert torch.equal(majority_vote(deep).flatten(0, 1), majority_vote(targets_of(logits)))
    for mean in MEANS:
        assert torch.equal(mean(deep, 2.0).flatten(0, 1), mean(targets_of(logits), 2.0))


def test_ensembles_that_are_none_are_refused() -> None:
    for ensemble in (majority_vote, lambda targets: mean_of_probabilities(targets, 1.0)):
        with pytest.raises(SpecError, match="at least one teacher"):
            ensemble([])
        with pytest.raises(MismatchError, match=r"targets\[1\]: must be \[3, 5\]"):
            ensemble([dense(drawn(1, 3, 5)), dense(drawn(1, 3, 6))])
        with pytest.raises(MismatchError, match=r"targets\[1\]"):
            ensemble([dense(drawn(1, 3, 5)), sparse(drawn(1, 1, 5))])


def test_what_a_sparse_teacher_does_not_say_is_not_made_up() -> None:
    ghost = sparse(drawn(5, 3, 5), tail="ghost")
    for mean in MEANS:
        with pytest.raises(MismatchError, match=f"{mean.__name__}.*each class left out"):
            mean([ghost], 1.0)
    with pytest.raises(MismatchError, match="largest logit"):
        majority_vote([replace(ghost, drawn_at=1.0)])


def test_an_ensemble_is_a_constant() -> None:
    values = torch.tensor(drawn(6, 3, 5), requires_grad=True)
    for mean in MEANS:
        assert not mean([DenseTarget(values)], 2.0).requires_grad
