"""What is particular to one encoding, and what a build reports; the laws they share: `test_encoding_laws`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, logits
from torch import Tensor

from teacher_cache.encodings import (
    DenseTarget,
    Encoding,
    FeatureHeadLogits,
    NucleusLogits,
    Shared,
    SparseTarget,
    U8ChannelFeatures,
    joined,
    open_encoding,
)
from teacher_cache.encodings.base import narrowest
from teacher_cache.encodings.fidelity import measure_feature, measure_logits, total
from teacher_cache.encodings.packing import pack, unpack
from teacher_cache.encodings.scales import from_levels, to_levels
from teacher_cache.encodings.top_k import TopKLogits
from teacher_cache.encodings.u8_channel import Ranges
from teacher_cache.errors import NonFiniteError, SpecError
from teacher_cache.spec import DenseBF16, DenseF16, DenseF32, DenseU8, EncodingSpec, FieldSpec, TeacherSpec, TopK, parse

SPECS: dict[str, EncodingSpec] = {
    "dense_f32": DenseF32(kind="dense_f32"),
    "dense_f16": DenseF16(kind="dense_f16"),
    "dense_bf16": DenseBF16(kind="dense_bf16"),
    "dense_u8": DenseU8(kind="dense_u8"),
    "dense_u8 by row": DenseU8(kind="dense_u8", mode="row"),
    "top_1": TopK(kind="top_k", k=1),
    "top_5": TopK(kind="top_k", k=5),
    "top_all": TopK(kind="top_k", k=10**9),
}
ALL = pytest.mark.parametrize("name", SPECS)


def opened(name: str, classes: int) -> Encoding:
    """An encoding of a name for C classes; k is lowered to C."""
    spec = SPECS[name]
    if isinstance(spec, TopK):
        spec = TopK(kind="top_k", k=min(spec.k, classes))
    return open_encoding(spec, (classes,), "logits")


def round_trip(name: str, values_BC: Tensor) -> Any:
    encoding = opened(name, values_BC.shape[1])
    return encoding.decode(encoding.encode(values_BC))


def softmax(values_BC: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(values_BC.double() / temperature, dim=1)


@given(values_BC=logits())
def test_dense_f32_is_exact(values_BC: Tensor) -> None:
    assert torch.equal(round_trip("dense_f32", values_BC).values, values_BC)


@given(values_BC=logits())
def test_dense_bf16_keeps_eight_bits(values_BC: Tensor) -> None:
    """Relative error at most 2⁻⁸, whatever the size; stored as bits, which shifted are a float32."""
    encoding = opened("dense_bf16", values_BC.shape[1])
    columns = encoding.encode(values_BC)
    assert columns["values"].dtype == np.uint16
    by_hand = (columns["values"].astype(np.uint32) << 16).view(np.float32)
    target = encoding.decode(columns)
    assert isinstance(target, DenseTarget)
    assert target.values.dtype == torch.bfloat16
    assert (target.values.float().numpy() == by_hand).all()
    error = (target.values.double() - values_BC.double()).abs()
    assert bool((error <= values_BC.double().abs() * 2.0**-8 + 2.0**-133).all())


def test_dense_bf16_holds_what_half_precision_cannot() -> None:
    values_BC = torch.tensor([[-1e9, 70_000.0, 3e38]])
    assert bool((round_trip("dense_bf16", values_BC).values.float() / values_BC - 1).abs().max() < 2.0**-8)
    with pytest.raises(NonFiniteError, match="row 0"):
        opened("dense_bf16", 1).encode(torch.tensor([[3.4028235e38]]))


QUANTISED = pytest.mark.parametrize("name", ["dense_u8", "dense_u8 by row"])


def steps_of(name: str, values_BC: Tensor) -> Tensor:
    """The step of each row, by the definition of the encoding."""
    spread_B = values_BC.double().amax(1) - values_BC.double().amin(1)
    return torch.full_like(spread_B, 0.125) if name == "dense_u8" else spread_B / 255


@QUANTISED
@given(values_BC=logits())
def test_dense_u8_is_half_a_step_off(name: str, values_BC: Tensor) -> None:
    """Each level below the maximum is off by at most half a step, or is cut at 255 of them; still one byte."""
    target = round_trip(name, values_BC)
    assert target.values.dtype == torch.uint8
    below_BC = values_BC.double().amax(1, keepdim=True) - values_BC.double()
    step_B1 = steps_of(name, values_BC)[:, None]
    error_BC = (target.values.double() * target.scale.step_B.double()[:, None] - below_BC).abs()
    inside_BC = below_BC <= 255 * step_B1
    allowed_BC = step_B1 / 2 + 1e-6 + below_BC * 2.0**-22
    assert bool((error_BC <= allowed_BC)[inside_BC].all())
    assert bool((target.values[~inside_BC] == 255).all())
    raw_error_BC = (target.dense().values.double() - values_BC.double()).abs()
    rounded_B1 = values_BC.double().abs().amax(1, keepdim=True) * 2.0**-11 + 2.0**-24
    assert bool((raw_error_BC <= allowed_BC + rounded_B1)[inside_BC].all())


@QUANTISED
@pytest.mark.parametrize("temperature", [1, 2, 4])
@given(values_BC=logits())
def test_dense_u8_keeps_its_declared_error(name: str, temperature: int, values_BC: Tensor) -> None:
    """KL ≤ (step / T)² / 8; classes cut at 255 fixed steps have e^(−255 · step / T) too much, each, at most."""
    target, step_B = round_trip(name, values_BC), steps_of(name, values_BC)
    exact_BC, decoded_BC = softmax(values_BC, temperature), target.log_probs(temperature).double()
    kl_B = (exact_BC.exp() * (exact_BC - decoded_BC)).sum(1)
    cut = values_BC.shape[1] * math.exp(-255 * 0.125 / temperature) if name == "dense_u8" else 0.0
    # Log-probabilities are float32: their own rounding is allowed for.
    rounding_B = 1e-5 + decoded_BC.abs().amax(1) * 2.0**-22
    assert bool((kl_B <= (step_B / temperature) ** 2 / 8 + cut + rounding_B).all())


def test_dense_u8_by_hand() -> None:
    """Levels, step, maximum and log-sum-exp of two small rows."""
    values_BC = torch.tensor([[2.0, 1.9, -40.0], [0.0, -51.0, -25.0]])
    fixed = open_encoding(SPECS["dense_u8"], (3,), "logits").encode(values_BC)
    assert fixed["values"].tolist() == [[0, 1, 255], [0, 255, 200]]
    assert fixed["maximum"].tolist() == [2.0, 0.0]
    assert fixed["lse"].tolist() == pytest.approx([2 + math.log(1 + math.exp(-0.1)), 0], abs=2e-3)
    own = open_encoding(SPECS["dense_u8 by row"], (3,), "logits").encode(values_BC)
    assert own["values"].tolist() == [[0, 1, 255], [0, 255, 125]]
    assert own["step"].tolist() == pytest.approx([42 / 255, 0.2])


def test_dense_u8_of_a_row_without_a_range() -> None:
    """Equal logits have no range to divide by 255: the step is 1, and every level 0."""
    columns = open_encoding(SPECS["dense_u8 by row"], (3,), "logits").encode(torch.full((1, 3), 2.5))
    assert (columns["step"].tolist(), columns["values"].tolist()) == ([1.0], [[0, 0, 0]])


@QUANTISED
def test_dense_u8_refuses_a_maximum_that_half_precision_cannot_hold(name: str) -> None:
    values_BC = torch.tensor([[0.0, 1.0], [70_000.0, 69_999.0]])
    with pytest.raises(NonFiniteError, match="row 1"):
        opened(name, 2).encode(values_BC)


def test_dense_u8_is_for_logits_and_takes_a_step_where_it_means_something() -> None:
    with pytest.raises(SpecError, match="keeps logits only"):
        parse(TeacherSpec, {"model": "a:b", "fields": {"feature:x": {"encoding": "dense_u8"}}}, "test")
    with pytest.raises(SpecError, match="no meaning"):
        parse(FieldSpec, {"encoding": {"kind": "dense_u8", "mode": "row", "step": 0.5}}, "test")
    with pytest.raises(SpecError, match="step"):
        parse(FieldSpec, {"encoding": {"kind": "dense_u8", "step": 0}}, "test")


@pytest.mark.parametrize("name", ["dense_f32", "dense_f16"])
@given(values_BC=logits())
def test_the_best_class_stays_the_best(name: str, values_BC: Tensor) -> None:
    """The decoded distribution's largest class has the largest logit, up to the rounding that is declared."""
    best = round_trip(name, values_BC).log_probs().argmax(1)
    top = values_BC.gather(1, best[:, None])[:, 0]
    # Log-probabilities are float32 of a size near log C: their own last bit is allowed for.
    slack = values_BC.abs().amax(1) * 2.0**-10 + 2.0**-19
    assert bool((values_BC.amax(1) - top <= slack).all())


