"""SEED against its formula in NumPy, and the queue of rows seen before."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_laws import Array, dense, drawn, pair, slope, softmax, student_of

from student_train.losses import FeatureQueue, seed_loss
from teacher_cache.errors import MismatchError, SpecError

SEEDS = st.integers(0, 10_000)


def units(features: Array) -> Array:
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


def reference(student: Array, teacher: Array, queue: Array, tau_s: float, tau_t: float) -> float:
    """−Σ p log q over [own teacher's feature, queue], the mean over the batch."""
    values = []
    for z_s, z_t in zip(units(student), units(teacher), strict=True):
        against = np.concatenate([z_t[None], queue])
        p, q = softmax(against @ z_t / tau_t), softmax(against @ z_s / tau_s)
        values.append(-(p * np.log(q)).sum())
    return float(np.mean(values))


def queue_of(features: Array, size: int = 8) -> FeatureQueue:
    queue = FeatureQueue(size, features.shape[1])
    queue.push(dense(features))
    return queue


@given(seed=SEEDS, held=st.integers(1, 8), tau_t=st.sampled_from([0.01, 0.1, 1.0]))
def test_seed_equals_the_formula(seed: int, held: int, tau_t: float) -> None:
    """Of a queue that is not full only what it holds counts."""
    (student, teacher), seen = pair(seed, 4, 5), drawn(seed + 1, held, 5)
    loss = seed_loss(torch.tensor(student), dense(teacher), queue_of(seen), 0.2, tau_t)
    assert float(loss) == pytest.approx(reference(student, teacher, units(seen), 0.2, tau_t), rel=1e-4, abs=1e-5)


def test_the_temperatures_are_the_papers() -> None:
    (student, teacher), seen = pair(1, 4, 5), drawn(2, 8, 5)
    found = seed_loss(torch.tensor(student), dense(teacher), queue_of(seen))
    assert float(found) == pytest.approx(reference(student, teacher, units(seen), 0.2, 0.01), rel=1e-4)


@given(seed=SEEDS, scale=st.sampled_from([1e-3, 1e3]))
def test_seed_is_invariant_under_the_scale_of_features(seed: int, scale: float) -> None:
    (student, teacher), seen = pair(seed, 4, 5), drawn(seed + 1, 6, 5)
    here = seed_loss(torch.tensor(student), dense(teacher), queue_of(seen), 0.2, 0.1)
    there = seed_loss(torch.tensor(scale * student), dense(scale * teacher), queue_of(scale * seen), 0.2, 0.1)
    assert float(there) == pytest.approx(float(here), rel=1e-4)


def test_an_empty_queue_says_nothing() -> None:
    student = student_of(drawn(3, 4, 5))
    loss = seed_loss(student, dense(drawn(4, 4, 5)), FeatureQueue(8, 5))
    assert float(loss.detach()) == 0
    assert torch.equal(slope(loss, student), torch.zeros(4, 5))


def test_a_step_along_the_slope_turns_the_student_to_its_teacher() -> None:
    teacher, seen = drawn(5, 4, 5), drawn(6, 8, 5)
    student = student_of(drawn(7, 4, 5), torch.float64)
    before = torch.cosine_similarity(student.detach(), torch.tensor(teacher)).mean()
    for _ in range(200):
        loss = seed_loss(student, dense(teacher), queue_of(seen))
        student = student_of(student - 0.1 * slope(loss, student), torch.float64)
    assert torch.cosine_similarity(student.detach(), torch.tensor(teacher)).mean() > before + 0.2


@given(pushes=st.lists(st.integers(1, 7), max_size=6), size=st.integers(1, 6))
def test_the_queue_holds_the_last_rows(pushes: list[int], size: int) -> None:
    """Also where a batch is larger than it, and where it goes round several times."""
    queue, everything = FeatureQueue(size, 3), np.zeros((0, 3))
    for turn, rows in enumerate(pushes):
        fresh = drawn(turn, rows, 3)
        queue.push(dense(fresh))
        everything = np.concatenate([everything, units(fresh)])
    assert len(queue) == min(size, len(everything))
    expected = sorted(everything[-size:].astype(np.float32).tolist())
    np.testing.assert_allclose(sorted(queue.features_KD.tolist()), expected, rtol=1e-5, atol=1e-6)


@given(before=st.integers(0, 9), after=st.integers(1, 9))
def test_a_queue_goes_on_where_it_was_saved(before: int, after: int) -> None:
    one, other = FeatureQueue(4, 3), FeatureQueue(4, 3)
    for turn in range(before):
        one.push(dense(drawn(turn, 3, 3)))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    saved = one.state_dict()
    for turn in range(after):
        for queue in (one, other):
            queue.push(dense(drawn(100 + turn, 3, 3)))
    assert torch.equal(one.features_KD, other.features_KD)
    assert len(one) == len(other)
    # What was saved does not change with the queue.
    again = FeatureQueue(4, 3)
    again.load_state_dict(saved)
    assert len(again) == min(4, 3 * before)


def test_a_state_can_be_saved_with_the_weights_only(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Plain values and tensors: `torch.load` with `weights_only` reads them."""
    path = tmp_path_factory.mktemp("queue") / "state.pt"
    torch.save(queue_of(drawn(1, 5, 3)).state_dict(), path)
    queue = FeatureQueue(8, 3)
    queue.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(queue.features_KD, queue_of(drawn(1, 5, 3)).features_KD)


def test_a_push_before_the_backward_pass_changes_nothing() -> None:
    teacher, seen = dense(drawn(8, 4, 5)), drawn(9, 8, 5)
    one, other = (student_of(drawn(10, 4, 5)) for _ in range(2))
    queue = queue_of(seen)
    loss = seed_loss(one, teacher, queue)
    queue.push(teacher)
    expected = seed_loss(other, teacher, queue_of(seen))
    assert torch.equal(slope(loss, one), slope(expected, other))


def test_what_does_not_fit_is_refused() -> None:
    queue = queue_of(drawn(1, 4, 5))
    with pytest.raises(MismatchError, match=r"\[B, 5\]"):
        queue.push(dense(drawn(2, 4, 6)))
    with pytest.raises(MismatchError, match=r"\[B, 5\]"):
        seed_loss(torch.zeros(4, 6), dense(drawn(2, 4, 6)), queue)
    with pytest.raises(MismatchError, match=r"student features: must be \[4, 5\]"):
        seed_loss(torch.zeros(4, 6), dense(drawn(2, 4, 5)), queue)
    with pytest.raises(MismatchError, match=r"queue: must be \[8, 5\]"):
        FeatureQueue(4, 5).load_state_dict(queue.state_dict())
    for size, width in ((0, 5), (4, 0)):
        with pytest.raises(SpecError, match="at least 1"):
            FeatureQueue(size, width)
