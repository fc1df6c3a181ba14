"""Losses of features, attention, flow and saliency against their formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_laws import Array, dense, drawn, pair, slope, student_of
from torch import nn

from student_train.losses import (
    attention_map,
    attention_transfer_loss,
    feature_mae,
    feature_mse,
    flow_loss,
    flow_matrix,
    hint_loss,
    normalised_activation_loss,
    saliency_loss,
)
from teacher_cache.encodings import DenseTarget, Shared, U8ChannelFeatures
from teacher_cache.errors import MismatchError

SEEDS = st.integers(0, 10_000)
SCALES = st.sampled_from([1e-3, 0.5, 3.0, 1e3])


def unit_differences(student: Array, teacher: Array) -> Array:
    """[B, N], each side's rows at length 1."""
    rows = (each.reshape(len(each), -1) for each in (student, teacher))
    q_s, q_t = (each / np.sqrt((each**2).sum(axis=1, keepdims=True)) for each in rows)
    return np.asarray(q_s - q_t)


@given(seed=SEEDS, rows=st.integers(1, 5))
def test_feature_errors_are_means_over_all_numbers(seed: int, rows: int) -> None:
    student, teacher = pair(seed, rows, 3, 2, 4)
    mse, mae = (loss(torch.tensor(student), dense(teacher)) for loss in (feature_mse, feature_mae))
    assert float(mse) == pytest.approx(((student - teacher) ** 2).mean())
    assert float(mae) == pytest.approx(np.abs(student - teacher).mean())


@given(seed=SEEDS)
def test_hints_go_through_the_projection(seed: int) -> None:
    """A 1×1 convolution, stated as a product over channels; it is trained, and the student behind it."""
    student, teacher = drawn(seed, 2, 3, 4, 4), drawn(seed + 1, 2, 5, 4, 4)
    projection = nn.Conv2d(3, 5, 1).double()
    weight, bias = (each.detach().numpy() for each in (projection.weight, projection.bias))
    projected = np.einsum("dc,bchw->bdhw", weight[:, :, 0, 0], student) + bias[:, None, None]
    maps = student_of(student, torch.float64)
    loss = hint_loss(maps, dense(teacher), projection)
    assert float(loss.detach()) == pytest.approx(((projected - teacher) ** 2).mean(), rel=1e-6)
    loss.backward()
    assert maps.grad is not None
    assert projection.weight.grad is not None
    assert projection.weight.grad.abs().sum() > 0
    with pytest.raises(MismatchError, match=r"projected student map: must be \[2, 5, 4, 4\]"):
        hint_loss(maps, dense(teacher), nn.Conv2d(3, 4, 1).double())


@given(seed=SEEDS)
def test_an_attention_map_is_what_the_teacher_caches(seed: int) -> None:
    maps, tokens = drawn(seed, 2, 3, 4, 5), drawn(seed, 2, 7, 3)
    np.testing.assert_allclose(attention_map(torch.tensor(maps)).numpy(), (maps**2).mean(axis=1))
    np.testing.assert_allclose(attention_map(torch.tensor(tokens)).numpy(), (tokens**2).mean(axis=2))
    half = attention_map(torch.full((1, 2, 2, 2), 300.0).half())
    assert torch.equal(half, torch.full((1, 2, 2), 9e4))


@given(seed=SEEDS, height=st.integers(1, 4), width=st.integers(2, 4))
def test_attention_losses_equal_the_formulas(seed: int, height: int, width: int) -> None:
    student, teacher = (each**2 for each in pair(seed, 4, height, width))
    difference = unit_differences(student, teacher)
    squared = attention_transfer_loss(torch.tensor(student), dense(teacher))
    plain = normalised_activation_loss(torch.tensor(student), dense(teacher))
    assert float(squared) == pytest.approx((difference**2).sum(axis=1).mean(), rel=1e-6, abs=1e-12)
    assert float(plain) == pytest.approx(np.sqrt((difference**2).sum(axis=1)).mean(), rel=1e-6, abs=1e-9)


def test_the_weight_of_the_authors_code_is_a_thousand_over_the_places() -> None:
    """β = 1000 on the mean over B·H·W is 1000 / (H·W) here, 15.625 for 8 × 8."""
    student, teacher = (each**2 for each in pair(1, 4, 8, 8))
    theirs = 1000 * (unit_differences(student, teacher) ** 2).mean()
    ours = 15.625 * attention_transfer_loss(torch.tensor(student), dense(teacher))
    assert float(ours) == pytest.approx(theirs, rel=1e-6)