@pytest.mark.parametrize("name", ["top_1", "top_5", "top_all"])
@given(values_BC=logits())
def test_the_first_kept_class_is_the_likeliest(name: str, values_BC: Tensor) -> None:
    """No class left out is ever decoded above the best one (at most level with it, where rows are nearly flat)."""
    target = round_trip(name, values_BC)
    log_probs = target.log_probs()
    assert torch.equal(log_probs.gather(1, target.indices_BK[:, :1].long())[:, 0], log_probs.amax(1))


@pytest.mark.parametrize("name", ["top_1", "top_5", "top_all"])
@pytest.mark.parametrize("temperature", [1, 2, 4])
@given(values_BC=logits())
def test_sparse_and_full_forms_agree(name: str, temperature: int, values_BC: Tensor) -> None:
    """`log_probs_sparse` is `log_probs` gathered, and what is left out has one value, never above the kept."""
    target = round_trip(name, values_BC)
    kept_BK, rest = target.log_probs_sparse(temperature)
    each_B = rest.each_B
    full_BC = target.log_probs(temperature)
    ids = target.indices_BK.long()
    assert torch.equal(full_BC.gather(1, ids), kept_BK)
    left = torch.ones_like(full_BC, dtype=torch.bool).scatter(1, ids, False)
    assert torch.equal(full_BC[left], each_B.repeat_interleave(left.sum(1)))
    assert bool((each_B <= kept_BK[:, -1]).all())


