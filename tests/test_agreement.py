"""Two answers of one teacher agree however they round; two teachers' answers do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor

from teacher_cache.agreement import disagreement
from teacher_cache.encodings import Encoding, SampledLogits, Shared, Target, blocks_of, open_encoding
from teacher_cache.spec import FieldSpec

NOISE = 2.0**-8
CLASSES = 12

LOGITS: dict[str, Any] = {
    "dense_f32": "dense_f32",
    "dense_f16": "dense_f16",
    "dense_bf16": "dense_bf16",
    "dense_u8": "dense_u8",
    "dense_u8 row": {"kind": "dense_u8", "mode": "row"},
    "dense_u4": "dense_u4",
    "top_k": {"kind": "top_k", "k": 5},
    "top_k u8": {"kind": "top_k", "k": 5, "values": "u8", "ids": "packed"},
    "top_k all": {"kind": "top_k", "k": CLASSES, "tail": "ghost"},
    "top_k 1": {"kind": "top_k", "k": 1, "tail": "renormalise"},
    "nucleus": {"kind": "nucleus", "mass": 0.9, "cap": 8},
    "nucleus u8": {"kind": "nucleus", "mass": 0.98, "cap": 12, "values": "u8"},
}
SAMPLES: dict[str, Any] = {
    "threshold": {"kind": "sampled_k", "k": 6},
    "warm": {"kind": "sampled_k", "k": 6, "temperature": 4.0},
    "replacement": {"kind": "sampled_k", "k": 6, "scheme": "replacement"},
}


def encoding_of(described: Any, shape: tuple[int, ...] = (CLASSES,), shared: Shared | None = None) -> Encoding:
    return open_encoding(FieldSpec(encoding=described).fixed, shape, "logits", shared)


def target_of(encoding: Encoding, values: Tensor) -> Target:
    if blocks_of(encoding):
        words = np.random.Generator(np.random.Philox(5)).integers(0, 2**32, (len(values), 4 * blocks_of(encoding)))
        return encoding.decode(encoding.encode_drawn(values, words.astype(np.uint32)))  # type: ignore[attr-defined]
    return encoding.decode(encoding.encode(values))


def answers(seed: int, scale: float, rows: int = 6, shape: tuple[int, ...] = (CLASSES,)) -> Tensor:
    values = torch.randn((rows, *shape), generator=torch.Generator().manual_seed(seed)) * scale
    # Ties at every edge: rounding alone decides which of them a sparse encoding keeps.
    values[0] = values[0].round()
    values[1] = values[1, ..., :1]
    return values


def rounded(values: Tensor, seed: int, noise: float) -> Tensor:
    """As another processor would have them: off by up to `noise` of the largest."""
    generator = torch.Generator().manual_seed(seed + 1)
    error = (torch.rand(values.shape, generator=generator) * 2 - 1).sign() * noise
    return values + error * values.abs().amax()


@pytest.mark.parametrize("name", LOGITS)
@given(seed=SEEDS, scale=st.sampled_from([0.01, 1.0, 5.0, 30.0]))
@example(seed=576, scale=30.0)  # A class further down than a byte reaches: kept by one, left out by the other.
def test_rounding_is_no_disagreement(name: str, seed: int, scale: float) -> None:
    """The worst rounding everywhere, at once: levels, ids, counts and tails may change, and stay within bounds."""
    encoding, values = encoding_of(LOGITS[name]), answers(seed, scale)
    one, other = target_of(encoding, values), target_of(encoding, rounded(values, seed, NOISE / 4))
    assert (disagreement(one, one, encoding, NOISE, True) == 0).all()
    assert disagreement(one, other, encoding, NOISE, True).max() <= 1
    assert disagreement(other, one, encoding, NOISE, True).max() <= 1


@pytest.mark.parametrize("name", LOGITS)
@given(seed=SEEDS, scale=st.sampled_from([1.0, 5.0, 30.0]))
def test_no_rounding_is_left_out_of_the_bound(name: str, seed: int, scale: float) -> None:
    """With hardly any noise granted, one level, one unit in the last place or one swap of ties is still no fault."""
    encoding, values = encoding_of(LOGITS[name]), answers(seed, scale)
    other = target_of(encoding, rounded(values, seed, 2.0**-21))
    assert disagreement(target_of(encoding, values), other, encoding, 2.0**-18, True).max() <= 1


@pytest.mark.parametrize("name", LOGITS)
@given(seed=SEEDS, scale=st.sampled_from([1.0, 5.0, 30.0]), row=st.integers(2, 5))
def test_another_answer_is_found_in_its_row(name: str, seed: int, scale: float, row: int) -> None:
    """A row moves by a little more than the bounds allow: by eight roundings and three steps of the encoding."""
    encoding, values = encoding_of(LOGITS[name]), answers(seed, scale)
    # Confident rows: what a nucleus or a top-1 keeps is then one class, and only the sums tell.
    moved = values.clone()
    spread = float(values.max() - values.min())
    step = {"dense_u8": 0.125, "dense_u8 row": spread / 255, "dense_u4": spread / 15}.get(name, 0.0)
    if "u8" in name and "dense" not in name:
        step = 0.05 * spread
    size = float(values.abs().max())
    lse = float(values.logsumexp(1).abs().max())
    moved[row] += 8 * NOISE * max(spread, size, lse) + 3 * step
    found = disagreement(target_of(encoding, values), target_of(encoding, moved), encoding, NOISE, True)
    assert found[row] > 1
    others = [number for number in range(6) if number != row]
    assert (found[others] == 0).all()


@pytest.mark.parametrize("name", LOGITS)
@given(seed=SEEDS)
def test_other_classes_are_found(name: str, seed: int) -> None:
    """The same values at other classes: the sums are the same, the answer is not."""
    encoding, values = encoding_of(LOGITS[name]), answers(seed, 5.0)
    values[2] = torch.arange(CLASSES) * 2.0
    moved = values.clone()
    moved[2] = values[2].flip(0)
    assert disagreement(target_of(encoding, values), target_of(encoding, moved), encoding, NOISE, True)[2] > 1


@pytest.mark.parametrize("name", LOGITS)
def test_sequences(name: str) -> None:
    """Of [T, C] every position is compared."""
    encoding, values = encoding_of(LOGITS[name], (3, CLASSES)), answers(3, 5.0, shape=(3, CLASSES))
    moved = values.clone()
    moved[4, 2] = values[4, 2].flip(0) + 9
    one = target_of(encoding, values)
    other = target_of(encoding, rounded(values, 9, NOISE / 4))
    assert disagreement(one, other, encoding, NOISE, True).max() <= 1
    found = disagreement(one, target_of(encoding, moved), encoding, NOISE, True).reshape(6, -1).amax(1)
    assert [row for row in range(6) if found[row] > 1] == [4]


def test_a_mask_is_no_size() -> None:
    """Classes masked with −1e9 do not widen the bound of the others, and agree among themselves."""
    encoding, values = encoding_of("dense_f32"), answers(1, 2.0)
    values[:, 3] = -1e9
    moved = values.clone()
    moved[4, 0] += 0.5
    found = disagreement(target_of(encoding, values), target_of(encoding, moved), encoding, NOISE, True)
    assert found[4] > 1
    slightly = values.clone()
    slightly[:, 3] *= 1 + 2.0**-10
    assert disagreement(target_of(encoding, values), target_of(encoding, slightly), encoding, NOISE, True).max() <= 1


@pytest.mark.parametrize("name", ["top_k", "top_k u8", "nucleus"])
def test_another_tail_is_found(name: str) -> None:
    """The same classes with the same values, and more left out than there was."""
    encoding, values = encoding_of(LOGITS[name]), answers(1, 1.0)
    columns = dict(encoding.encode(values))
    columns["tail_logmass"] = columns["tail_logmass"] + np.float16(3)
    found = disagreement(target_of(encoding, values), encoding.decode(columns), encoding, NOISE, True)
    assert (found[2:] > 1).all()


def test_nan_is_no_agreement() -> None:
    encoding, values = encoding_of("dense_f32"), answers(1, 2.0)
    spoilt = {"values": encoding.encode(values)["values"].copy()}
    spoilt["values"][2, 1] = np.nan
    found = disagreement(target_of(encoding, values), encoding.decode(spoilt), encoding, NOISE, True)
    assert not (found <= 1)[2]


@pytest.mark.parametrize("kind", ["u8_channel", "feature_head"])
@given(seed=SEEDS)
def test_levels_with_shared_ranges(kind: str, seed: int) -> None:
    """One level off is rounding; two and the noise are not. Of a head the levels count, not the logits."""
    low, step = torch.full((CLASSES,), -6.0), torch.linspace(0.01, 0.1, CLASSES)
    tensors = {"low": low, "step": step}
    tensors |= {"weight": torch.ones(4, CLASSES) * 100, "bias": torch.zeros(4)} if kind == "feature_head" else {}
    shared = Shared("test", tensors)
    if kind == "feature_head":
        encoding = open_encoding(FieldSpec(encoding={"kind": kind, "width": CLASSES}).fixed, (4,), "logits", shared)
    else:
        encoding = open_encoding(FieldSpec(encoding=kind).fixed, (CLASSES,), "feature:stem", shared)
    values = answers(seed, 1.0).clamp(-4, 4)
    is_logits = kind == "feature_head"
    one, other = target_of(encoding, values), target_of(encoding, rounded(values, seed, NOISE / 4))
    assert disagreement(one, other, encoding, NOISE, is_logits).max() <= 1
    moved = values.clone()
    moved[3, 7] += 2 * NOISE * float(values.abs().max()) + 3 * float(step[7])
    assert disagreement(one, target_of(encoding, moved), encoding, NOISE, is_logits)[3] > 1


@pytest.mark.parametrize("name", SAMPLES)
@given(seed=SEEDS, scale=st.sampled_from([1.0, 3.0]))
def test_samples(name: str, seed: int, scale: float) -> None:
    """The same draws from nearly the same logits agree; from other logits they do not."""
    encoding, values = encoding_of(SAMPLES[name]), answers(seed, scale, rows=32)
    one, other = target_of(encoding, values), target_of(encoding, rounded(values, seed, 2.0**-20))
    assert isinstance(encoding, SampledLogits)
    assert (disagreement(one, one, encoding, NOISE, True) == 0).all()
    assert disagreement(one, other, encoding, NOISE, True).max() <= 1
    moved = answers(seed + 7, 4 * encoding.temperature, rows=32)
    assert disagreement(one, target_of(encoding, moved), encoding, NOISE, True).max() > 1
