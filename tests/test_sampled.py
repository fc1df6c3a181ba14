"""Sampled targets: drawn by definition, seeded by address, for one temperature only; laws: `test_encoding_laws`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor
from toy_builds import ROWS, expected_logits, toy_spec, tree

import teacher_cache as tc
from student_train import KD, Objective, ViewStream
from teacher_cache.encodings import SampledLogits, Sequenced, SparseTarget, joined, open_encoding
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


def test_threshold_sampling_by_its_definition() -> None:
    """Σ min(1, p ⁄ τ) = k; the sure classes are always there with their own weight, the others weigh τ."""
    values_BC = torch.log(torch.tensor([[0.5, 0.2, 0.1, 0.08, 0.06, 0.04, 0.02]])).expand(500, -1)
    encoding = opened(7, 3, "threshold")
    columns = encoding.encode_drawn(values_BC, words_of(500, encoding))
    tau = float(columns["threshold"][0])
    p = values_BC[0].double().exp()
    assert float(p.div(tau).clamp(max=1).sum()) == pytest.approx(3, rel=1e-6)
    assert (columns["indices"][:, 0] == 0).all()
    # Stored are the classes' own probabilities; what they weigh is worked out with τ.
    own = np.exp(columns["values"].astype(float))
    assert own == pytest.approx(p.numpy()[columns["indices"].astype(int)], rel=1e-5)
    target = encoding.decode(columns)
    weights = target.log_probs(1.0).exp().gather(1, target.indices_BK.long())
    torch.testing.assert_close(weights[:, 0], torch.full((500,), 0.5))
    torch.testing.assert_close(weights[:, 1:], torch.full((500, 2), tau))
    shares = np.bincount(columns["indices"][:, 1:].ravel(), minlength=7)[1:] / 500
    assert np.abs(shares - (p[1:] / tau).numpy()).max() < 0.12


@given(seed=SEEDS, k=st.integers(1, 12), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_inclusion_is_min_1_p_over_tau(seed: int, k: int, temperature: float) -> None:
    """Of every stored class, with p worked out anew and τ such that the probabilities of all classes sum to k."""
    values_BC = 4 * torch.randn(3, 12, generator=torch.Generator().manual_seed(seed))
    encoding = opened(12, k, "threshold", temperature)
    columns = encoding.encode_drawn(values_BC, words_of(3, encoding))
    p_BC = torch.softmax(values_BC.double() / temperature, dim=1)
    ids_BK = torch.from_numpy(columns["indices"].astype(np.int64))
    threshold_B1 = torch.from_numpy(columns["threshold"]).double()[:, None]
    all_BC = (p_BC / threshold_B1).clamp(max=1)
    torch.testing.assert_close(all_BC.sum(1), torch.full((3,), float(k)).double(), rtol=1e-5, atol=0)
    found_BK = encoding.inclusion(columns)
    torch.testing.assert_close(found_BK.double(), all_BC.gather(1, ids_BK), rtol=1e-5, atol=1e-7)


@SCHEMES
def test_positions_of_a_sequence_draw_with_words_of_their_own(scheme: Scheme) -> None:
    """Position t draws with the t-th share of its row's words: equal positions are not drawn alike."""
    inner = opened(50, 6, scheme)
    encoding, values_BTC = Sequenced(inner, 3), torch.zeros(4, 3, 50)
    words_BW = view_words(key_digests(["a", "b", "c", "d"]), 0, 9, encoding.blocks, 3)
    columns = encoding.encode_drawn(values_BTC, words_BW)
    width = 4 * inner.blocks
    for place in range(3):
        alone = inner.encode_drawn(values_BTC[:, place], words_BW[:, place * width : (place + 1) * width])
        assert all((columns[part][:, place] == alone[part]).all() for part in columns)
    assert (columns["indices"][:, 0] != columns["indices"][:, 1]).any()


def test_inclusion_is_how_often_a_class_is_drawn() -> None:
    """20,000 draws: each class comes as often as it says, within six standard deviations (below 10⁻⁷ by chance)."""
    values_1C = torch.tensor([[3.0, 2.5, 1.0, 0.9, 0.0, -0.5, -1.0, -3.0]])
    encoding, count = opened(8, 3, "threshold"), 20_000
    columns = encoding.encode_drawn(values_1C.expand(count, -1), words_of(count, encoding))
    ids, said = columns["indices"].astype(int).ravel(), encoding.inclusion(columns).numpy().ravel()
    often = np.bincount(ids, minlength=8) / count
    for number in np.unique(ids):
        (chance,) = np.unique(said[ids == number])
        assert abs(often[number] - chance) <= 6 * math.sqrt(chance * (1 - chance) / count) + 1e-9
    with pytest.raises(TypeError, match="no threshold"):
        opened(8, 3, "replacement").inclusion(columns)


def test_a_sure_row_has_a_threshold_of_nothing() -> None:
    """All mass in one class leaves τ = 0: that class is kept with all of it, and those that fill up weigh nothing."""
    values_BC = torch.full((2, 6), -2000.0)
    values_BC[:, 4] = 5.0
    encoding = opened(6, 3, "threshold")
    columns = encoding.encode_drawn(values_BC, words_of(2, encoding))
    assert columns["threshold"].tolist() == [0.0, 0.0]
    assert (columns["indices"][:, 0] == 4).all()
    probs_BC = encoding.decode(columns).log_probs(1.0).exp()
    assert torch.equal(probs_BC, torch.nn.functional.one_hot(torch.tensor([4, 4]), 6).float())
    assert encoding.inclusion(columns)[:, 0].tolist() == [1.0, 1.0]


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
    encoding = cache.manifest.first.encodings["logits"]
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