@given(seed=SEEDS, classes=st.integers(1, 300))
def test_top_all_is_exact(seed: int, classes: int) -> None:
    """k = C keeps logits that half precision can hold without any error in the distribution."""
    generator = torch.Generator().manual_seed(seed)
    values_BC = torch.randint(-100, 100, (3, classes), generator=generator) * 2.0**-3
    target = round_trip("top_all", values_BC)
    for temperature in (1, 2, 4):
        error = target.log_probs(temperature).double() - softmax(values_BC, temperature)
        assert error.abs().max() < 2e-5
    raw = target.dense().values.double() - values_BC.double()
    assert bool((raw.abs() <= target.lse_B.double().abs()[:, None] * 2.0**-11 + 1e-4).all())


@given(seed=SEEDS, classes=st.integers(6, 300))
def test_top_k_keeps_the_probabilities_of_what_it_keeps(seed: int, classes: int) -> None:
    """At T = 1 the kept classes have the teacher's own probabilities: the tail is stored, not derived."""
    values_BC = 4 * torch.randn(4, classes, generator=torch.Generator().manual_seed(seed))
    target = round_trip("top_5", values_BC)
    kept_BK, rest = target.log_probs_sparse()
    each_B = rest.each_B
    exact_BK = softmax(values_BC, 1).gather(1, target.indices_BK.long())
    assert (kept_BK.double() - exact_BK).abs().max() < 0.03
    tail_B = (each_B.double() + math.log(classes - 5)).exp()
    exact_tail_B = 1 - exact_BK.exp().sum(1)
    assert (tail_B - exact_tail_B).abs().max() < 0.02


def test_a_confident_row_keeps_a_tiny_tail() -> None:
    """A tail of 1e-9 survives: from rounded probabilities it would be 0 or negative."""
    values_BC = torch.tensor([[30.0, 9.0, 8.0, 7.0]])
    each_B = round_trip("top_1", values_BC).log_probs_sparse()[1].each_B
    exact = torch.logsumexp(values_BC[:, 1:].double(), 1) - torch.logsumexp(values_BC.double(), 1)
    assert abs(float(each_B[0]) + math.log(3) - float(exact)) < 0.01


