"""DKD and NKD against their formulas in NumPy, the identity they rest on, and confident teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_laws import Array, dense, labels_for, pair, slope, softmax, student_of

from student_train.losses import decoupled_kl, dkd_loss, nkd_loss, soft_target_loss
from teacher_cache.encodings import DenseTarget, SparseTarget, TopKLogits
from teacher_cache.errors import MismatchError

SEEDS = st.integers(0, 10_000)
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 4.0])


def parts(student: Array, teacher: Array, labels: Array, temperature: float) -> tuple[Array, Array, Array]:
    """TCKD, NCKD and p_y [B], in probabilities as the paper states them."""
    tckd, nckd, label = [], [], []
    for z_s, z_t, y in zip(student, teacher, labels, strict=True):
        p, q = softmax(z_t / temperature), softmax(z_s / temperature)
        b_t, b_s = np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]])
        p_hat, q_hat = (np.delete(each, y) / np.delete(each, y).sum() for each in (p, q))
        tckd.append((b_t * np.log(b_t / b_s)).sum())
        nckd.append((p_hat * np.log(p_hat / q_hat)).sum())
        label.append(p[y])
    return np.array(tckd), np.array(nckd), np.array(label)


def nkd(student: Array, teacher: Array, labels: Array, temperature: float, gamma: float) -> float:
    values = []
    for z_s, z_t, y in zip(student, teacher, labels, strict=True):
        own = -softmax(z_t)[y] * np.log(softmax(z_s)[y])
        p, q = softmax(np.delete(z_t, y) / temperature), softmax(np.delete(z_s, y) / temperature)
        values.append(own - gamma * temperature**2 * (p * np.log(q)).sum())
    return float(np.mean(values))


@given(seed=SEEDS, temperature=TEMPERATURES, classes=st.integers(2, 12))
def test_dkd_equals_the_formula(seed: int, temperature: float, classes: int) -> None:
    student, teacher = pair(seed, 5, classes, spread=2.0)
    labels = labels_for(5, classes)
    tckd, nckd, _ = parts(student, teacher, labels.numpy(), temperature)
    found = decoupled_kl(torch.tensor(student), dense(teacher), labels, temperature)
    np.testing.assert_allclose(found[0].numpy(), tckd, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1].numpy(), nckd, rtol=1e-4, atol=1e-5)
    loss = dkd_loss(torch.tensor(student), dense(teacher), labels, temperature, 0.5, 3.0)
    assert float(loss) == pytest.approx(temperature**2 * (0.5 * tckd + 3 * nckd).mean(), rel=1e-4, abs=1e-4)


def test_the_constants_of_dkd_are_those_of_the_authors_code() -> None:
    student, teacher = pair(3, 5, 7, spread=2.0)
    tckd, nckd, _ = parts(student, teacher, labels_for(5, 7).numpy(), 4.0)
    loss = dkd_loss(torch.tensor(student), dense(teacher), labels_for(5, 7))
    assert float(loss) == pytest.approx(16 * (tckd + 8 * nckd).mean(), rel=1e-4)


@given(seed=SEEDS, temperature=TEMPERATURES)
def test_the_divergence_is_the_sum_of_its_parts(seed: int, temperature: float) -> None:
    """KL = TCKD + (1 − p_y) · NCKD, row by row, and so is soft_target_loss with T²."""
    student, teacher = pair(seed, 6, 8, spread=2.0)
    labels = labels_for(6, 8)
    tckd, nckd = (each.numpy() for each in decoupled_kl(torch.tensor(student), dense(teacher), labels, temperature))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    own = p[np.arange(6), labels.numpy()]
    np.testing.assert_allclose(tckd + (1 - own) * nckd, (p * np.log(p / q)).sum(axis=1), rtol=1e-4, atol=1e-5)
    loss = soft_target_loss(torch.tensor(student), dense(teacher), temperature)
    assert float(loss) == pytest.approx(temperature**2 * (tckd + (1 - own) * nckd).mean(), rel=1e-4, abs=1e-4)


@given(seed=SEEDS, temperature=TEMPERATURES, gamma=st.sampled_from([1.0, 1.5]))
def test_nkd_equals_the_formula(seed: int, temperature: float, gamma: float) -> None:
    """The label's part is at T = 1 whatever T is; the others' has T²."""
    student, teacher = pair(seed, 5, 7, spread=2.0)
    labels = labels_for(5, 7)
    loss = nkd_loss(torch.tensor(student), dense(teacher), labels, temperature, gamma)
    assert float(loss) == pytest.approx(nkd(student, teacher, labels.numpy(), temperature, gamma), rel=1e-4)
    if (temperature, gamma) == (1.0, 1.5):
        assert float(nkd_loss(torch.tensor(student), dense(teacher), labels)) == float(loss)


def test_a_teacher_without_doubt_still_says_how_the_others_compare() -> None:
    """p_y rounds to 1: in probabilities the others are 0 / 0; as sums of exponentials they keep all digits."""
    teacher = np.array([[200.0, 3.0, 1.0, 0.0]])
    student = np.array([[0.0, 0.5, -0.5, 1.0]])
    labels = torch.tensor([0])
    tckd, nckd = decoupled_kl(torch.tensor(student).float(), DenseTarget(torch.tensor(teacher).float()), labels, 1.0)
    p, q = softmax(teacher[:, 1:]), softmax(student[:, 1:])
    assert float(nckd) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
    assert float(tckd) == pytest.approx(-np.log(softmax(student)[0, 0]), rel=1e-5)


@pytest.mark.parametrize("spread", [200.0, 1e4])
def test_a_student_without_doubt_keeps_its_gradient(spread: float) -> None:
    """1 − q_y in float32 is 0, and its logarithm −∞."""
    logits = student_of(torch.tensor([[spread, 0.0, 1.0]]))
    target = dense(np.array([[0.0, 1.0, 2.0]]))
    for loss in (dkd_loss, nkd_loss):
        gradient = slope(loss(logits, target, torch.tensor([0])), logits)
        assert gradient.isfinite().all()
        assert gradient[0, 0] > 0 or loss is nkd_loss


def masked(kind: str) -> DenseTarget | SparseTarget:
    """A teacher whose whole mass is at class 0 of 4."""
    logits = torch.tensor([[0.0, -1e9, -1e9, -1e9]])
    if kind == "-inf":
        return DenseTarget(logits.masked_fill(logits < 0, -torch.inf))
    if kind == "-1e9":
        return DenseTarget(logits)
    encoding = TopKLogits(4, 1, "f16", "whole", "renormalise")
    return encoding.decode(encoding.encode(logits))


@pytest.mark.parametrize("kind", ["-inf", "-1e9", "renormalise"])
@pytest.mark.parametrize("label", [0, 2])
@pytest.mark.parametrize("masks", [False, True])
def test_masked_classes_are_finite(kind: str, label: int, masks: bool) -> None:
    """Also where the student masks them too, and where the label is among them. Of −10⁹ the others are even."""
    logits = student_of(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    hidden = torch.tensor([[False, masks, masks, masks]])
    labels, target = torch.tensor([label]), masked(kind)
    _, nckd = decoupled_kl(logits.detach(), target, labels, 1.0)
    for loss in (dkd_loss, nkd_loss):
        value = loss(logits.masked_fill(hidden, -torch.inf), target, labels)
        assert value.isfinite()
        assert slope(value, logits).isfinite().all()
    if label == 0:
        even, q = np.full(3, 1 / 3), softmax(np.array([1.0, 2.0, 3.0]))
        expected = (even * np.log(even / q)).sum() if kind == "-1e9" else 0
        assert float(nckd) == pytest.approx(expected, abs=1e-5)


def test_one_class_has_no_others() -> None:
    logits = student_of(torch.zeros(2, 1))
    for loss in (dkd_loss, nkd_loss):
        value = loss(logits, dense(np.zeros((2, 1))), torch.zeros(2, dtype=torch.int64))
        assert float(value.detach()) == 0
        assert torch.equal(slope(value, logits), torch.zeros(2, 1))


@pytest.mark.parametrize("loss", [dkd_loss, nkd_loss])
def test_positions_of_sequences_count_as_rows(loss: Callable[..., torch.Tensor]) -> None:
    student, teacher = pair(4, 6, 5)
    labels = labels_for(6, 5)
    flat = loss(torch.tensor(student), dense(teacher), labels)
    deep = loss(torch.tensor(student).reshape(2, 3, 5), dense(teacher.reshape(2, 3, 5)), labels.reshape(2, 3))
    torch.testing.assert_close(flat, deep)


@pytest.mark.parametrize("loss", [dkd_loss, nkd_loss])
def test_what_does_not_fit_is_refused(loss: Callable[..., torch.Tensor]) -> None:
    _, teacher = pair(5, 3, 6)
    values = torch.tensor(teacher).float()
    for labels in (torch.zeros(1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(MismatchError, match="labels"):
            loss(torch.zeros(3, 6), DenseTarget(values), labels)
    labels = labels_for(3, 6)
    encoding = TopKLogits(6, 2, "f16", "whole", "ghost")
    ghost = encoding.decode(encoding.encode(values))
    for target, found in ((ghost, "2 of 6 classes, tail ghost"), (replace(ghost, drawn_at=1.0), "sampled_k")):
        with pytest.raises(MismatchError, match=f"each class left out.*{found}"):
            loss(torch.zeros(3, 6), target, labels)
