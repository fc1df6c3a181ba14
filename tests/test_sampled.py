"""Sampled targets: unbiased, of mass one, seeded by address, and for one temperature only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, logits
from torch import Tensor
from toy_builds import ROWS, expected_logits, toy_spec, tree

import teacher_cache as tc
from student_train import KD, Objective, ViewStream
from teacher_cache.encodings import SampledLogits, SparseTarget, joined, open_encoding, row_bytes
from teacher_cache.errors import MismatchError, NonFiniteError, SpecError
from teacher_cache.fingerprint import key_digests
from teacher_cache.report import write_report
from teacher_cache.spec import FieldSpec, SampledK, TeacherSpec, parse
from teacher_cache.views.philox import view_words

SCHEMES = pytest.mark.parametrize("scheme", ["threshold", "replacement"])
Scheme = Any


def opened(classes: int, k: int, scheme: Scheme, temperature: float = 1.0) -> SampledLogits:
    return SampledLogits(classes, min(k, classes), temperature, scheme)


def words_of(rows: int, encoding: SampledLogits, view: int = 0) -> Any:
    return view_words(key_digests([str(row) for row in range(rows)]), view, 9, encoding.blocks, 3)


def drawn(encoding: SampledLogits, values_BC: Tensor, view: int = 0) -> SparseTarget:
    return encoding.decode(encoding.encode_drawn(values_BC, words_of(len(values_BC), encoding, view)))


@SCHEMES
@given(values_BC=logits(), k=st.integers(1, 40), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_every_row_has_k_classes_and_mass_one(scheme: Scheme, values_BC: Tensor, k: int, temperature: float) -> None:
    """Ids are unique and in range, bytes are as declared, the input stays as it was, no NaN anywhere."""
    encoding, before = opened(values_BC.shape[1], k, scheme, temperature), values_BC.clone()
    words = words_of(len(values_BC), encoding)
    columns = encoding.encode_drawn(values_BC, words)
    assert set(columns) == {part.name for part in encoding.parts}
    for part in encoding.parts:
        assert columns[part.name].dtype == part.dtype
        assert columns[part.name].shape == (len(values_BC), *part.shape)
        assert np.isfinite(columns[part.name].astype(float)).all()
    assert sum(column.nbytes for column in columns.values()) == len(values_BC) * row_bytes(encoding)
    ids = columns["indices"].astype(int)
    assert all(len(set(row)) == encoding.k for row in ids.tolist())
    assert ids.max() < values_BC.shape[1]
    mass = encoding.decode(columns).log_probs(temperature).double().exp().sum(1)
    assert bool(((mass - 1).abs() <= 1e-6).all())
    # The stored weights themselves sum to one: normalising on reading changes nothing but the last bits.
    assert np.abs(np.exp(columns["values"].astype(float)).sum(1) - 1).max() < 1e-5
    assert torch.equal(values_BC, before)


@SCHEMES
@given(values_BC=logits(), k=st.integers(1, 20))
def test_a_row_does_not_depend_on_its_batch(scheme: Scheme, values_BC: Tensor, k: int) -> None:
    encoding = opened(values_BC.shape[1], k, scheme)
    words = words_of(len(values_BC), encoding)
    together = encoding.encode_drawn(values_BC, words)
    for row in range(len(values_BC)):
        alone = encoding.encode_drawn(values_BC[row : row + 1], words[row : row + 1])
        assert all(alone[part].tobytes() == together[part][row : row + 1].tobytes() for part in together)


@SCHEMES
@given(seed=SEEDS, shift=st.integers(-40, 40))
def test_a_shift_of_all_logits_changes_nothing(scheme: Scheme, seed: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values_BC = torch.randint(-300, 300, (3, 50), generator=generator) * 2.0**-5
    encoding = opened(50, 8, scheme)
    here, there = (encoding.encode_drawn(values_BC + by, words_of(3, encoding)) for by in (0, shift))
    assert (here["indices"] == there["indices"]).all()
    assert np.abs(here["values"] - there["values"]).max() < 1e-5


@SCHEMES
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_expectation_is_the_teachers_distribution(scheme: Scheme, temperature: float) -> None:
    """z-scores of the mean of 20,000 draws, each class: above 6 by chance less than once in 10⁷ (fixed addresses)."""
    values_1C = torch.tensor([[6.0, 5.5, 3.0, 2.9, 1.0, 0.0, 0.0, -1.0, -2.0, -3.0, -3.5, -8.0]])
    encoding, count = opened(12, 4, scheme, temperature), 20_000
    p_C = torch.softmax(values_1C.double() / temperature, dim=1)[0]
    target = drawn(encoding, values_1C.expand(count, -1))
    weights_BC = target.log_probs(temperature).double().exp()
    error_C = weights_BC.std(dim=0).clamp(min=1e-9) / count**0.5
    # A class that was drawn seldom or never has no spread of its own: weights of at most 1 / k bound it.
    floor_C = (p_C / encoding.k / count).sqrt()
    z_C = (weights_BC.mean(0) - p_C).abs() / torch.maximum(error_C, floor_C)
    assert bool((z_C < 6).all()), z_C


def test_threshold_sampling_by_its_definition() -> None:
    """Σ min(1, p ⁄ τ) = k; the sure classes are always there with their own weight, the others weigh τ."""
    values_BC = torch.log(torch.tensor([[0.5, 0.2, 0.1, 0.08, 0.06, 0.04, 0.02]])).expand(500, -1)
    encoding = opened(7, 3, "threshold")
    columns = encoding.encode_drawn(values_BC, words_of(500, encoding))
    tau = float(columns["threshold"][0])
    p = values_BC[0].double().exp()
    assert float(p.div(tau).clamp(max=1).sum()) == pytest.approx(3, rel=1e-6)
    assert (columns["indices"][:, 0] == 0).all()
    weights = np.exp(columns["values"].astype(float))
    assert weights[:, 0] == pytest.approx(0.5, rel=1e-6)
    assert weights[:, 1:] == pytest.approx(tau, rel=1e-6)
    shares = np.bincount(columns["indices"][:, 1:].ravel(), minlength=7)[1:] / 500
    assert np.abs(shares - (p[1:] / tau).numpy()).max() < 0.12


def test_it_has_less_noise_than_drawing_with_replacement() -> None:
    """At equal ids, the reason to prefer it: the mean squared error of the weights."""
    values_BC = (3 * torch.randn(1, 200, generator=torch.Generator().manual_seed(1))).expand(4000, -1)
    p_C = torch.softmax(values_BC[0].double(), dim=0)
    ours, baseline = (
        float((drawn(opened(200, 12, scheme), values_BC).log_probs(1.0).double().exp() - p_C).square().sum(1).mean())
        for scheme in ("threshold", "replacement")
    )
    assert ours < baseline / 1.5


@SCHEMES
def test_all_classes_are_the_distribution_itself(scheme: Scheme) -> None:
    """k = C leaves nothing to chance without replacement; rows of equal logits and masked classes are sound."""
    values_BC = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -1e9, -1e9, -1e9], [3.0, 1.0, 0.0, -2.0]])
    target = drawn(opened(4, 4, scheme), values_BC)
    if scheme == "threshold":
        torch.testing.assert_close(target.log_probs(1.0).exp(), values_BC.softmax(1))
    assert float(target.log_probs(1.0)[1, 0]) == 0


@SCHEMES
def test_another_temperature_is_refused(scheme: Scheme) -> None:
    target = drawn(opened(5, 2, scheme, 2.0), torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    assert target.log_probs(2.0).shape == (3, 5)
    for refused in (lambda: target.log_probs(1.0), lambda: target.log_probs_sparse(4.0)):
        with pytest.raises(MismatchError, match="must be 2, at which the sample was drawn"):
            refused()
    with pytest.raises(MismatchError, match="sampled_k"):
        target.dense()
    for moved in (target.to("cpu"), joined([target, target])):
        with pytest.raises(MismatchError, match="temperature"):
            moved.log_probs(1.0)


def test_refusals() -> None:
    encoding = opened(5, 2, "threshold")
    values_BC = torch.zeros(3, 5)
    values_BC[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="row 1"):
        encoding.encode_drawn(values_BC, words_of(3, encoding))
    with pytest.raises(TypeError, match="encode_drawn"):
        encoding.encode(values_BC)
    with pytest.raises(SpecError, match="at most 5"):
        open_encoding(SampledK(kind="sampled_k", k=6), (5,), "logits")
    with pytest.raises(ValueError, match="1\\.\\.5"):
        SampledLogits(5, 0, 1.0, "threshold")
    with pytest.raises(SpecError, match="temperature"):
        parse(FieldSpec, {"encoding": {"kind": "sampled_k", "k": 3, "temperature": 0}}, "test")
    with pytest.raises(SpecError, match="keeps logits only"):
        parse(TeacherSpec, {"model": "a:b", "fields": {"feature:x": {"encoding": {"kind": "sampled_k", "k": 1}}}}, "t")


@SCHEMES
@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_cache_of_samples(scheme: Scheme, store: str, arrays: Path, tmp_path: Path) -> None:
    """Built twice alike, verified, drawn anew in every view, read by the loss, shown in the report."""
    fields = {"logits": {"encoding": {"kind": "sampled_k", "k": 3, "temperature": 2.0, "scheme": scheme}}}
    changes = {
        "teacher__fields": fields,
        "store": {"kind": store},
        "views": {"recipe": ["horizontal_flip"], "count": 2},
    }
    report = tc.build(toy_spec(tmp_path / "cache", arrays, **changes), executor="serial")
    tc.build(toy_spec(tmp_path / "again", arrays, **changes), executor="serial")
    assert tree(tmp_path / "cache") == tree(tmp_path / "again")
    assert 0 < report.fidelity["logits"]["total_variation"] < 1
    assert report.fidelity["logits"]["mass_error"] < 1e-5
    assert tc.verify(tmp_path / "cache", recompute=20, views=20).ok
    cache = tc.open(tmp_path / "cache")
    # As FORMAT.md has it: the words of the row's own address, in its own view.
    encoding = cache.manifest.encodings["logits"]
    assert isinstance(encoding, SampledLogits)
    for view in range(2):
        exact = torch.from_numpy(expected_logits(cache.render(view, range(ROWS))))
        words = view_words(key_digests(cache.samples.keys), view, 2**16 - 3, encoding.blocks, cache.recipe.seed)
        again = encoding.encode_drawn(exact, words)
        assert all((again[part] == stored).all() for part, stored in cache.columns("logits", view, range(ROWS)).items())
    batch = next(iter(ViewStream(cache, batch_size=9)))
    student = torch.zeros((9, 10), requires_grad=True)
    loss, _ = Objective([KD(temperature=2.0)])(student, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    q_minus_p = torch.full((9, 10), 0.1) - batch.targets["logits"].log_probs(2.0).exp()
    torch.testing.assert_close(student.grad, 2.0 * q_minus_p / 9)
    with pytest.raises(MismatchError, match="temperature"):
        Objective([KD(temperature=4.0)])(student, batch)
    write_report(tmp_path / "cache", tmp_path / "report.html")
    with pytest.raises(SpecError, match="no meaning for sampled_k"):
        tc.build(toy_spec(tmp_path / "other", arrays, fidelity={"max_kl": 1.0}, **changes), executor="serial")