@pytest.mark.parametrize("name", ["dense_f16", "top_5"])
def test_overflow_of_half_precision_is_refused(name: str) -> None:
    """A finite logit that float16 cannot hold is refused, not stored as inf."""
    values_BC = torch.zeros(3, 5)
    values_BC[1, 2] = -1e9
    with pytest.raises(NonFiniteError, match="row 1"):
        opened(name, 5).encode(values_BC)
    assert torch.equal(round_trip("dense_f32", values_BC).values, values_BC)


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 256, 257, 1000, 65_537, 256_000, 2**25, 2**26, 2**32])
@given(data=st.data())
def test_packed_numbers_come_back(classes: int, data: st.DataObject) -> None:
    """Of any number of classes up to 2³², in ⌈count · bits ÷ 8⌉ bytes; the first number is in the lowest bits."""
    numbers = st.sampled_from([0, classes - 1]) | st.integers(0, classes - 1)
    indices_BK = torch.tensor(data.draw(st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=3)))
    packed_BN = pack(indices_BK, classes)
    bits = max(1, len(f"{classes - 1:b}"))
    assert packed_BN.shape == (len(indices_BK), -(-5 * bits // 8))
    assert packed_BN.dtype == torch.uint8
    for row, numbers_K in zip(packed_BN, indices_BK.tolist(), strict=True):
        by_hand = sum(number << place * bits for place, number in enumerate(numbers_K))
        assert int.from_bytes(row.numpy().tobytes(), "little") == by_hand
    assert torch.equal(unpack(packed_BN, 5, classes).long(), indices_BK)


def test_masked_classes_are_not_in_a_nucleus() -> None:
    """Rounding may keep the mass of all classes below 1: those without any, beyond half precision, stay out of it."""
    values_BC = torch.full((64, 40), -1e9)
    values_BC[:, :9] = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    columns = NucleusLogits(40, 1.0, 40).encode(values_BC)
    assert columns["count"].max() <= 9


def test_a_nucleus_that_holds_its_mass_exactly_is_complete() -> None:
    """Two equal classes hold a half each: one of them is the nucleus of a half, the first."""
    columns = NucleusLogits(2, 0.5, 2).encode(torch.zeros(1, 2))
    assert columns["count"].tolist() == [1]
    assert columns["indices"].tolist() == [[0, 255]]


def test_features_beyond_their_channel_are_kept_at_its_end() -> None:
    """Levels do not wrap: what lies below or above a channel's calibrated range is decoded to the range's end."""
    ranges = Ranges(0)
    ranges.see(torch.tensor([[0.0, -8.0], [4.0, 8.0]]))
    shared = Shared("ends", {name: torch.from_numpy(array) for name, array in ranges.constants().items()})
    for encoding in (U8ChannelFeatures((2,), shared), FeatureHeadLogits(3, 2, shared)):
        columns = encoding.encode(torch.tensor([[-1e9, 1e9], [1e9, -1e9]]))
        assert columns["values"].tolist() == [[0, 255], [255, 0]]
    # An eighth of the range is kept free at each end, except below a channel that is never negative.
    encoding = U8ChannelFeatures((2,), shared)
    target = encoding.decode(encoding.encode(torch.tensor([[-1e9, -1e9], [1e9, 1e9]])))
    torch.testing.assert_close(target.dense().values, torch.tensor([[0.0, -10.0], [4.5, 10.0]]))


def test_a_prior_that_has_never_seen_a_class_is_sound() -> None:
    """Masked while calibrating (−1e9, or no number at all) and not in this row: it shares what is left, without NaN."""
    values_BC = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.25]])
    for never in (-1e9, -math.inf):
        prior = Shared(f"{never}", {"prior": torch.tensor([-0.1, -2.4, -3.0, never, never])})
        for k, even in ((3, [3, 4]), (1, [3, 4])):
            encoding = TopKLogits(5, k, tail="prior", prior=prior)
            log_probs = encoding.decode(encoding.encode(values_BC)).log_probs()
            assert log_probs[0, even[0]] == log_probs[0, even[1]]
            assert float(log_probs.exp().sum()) == pytest.approx(1, abs=1e-6)
            kept = values_BC.log_softmax(1)[:, :k]
            torch.testing.assert_close(log_probs[:, :k], kept, rtol=0, atol=3e-3)


def test_levels_reach_sixty_four_nats() -> None:
    """Level 255 is 64 nats below the maximum; what is deeper is kept there, masked classes too."""
    depths = torch.tensor([[0.0, 64 / 255**2, 16.0, 64.0, 64.3, 1000.0, 1e9]])
    assert to_levels(depths).tolist() == [[0, 1, 128, 255, 255, 255, 255]]
    assert from_levels(to_levels(depths))[0, 3:].tolist() == [-64.0] * 4


