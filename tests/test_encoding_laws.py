"""The laws of encodings: one suite over every encoding, of rows and of sequences."""

from __future__ import annotations

import math
import pickle
from typing import Any, get_args

import numpy as np
import pytest
import torch
from encoding_laws import (
    ALL,
    LENGTH,
    LOGITS,
    SAMPLED,
    SEQUENCES,
    SPARSE,
    SPECS,
    encode,
    exact_logits,
    kept_of,
    log_softmax,
    meant,
    opened,
    positions,
    rounding,
    rows_for,
    temperatures_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, hard_logits, logits
from torch import Tensor

from teacher_cache.encodings import (
    DenseTarget,
    DenseU4Logits,
    DenseU8Logits,
    Encoding,
    FeatureHeadLogits,
    NucleusLogits,
    Sequenced,
    SparseTarget,
    Target,
    TopKLogits,
    U8ChannelFeatures,
    joined,
    row_bytes,
)
from teacher_cache.encodings.base import stored_bytes
from teacher_cache.errors import NonFiniteError
from teacher_cache.spec import AnyEncoding, Tail, TopK

FEW = settings(max_examples=8)
NAMES = pytest.mark.parametrize("name", ALL)


def encoded(name: str, values_BC: Tensor) -> tuple[Encoding, Tensor, dict[str, Any]]:
    """An encoding, its rows, and their parts; rows that half precision cannot hold are scaled down."""
    values = rows_for(name, values_BC)
    try:
        encoding = opened(name, values)
        return encoding, values, encode(encoding, values)
    except NonFiniteError:
        values = values * (30_000 / values.abs().max())
    encoding = opened(name, values)
    return encoding, values, encode(encoding, values)


def in_columns(name: str, target: Target) -> Tensor:
    """All stored rows of a target by what a student compares with: [N, C] log-probabilities, or the features."""
    if "u8_channel" in name:
        values = target.dense().values
        return values.flatten(0, -2)
    return target.flat().log_probs(2.0 if "all" in name and "sampled" in name else 1.0)


@NAMES
@FEW
@given(values_BC=hard_logits())
def test_parts_are_as_declared(name: str, values_BC: Tensor) -> None:
    """Names, types, shapes and bytes of a row; the same values give the same bytes; the input stays as it was."""
    encoding, values, first = encoded(name, values_BC)
    before, second = values.clone(), encode(encoding, values)
    assert set(first) == {part.name for part in encoding.parts}
    for part in encoding.parts:
        assert first[part.name].dtype == part.dtype
        assert first[part.name].shape == (len(values), *part.shape)
        assert first[part.name].tobytes() == second[part.name].tobytes()
    assert sum(column.nbytes for column in first.values()) == len(values) * row_bytes(encoding)
    assert torch.equal(values, before)
    filled = (
        sum(stored["values"].nbytes + stored["indices"].nbytes for _, stored in positions(encoding, first))
        if ("nucleus" in name)
        else 0
    )
    fixed = sum(part.row_bytes for part in encoding.parts if not part.ragged)
    assert stored_bytes(encoding, first) == fixed + math.ceil(filled / len(values))
    for part in encoding.parts:
        if part.ragged:
            empty = np.arange(part.shape[0]) >= first["count"][:, None]
            beyond = first[part.name][empty]
            assert (np.isnan(beyond) if math.isnan(part.fill) else beyond == part.fill).all()


@NAMES
@FEW
@given(values_BC=hard_logits())
def test_a_row_does_not_depend_on_its_batch(name: str, values_BC: Tensor) -> None:
    """Encoding rows one by one gives the bytes of encoding them together, and decoding what decoding them does."""
    encoding, values, together = encoded(name, values_BC)
    whole = in_columns(name, encoding.decode(together))
    each = len(whole) // len(values)
    for row in range(len(values)):
        alone = encode(encoding, values[row : row + 1], first=row)
        for part, column in alone.items():
            assert column.tobytes() == together[part][row : row + 1].tobytes()
        apart = in_columns(name, encoding.decode(alone))
        expected = whole[row * each : (row + 1) * each]
        torch.testing.assert_close(apart, expected, rtol=1e-6, atol=rounding(name, values))


@NAMES
@FEW
@given(values_BC=hard_logits())
def test_decoding_is_what_the_format_says(name: str, values_BC: Tensor) -> None:
    """At every temperature: the log-probabilities of the stored numbers, worked out in float64 row by row."""
    encoding, values, columns = encoded(name, values_BC)
    target = encoding.decode(columns)
    logits_NC = np.stack([meant(*position) for position in positions(encoding, columns)])
    near = rounding(name, values)
    if "u8_channel" in name:
        decoded = target.dense().values.flatten(0, -2).double()
        torch.testing.assert_close(decoded, torch.from_numpy(logits_NC), rtol=1e-5, atol=near)
        return
    for temperature in temperatures_of(encoding):
        decoded_NC = target.flat().log_probs(temperature)
        assert decoded_NC.dtype == torch.float32
        expected_NC = torch.from_numpy(log_softmax(logits_NC / temperature))
        torch.testing.assert_close(decoded_NC.double(), expected_NC, rtol=1e-5, atol=2 * near)


def allowed_depths(values: str, depths: Any) -> Any:
    """The declared error of kept values, by how far below the maximum they are."""
    if values == "u8":
        within = 4 / 255 * (2 * np.sqrt(depths) + 4 / 255)
        return np.where(depths <= 64, within, depths - 64 + 1e-9) + 1e-5
    return depths * 2.0**-11 + 2.0**-25


@pytest.mark.parametrize("name", SPARSE)
@FEW
@given(values_BC=hard_logits())
def test_sparse_encodings_keep_the_largest_within_the_declared_error(name: str, values_BC: Tensor) -> None:
    """Ids unique, in range, by falling logit and rising class; depths, tail mass and log-sum-exp as declared."""
    encoding, values, columns = encoded(name, values_BC)
    for exact, (inner, stored) in zip(
        values.flatten(0, -2).double().numpy(), positions(encoding, columns), strict=True
    ):
        assert isinstance(inner, TopKLogits | NucleusLogits)
        depths, ids = kept_of(inner, stored)
        down = np.argsort(-exact, kind="stable")
        assert ids == down[: len(ids)].tolist()
        below = exact.max() - exact[down]
        # float32 itself tells logits of this size no better apart.
        error, near = np.abs(depths + below[: len(ids)]), np.abs(exact).max() * 2.0**-23
        assert (error <= allowed_depths(inner.values, below[: len(ids)]) + near).all()
        tail = np.logaddexp.reduce(-below[len(ids) :]) if len(ids) < len(exact) else -np.inf
        stored_tail = float(stored["tail_logmass"])
        assert stored_tail == pytest.approx(tail, rel=2**-10, abs=2**-20 + near) or tail < -65_500 > stored_tail
        lse = np.logaddexp.reduce(-below) + exact.max()
        assert float(stored["lse"]) == pytest.approx(lse, rel=2**-10, abs=2**-20)


@pytest.mark.parametrize("name", [name for name in ALL if name not in {*SPARSE, *SAMPLED}])
@FEW
@given(values_BC=hard_logits())
def test_dense_encodings_keep_every_value_within_the_declared_error(name: str, values_BC: Tensor) -> None:
    """By number: relative for floating types, half a step for levels, and what that comes to behind a head."""
    encoding, values, columns = encoded(name, values_BC)
    exact_NC = exact_logits(encoding, values)
    decoded_NC = encoding.decode(columns).dense().values.flatten(0, -2).double().numpy()
    top_N1 = np.abs(exact_NC).max(axis=1, keepdims=True)
    near = rounding(name, values) if name.startswith(("feature_head", "u8_channel")) else 0.0
    assert (np.abs(decoded_NC - exact_NC) <= allowed_values(name, encoding, exact_NC) + top_N1 * 2.0**-22 + near).all()


def allowed_values(name: str, encoding: Encoding, exact_NC: Any) -> Any:
    """The declared error of each value of dense encodings, for rows within the calibrated ranges."""
    inner = encoding.inner if isinstance(encoding, Sequenced) else encoding
    if isinstance(inner, U8ChannelFeatures | FeatureHeadLogits):
        assert inner.shared is not None
        common = {key: tensor.double().numpy() for key, tensor in inner.shared.tensors.items()}
        half = common["step"] / 2
        return np.abs(common["weight"]) @ half if "weight" in common else half
    if isinstance(inner, DenseU8Logits | DenseU4Logits):
        top_N1 = exact_NC.max(axis=1, keepdims=True)
        below_NC = top_N1 - exact_NC
        range_N1 = below_NC.max(axis=1, keepdims=True)
        step: Any = getattr(inner, "step", None) or range_N1 / 255
        if isinstance(inner, DenseU4Logits):
            # A step is rounded up to half precision.
            step = np.maximum(range_N1 / 15 * (1 + 2.0**-9), 2.0**-14)
        beyond_NC = np.maximum(below_NC - 255 * step, 0)
        # The maximum itself is kept in half precision.
        return step / 2 + beyond_NC + np.abs(top_N1) * 2.0**-11 + 2.0**-24
    kinds = {"dense_f32": (0.0, 0.0), "dense_f16": (2.0**-11, 2.0**-25), "dense_bf16": (2.0**-8, 2.0**-133)}
    relative, least = kinds[inner.name]
    return np.abs(exact_NC) * relative + least


FITS = {
    "dense_f16": lambda row: row,
    "dense_u": lambda row: np.array([row.max()]),
    "top_1 f16": lambda row: np.array([np.logaddexp.reduce(row)]),
    "top_all f16": lambda row: np.append(row - row.max(), np.logaddexp.reduce(row)),
    "top_all u8": lambda row: np.array([np.logaddexp.reduce(row)]),
    "nucleus": lambda row: np.array([np.logaddexp.reduce(row)]),
}
"""What of a row must not overflow half precision, of those that keep any of it."""


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(tuple(FITS))])
@settings(max_examples=15)
@given(seed=SEEDS, classes=st.integers(1, 4), spread=st.sampled_from([0.0, 30.0]))
def test_rows_are_refused_where_half_precision_overflows(name: str, seed: int, classes: int, spread: float) -> None:
    """Rows around ±65,504: kept where every number fits, and otherwise refused, naming the first that does not."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 3, (3, classes), generator=generator) - 1
    values = rows_for(name, signs * (65_504 + spread * torch.rand(3, classes, generator=generator)))
    encoding = opened(name, values)
    must_fit = next(rule for prefix, rule in FITS.items() if name.startswith(prefix))
    with np.errstate(over="ignore"):
        fits = [
            all(np.isfinite(must_fit(row.double().numpy()).astype(np.float16)).all() for row in rows)
            for rows in values.reshape(3, -1, classes)
        ]
    if all(fits):
        assert (np.isfinite(encode(encoding, values).get("lse", np.zeros(1)))).all()
        return
    with pytest.raises(NonFiniteError) as caught:
        encode(encoding, values)
    assert caught.value.field == f"row {fits.index(False)}"


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("nucleus")])
@FEW
@given(values_BC=hard_logits())
def test_a_nucleus_is_the_smallest_set_that_holds_its_mass(name: str, values_BC: Tensor) -> None:
    """With one class less it would hold less than `mass`; it holds `mass`, unless that takes more than `cap`."""
    encoding, values, columns = encoded(name, values_BC)
    for exact, (inner, stored) in zip(
        values.flatten(0, -2).double().numpy(), positions(encoding, columns), strict=True
    ):
        assert isinstance(inner, NucleusLogits)
        count, p = len(stored["values"]), np.exp(log_softmax(np.sort(exact)[::-1]))
        assert 1 <= count <= inner.cap
        assert count == 1 or p[: count - 1].sum() < inner.mass + 1e-12
        assert count == inner.cap or p[:count].sum() >= inner.mass - 1e-12
        # A class without any mass adds none.
        assert p[count - 1] > 0


@pytest.mark.parametrize("name", LOGITS)
@FEW
@given(values_BC=hard_logits())
def test_mass_is_at_most_one(name: str, values_BC: Tensor) -> None:
    """A decoded distribution sums to one at every temperature, never to more than 1 + 1e-6, and has no NaN."""
    encoding, values, columns = encoded(name, values_BC)
    target = encoding.decode(columns)
    for temperature in temperatures_of(encoding):
        log_probs = target.log_probs(temperature)
        assert log_probs.shape == (*values.shape[:-1], exact_logits(encoding, values).shape[1])
        assert not bool(log_probs.isnan().any())
        mass = log_probs.double().exp().sum(-1)
        assert bool((mass <= 1 + 1e-6).all()), mass.max()
        assert bool((mass >= 1 - 1e-5).all()), mass.min()


@NAMES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@settings(max_examples=3)
@given(values_BC=logits(), data=st.data())
def test_not_finite_is_refused_by_row(name: str, bad: float, values_BC: Tensor, data: st.DataObject) -> None:
    """NaN and inf never enter a cache; the message names the first such row, of sequences whatever the position."""
    encoding, values, _ = encoded(name, values_BC)
    rows = sorted(data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1)))
    for row in rows:
        flat = values[row].flatten()
        flat[data.draw(st.integers(0, len(flat) - 1))] = bad
        values[row] = flat.reshape(values[row].shape)
    with pytest.raises(NonFiniteError) as caught:
        encode(encoding, values)
    assert caught.value.field == f"row {rows[0]}"


NO_SHIFT = {
    "dense_u": ("values", "step"),
    "top": ("values", "indices", "tail_logmass"),
    "nucleus": ("values", "indices", "count", "lengths", "tail_logmass"),
}


@pytest.mark.parametrize("name", [name for name in LOGITS if name.startswith(tuple(NO_SHIFT))])
@FEW
@given(seed=SEEDS, classes=st.integers(1, 60), shift=st.integers(-60, 60))
def test_a_shift_of_all_logits_changes_nothing_else(name: str, seed: int, classes: int, shift: int) -> None:
    """Adding a constant to a row changes its maximum and its log-sum-exp by that, and no other byte."""
    generator = torch.Generator().manual_seed(seed)
    values = rows_for(name, torch.randint(-400, 400, (3, classes), generator=generator) * 2.0**-5)
    encoding = opened(name, values)
    here, there = encode(encoding, values), encode(encoding, values + shift)
    kept = next(parts for prefix, parts in NO_SHIFT.items() if name.startswith(prefix))
    for part in set(here) - {"maximum", "lse"}:
        assert part in kept
        assert here[part].tobytes() == there[part].tobytes()
    for part in {"maximum", "lse"} & set(here):
        assert np.abs(there[part].astype(float) - here[part] - shift).max() <= 0.07


@pytest.mark.parametrize("name", SAMPLED)
@FEW
@given(seed=SEEDS, shift=st.integers(-40, 40))
def test_a_shift_draws_the_same_classes(name: str, seed: int, shift: int) -> None:
    values = rows_for(name, torch.randint(-300, 300, (3, 50), generator=torch.Generator().manual_seed(seed)) * 2.0**-5)
    encoding = opened(name, values)
    here, there = encode(encoding, values), encode(encoding, values + shift)
    assert (here["indices"] == there["indices"]).all()
    assert np.abs(here["values"] - there["values"]).max() < 1e-5


@pytest.mark.parametrize("name", SAMPLED)
@FEW
@given(values_BC=hard_logits())
def test_samples_hold_k_classes_whose_weights_sum_to_one(name: str, values_BC: Tensor) -> None:
    """Ids unique and in range; the weights, max(p, τ), need no normalising: their sum is 1 in every draw."""
    encoding, values, columns = encoded(name, values_BC)
    for _, stored in positions(encoding, columns):
        ids = stored["indices"].astype(int)
        assert len(set(ids.tolist())) == len(ids)
        assert ids.max() < values.shape[-1]
        weights = np.maximum(np.exp(stored["values"].astype(float)), float(stored.get("threshold", 0)))
        assert abs(weights.sum() - 1) < 1e-5
        assert np.isfinite(stored["values"]).all()


@pytest.mark.parametrize("name", SAMPLED)
def test_the_expectation_of_a_sample_is_the_teachers_distribution(name: str) -> None:
    """Unbiased: z-scores of the mean of 20,000 draws, class by class (and position by position).

    False alarms: |z| > 6 by chance has a probability of 2·10⁻⁹ for each of at most 36 means, below 10⁻⁷ in all; the
    addresses are fixed, so that a pass stays one.
    """
    row_1C = torch.tensor([[6.0, 5.5, 3.0, 2.9, 1.0, 0.0, 0.0, -1.0, -2.0, -3.0, -3.5, -8.0]])
    values, count = rows_for(name, row_1C), 20_000
    encoding = opened(name, values)
    (temperature,) = temperatures_of(encoding)
    many = values.expand(count, *values.shape[1:])
    weights = encoding.decode(encode(encoding, many)).log_probs(temperature).double().exp()
    p = torch.softmax(values[0].double() / temperature, dim=-1)
    # A class that was drawn seldom or never has no spread of its own: weights of at most 1 / k bound it.
    floor = (p / 4 / count).sqrt()
    error = torch.maximum(weights.std(dim=0) / count**0.5, floor)
    z = (weights.mean(0) - p).abs() / error
    assert bool((z < 6).all()), z


@pytest.mark.parametrize("name", [name for name in LOGITS if name in SEQUENCES])
@FEW
@given(values_BC=hard_logits())
def test_sequences_are_their_positions_as_rows(name: str, values_BC: Tensor) -> None:
    """Encoding [B, T, C] decodes to what encoding its B · T positions as rows does."""
    encoding, values, columns = encoded(name, values_BC)
    target = encoding.decode(columns)
    temperature = temperatures_of(encoding)[0]
    together = target.log_probs(temperature)
    assert together.shape[:2] == (len(values_BC), LENGTH)
    torch.testing.assert_close(target.flat().log_probs(temperature), together.flatten(0, 1), rtol=0, atol=0)
    if name in SAMPLED:
        return
    # The same constants for both: those of the sequences.
    rows = (
        encoding.inner if isinstance(encoding, Sequenced) else opened(name.removesuffix(" of sequences"), values[:, 0])
    )
    apart = rows.decode(rows.encode(values.flatten(0, 1)))
    torch.testing.assert_close(
        apart.log_probs(temperature), together.flatten(0, 1), rtol=1e-6, atol=rounding(name, values)
    )


def same(here: Target, there: Target) -> None:
    """Two targets hold the same numbers in the same types."""
    assert type(here) is type(there)
    if isinstance(here, SparseTarget) and isinstance(there, SparseTarget):
        first, second = here.arrays(), there.arrays()
        assert first.keys() == second.keys()
        for name, array in first.items():
            assert array.dtype == second[name].dtype
            torch.testing.assert_close(array.cpu(), second[name].cpu(), rtol=0, atol=0, equal_nan=True)
    else:
        assert isinstance(here, DenseTarget)
        assert isinstance(there, DenseTarget)
        assert torch.equal(here.values.cpu(), there.values.cpu())


@NAMES
def test_decoding_takes_tensors_and_stays_small(name: str) -> None:
    """Tensors as columns decode as arrays do; `to`, `joined` and pickling keep every number and type."""
    values = rows_for(name, 3 * torch.randn(4, 40, generator=torch.Generator().manual_seed(1)))
    encoding = opened(name, values)
    columns = encode(encoding, values)
    target = encoding.decode(columns)
    same(encoding.decode({part: torch.from_numpy(column.copy()) for part, column in columns.items()}), target)
    same(pickle.loads(pickle.dumps(encoding)).decode(columns), target)
    same(target.to("cpu", non_blocking=True), target)
    first, last = (
        encoding.decode({part: column[rows] for part, column in columns.items()}) for rows in (slice(0, 1), slice(1, 4))
    )
    same(joined([first, last]), target)
    assert len(target) == 4
    if isinstance(target, SparseTarget):
        assert target.values_BK.dtype == torch.from_numpy(columns["values"]).dtype
        assert target.indices_BK.dtype == torch.uint8
    else:
        assert target.values.element_size() == columns["values"].itemsize


@pytest.mark.parametrize("name", LOGITS)
def test_autocast_does_not_touch_a_target(name: str) -> None:
    """A loss is often worked out within autocast: the teacher's distribution is the same there, bit by bit."""
    values = rows_for(name, 3 * torch.randn(4, 40, generator=torch.Generator().manual_seed(1)))
    encoding = opened(name, values)
    target, temperature = encoding.decode(encode(encoding, values)), temperatures_of(encoding)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = target.log_probs(temperature)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, target.log_probs(temperature))