@given(seed=SEEDS, scale=SCALES)
def test_attention_is_invariant_under_the_scale_of_features(seed: int, scale: float) -> None:
    student, teacher = pair(seed, 3, 4, 2, 3)
    for loss in (attention_transfer_loss, normalised_activation_loss):
        values = [
            loss(attention_map(torch.tensor(a * student)), DenseTarget(attention_map(torch.tensor(b * teacher))))
            for a, b in ((1, 1), (scale, 1), (1, scale))
        ]
        assert [float(value) for value in values[1:]] == pytest.approx([float(values[0])] * 2, rel=1e-5)


def test_maps_of_zeros_attend_to_nothing() -> None:
    """A dead row gets no slope of its own, and the others theirs."""
    teacher = drawn(2, 2, 2, 3) ** 2
    student = student_of(drawn(3, 2, 2, 3) ** 2)
    with torch.no_grad():
        student[0] = 0
    for loss in (attention_transfer_loss, normalised_activation_loss):
        value = loss(student, dense(teacher))
        gradient = slope(value, student)
        assert torch.equal(gradient[0], torch.zeros(2, 3))
        assert gradient[1].abs().sum() > 0
    alone = attention_transfer_loss(student[:1], dense(teacher[:1]))
    assert float(alone.detach()) == pytest.approx(1)


@given(seed=SEEDS)
def test_flow_equals_the_formula(seed: int) -> None:
    first, second, teacher = drawn(seed, 2, 3, 4, 5), drawn(seed + 1, 2, 6, 4, 5), drawn(seed + 2, 2, 3, 6)
    flow = np.zeros((2, 3, 6))
    for b, m, n in np.ndindex(*flow.shape):
        flow[b, m, n] = (first[b, m] * second[b, n]).sum() / 20
    found = flow_matrix(torch.tensor(first), torch.tensor(second))
    np.testing.assert_allclose(found.numpy(), flow, rtol=1e-6, atol=1e-9)
    expected = ((flow - teacher) ** 2).sum(axis=(1, 2)).mean()
    assert float(flow_loss(found, dense(teacher))) == pytest.approx(expected, rel=1e-6)


def test_flow_needs_maps_of_one_size() -> None:
    with pytest.raises(MismatchError, match="Pool"):
        flow_matrix(torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4))


def test_flow_is_exact_within_autocast() -> None:
    maps = [torch.tensor(drawn(seed, 2, 3, 4, 4)).float() for seed in (1, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = flow_matrix(*maps)
    assert torch.equal(inside, flow_matrix(*maps))
    assert flow_matrix(*(each.half() for each in maps)).dtype == torch.float32


@given(seed=SEEDS, scale=SCALES)
def test_saliency_compares_directions(seed: int, scale: float) -> None:
    student, teacher = pair(seed, 3, 3, 4, 4)
    expected = (unit_differences(student, teacher) ** 2).sum(axis=1).mean()
    for gradient in (student, scale * student):
        assert float(saliency_loss(torch.tensor(gradient), dense(teacher))) == pytest.approx(expected, rel=1e-6)
    assert float(saliency_loss(torch.tensor(-teacher), dense(teacher))) == pytest.approx(4)


def test_saliency_has_a_second_backward_pass() -> None:
    """∂z_y/∂x is made with a graph, and the loss reaches the weights through it; of ReLU's kinks too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    views = torch.tensor(drawn(1, 3, 3, 2, 2), requires_grad=True)
    labels = torch.tensor([0, 3, 1])
    chosen = model(views).gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, views, create_graph=True)
    saliency_loss(gradient, dense(drawn(2, 3, 3, 2, 2))).backward()
    weight = model[1].weight
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0


def test_quantised_features_are_read_through_their_scale() -> None:
    """Levels in a byte are no features: a loss on them would be of another size altogether."""
    shared = Shared("features", {"low": torch.tensor([-2.0, 0.0]), "step": torch.tensor([0.01, 0.5])})
    encoding = U8ChannelFeatures((2,), shared)
    target = encoding.decode(encoding.encode(torch.tensor([[-1.0, 3.0], [0.5, 100.0]])))
    assert target.values.dtype == torch.uint8
    expected = np.array([[-1.0, 3.0], [0.5, 100.0]])
    student = drawn(4, 2, 2)
    loss = feature_mse(torch.tensor(student), target)
    assert float(loss) == pytest.approx(((student - expected) ** 2).mean(), rel=1e-5)