def test_k_above_the_classes_is_refused() -> None:
    with pytest.raises(SpecError, match=r"at most 10.*found: 11"):
        open_encoding(TopK(kind="top_k", k=11), (10,), "logits")
    with pytest.raises(ValueError, match=r"1\.\.10"):
        TopKLogits(10, 0)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")],
)
def test_the_narrowest_type_holds_every_class(classes: int, dtype: str) -> None:
    assert narrowest(classes) == dtype


@given(seed=SEEDS, shape=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_dense_keeps_features_of_any_shape(seed: int, shape: list[int]) -> None:
    values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    encoding = open_encoding(SPECS["dense_f16"], tuple(shape), "feature:x")
    target = encoding.decode(encoding.encode(values))
    assert target.dense().values.shape == values.shape
    assert measure_feature(values, target)["squared_error"] < 1e-6 * values.square().sum()


class TestFidelity:
    """What the build reports of an encoding's error."""

    @ALL
    @given(values_BC=logits())
    def test_is_finite_and_never_negative(self, name: str, values_BC: Tensor) -> None:
        """KL ≥ 0 up to rounding, agreement at most the rows, and no NaN for any row."""
        found = measure_logits(values_BC, round_trip(name, values_BC))
        assert all(math.isfinite(value) for value in found.values()), found
        assert found["top1"] <= found["rows"] == len(values_BC)
        for temperature in (1, 2, 4):
            assert found[f"kl_t{temperature}"] >= -1e-4 * len(values_BC)

    def test_is_finite_where_the_tail_is_beyond_half_precision(self) -> None:
        """Masked classes (−1e9) left out by top-k have mass 0 on both sides: no error, and no NaN."""
        values_BC = torch.tensor([[1.0, 0.0, -1e9, -1e9]])
        encoding = open_encoding(TopK(kind="top_k", k=2), (4,), "logits")
        found = measure_logits(values_BC, encoding.decode(encoding.encode(values_BC)))
        assert found["kl_t1"] == pytest.approx(0, abs=1e-5)
        assert all(math.isfinite(value) for value in found.values())

    def test_measures_what_top_k_loses(self) -> None:
        """KL(teacher ‖ decoded) by its definition, on a case that can be done by hand."""
        values_BC = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        target = round_trip("top_1", values_BC)
        p = softmax(values_BC, 1).exp()[0]
        even = torch.log((1 - p[0]) / 3)
        by_hand = sum(float(p[c] * (p[c].log() - even)) for c in (1, 2, 3))
        assert measure_logits(values_BC, target)["kl_t1"] == pytest.approx(by_hand, abs=2e-3)

    def test_sums_become_means(self) -> None:
        shards = [
            {"rows": 1.0, "kl_t1": 0.5, "top1": 1.0, "mass_error": 0.1},
            {"rows": 3.0, "kl_t1": 0.3, "top1": 2.0, "mass_error": 0.05},
        ]
        found = total(shards)
        assert found == {"rows": 4.0, "kl_t1": 0.2, "top1": 0.75, "mass_error": 0.1}
        assert total([]) == {"rows": 0.0}
        feature = [{"rows": 2.0, "squared_error": 1.0, "squares": 4.0}]
        assert total(feature) == {"rows": 2.0, "relative_squared_error": 0.25}


def test_targets_move_together() -> None:
    """`to` moves every tensor of a target and keeps types."""
    levels = round_trip("dense_u8 by row", torch.tensor([[1.0, 0.0], [5.0, 3.0]])).to("cpu")
    assert levels.values.dtype == torch.uint8
    assert torch.equal(joined([levels, levels]).log_probs(3), torch.cat([levels.log_probs(3)] * 2))
    dense = DenseTarget(torch.zeros(2, 3, dtype=torch.float16)).to("cpu")
    assert dense.values.dtype == torch.float16
    assert len(dense) == 2
    sparse = round_trip("top_1", torch.zeros(2, 3)).to("cpu", non_blocking=True)
    assert isinstance(sparse, SparseTarget)
    assert (len(sparse), sparse.classes, sparse.values_BK.dtype) == (2, 3, torch.float16)