@NAMES
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decoding_on_a_gpu_is_decoding(name: str) -> None:
    """Columns on the device decode there, and so does a target that is moved: to what the CPU has."""
    values = rows_for(name, 3 * torch.randn(4, 300, generator=torch.Generator().manual_seed(1)))
    encoding = opened(name, values)
    columns = encode(encoding, values)
    target = encoding.decode(columns)
    there = encoding.decode({part: torch.from_numpy(column).cuda() for part, column in columns.items()})
    same(there, target)
    for moved in (there, target.to("cuda"), joined([target.to("cuda")])):
        torch.testing.assert_close(in_columns(name, moved).cpu(), in_columns(name, target), rtol=1e-4, atol=1e-4)


@NAMES
def test_no_rows_are_encoded_to_no_rows(name: str) -> None:
    values = rows_for(name, torch.randn(2, 12, generator=torch.Generator().manual_seed(0)))
    encoding = opened(name, values)
    columns = encode(encoding, values[:0])
    for part in encoding.parts:
        assert columns[part.name].shape == (0, *part.shape)
    assert len(encoding.decode(columns)) == 0
    assert len(in_columns(name, encoding.decode(columns))) == 0


@pytest.mark.parametrize("name", [*SPARSE, *SAMPLED])
@pytest.mark.parametrize("classes", [1, 2, 256, 257, 65_536, 65_537])
def test_the_last_class_survives(name: str, classes: int) -> None:
    """Numbers are not masked or wrapped where their type or their bits are full."""
    if classes > 257 and name.startswith(("top_all", "nucleus 1 f16", "sampled all")):
        pytest.skip("keeps every class: as many numbers as any other test")
    row_1C = torch.zeros(1, classes)
    row_1C[0, -1] = 20
    values = rows_for(name, row_1C) if "sequences" not in name else row_1C[:, None].expand(1, LENGTH, classes)
    encoding = opened(name, values)
    log_probs = encoding.decode(encode(encoding, values)).log_probs(temperatures_of(encoding)[0])
    assert (log_probs.argmax(-1) == classes - 1).all()


