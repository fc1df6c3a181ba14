"""The soft-target loss against an independent statement of the formula, and against the traps of the field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from student_train.losses import soft_target_loss
from teacher_cache.encodings import DenseTarget, TopKLogits

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def reference(student: Array, teacher: Array, temperature: float) -> float:
    """T² · mean_B Σ_c p (log p − log q), in float64 NumPy."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float(temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=1).mean())


def draw(seed: int, classes: int = 10, spread: float = 3.0) -> tuple[Array, Array]:
    random = np.random.Generator(np.random.Philox(seed))
    return random.normal(0, spread, (6, classes)), random.normal(0, spread, (6, classes))


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0]))
def test_dense_equals_the_formula(seed: int, temperature: float) -> None:
    student, teacher = draw(seed)
    loss = soft_target_loss(torch.tensor(student), DenseTarget(torch.tensor(teacher)), temperature)
    assert float(loss) == pytest.approx(reference(student, teacher, temperature), rel=2e-5, abs=1e-6)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 10), temperature=st.sampled_from([1.0, 2.0, 4.0]))
def test_sparse_equals_dense_on_the_decoded_distribution(seed: int, k: int, temperature: float) -> None:
    """The closed form over the classes left out is the dense loss on the same distribution: value and gradient."""
    student, teacher = draw(seed)
    encoding = TopKLogits(10, k)
    target = encoding.decode(encoding.encode(torch.tensor(teacher, dtype=torch.float32)))
    decoded = DenseTarget(target.log_probs(1.0))
    losses, gradients = [], []
    for form in (target, decoded):
        logits = torch.tensor(student, requires_grad=True)
        loss = soft_target_loss(logits, form, temperature)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(logits.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_gradient_is_t_times_q_minus_p_over_b() -> None:
    """So it points towards the teacher; the seed study's published code pointed away."""
    student, teacher = draw(1)
    logits = torch.tensor(student, requires_grad=True)
    soft_target_loss(logits, DenseTarget(torch.tensor(teacher)), 3.0).backward()
    expected = 3.0 * (softmax(student / 3) - softmax(teacher / 3)) / len(student)
    np.testing.assert_allclose(logits.grad, expected, rtol=1e-4, atol=1e-7)


def test_it_is_not_averaged_over_classes() -> None:
    """`mean` in place of `batchmean` is ten times too small on ten classes."""
    student, teacher = draw(2)
    p, q = softmax(teacher), softmax(student)
    wrong = (p * (np.log(p) - np.log(q))).mean()
    loss = soft_target_loss(torch.tensor(student), DenseTarget(torch.tensor(teacher)), 1.0)
    assert float(loss) == pytest.approx(10 * float(wrong), rel=1e-4)


def test_high_temperature_is_half_the_centred_logit_mse() -> None:
    """Hinton et al., section 2.1: T² KL → Σ_c (v − z)² / 2C over centred logits as T grows."""
    student, teacher = draw(3)
    centred = [logits - logits.mean(axis=1, keepdims=True) for logits in (student, teacher)]
    limit = 0.5 * ((centred[0] - centred[1]) ** 2).mean(axis=1).mean()
    dense = DenseTarget(torch.tensor(teacher))
    assert reference(student, teacher, 1e4) == pytest.approx(limit, rel=1e-2)
    assert float(soft_target_loss(torch.tensor(student), dense, 200.0)) == pytest.approx(limit, rel=3e-2)


def test_masked_classes_have_no_weight() -> None:
    """A teacher that masks classes with −10⁹ leaves a tail without mass: 0 · −∞ must not become NaN."""
    encoding = TopKLogits(4, 1)
    target = encoding.decode(encoding.encode(torch.tensor([[0.0, -1e9, -1e9, -1e9]])))
    logits = torch.zeros(1, 4, requires_grad=True)
    loss = soft_target_loss(logits, target, 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(4))
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.75, 0.25, 0.25, 0.25]]))


def test_a_student_that_equals_the_teacher_has_no_loss() -> None:
    _, teacher = draw(4)
    dense = DenseTarget(torch.tensor(teacher))
    assert float(soft_target_loss(torch.tensor(teacher), dense, 4.0)) == pytest.approx(0, abs=1e-6)