@pytest.mark.parametrize("name", ["top_5 u8 packed uniform", "top_5 f16 packed ghost", "nucleus 0.99 u8"])
def test_a_quarter_of_a_million_classes(name: str) -> None:
    """256,000 classes take eighteen bits; every kept class is the one that was meant."""
    values_BC = torch.randn(2, 256_000, generator=torch.Generator().manual_seed(0))
    wanted_BK = torch.tensor([[255_999, 131_072, 65_536, 65_535, 0], [200_000, 131_071, 1, 255_998, 196_608]])
    values_BC.scatter_(1, wanted_BK, torch.tensor([[30.0, 29, 28, 27, 26]]).expand(2, -1))
    encoding = opened(name, values_BC)
    columns = encode(encoding, values_BC)
    if "packed" in name:
        assert columns["indices"].shape == (2, -(-5 * 18 // 8))
    target = encoding.decode(columns)
    assert isinstance(target, SparseTarget)
    assert target.indices_BK.dtype == torch.uint32
    kept = min(5, int(columns.get("count", np.array(5)).min()))
    assert torch.equal(target.indices_BK[:, :kept].long(), wanted_BK[:, :kept])
    mass = target.log_probs(4.0).double().exp().sum(1)
    assert bool(((mass - 1).abs() < 1e-5).all())


def test_every_encoding_is_here() -> None:
    """An encoding that the configuration knows has a row in this suite, and so has each of its choices."""
    assert {type(spec) for spec in SPECS.values()} == set(get_args(AnyEncoding))
    top = [spec for spec in SPECS.values() if isinstance(spec, TopK)]
    assert {spec.tail for spec in top} == set(get_args(Tail))
    assert {(spec.values, spec.ids) for spec in top} == {(v, i) for v in ("f16", "u8") for i in ("whole", "packed")}
