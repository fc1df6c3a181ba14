"""The published record layouts that the benchmark compares with: their bytes, their decoding, and their known traps."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from distillkit_layout import DistillKit, packed, unpacked
from published_layouts import FKD, DatasetReinforcement, Layout, Megatron, TinyViT, published
from rate_distortion import Exact, Point, front, measure, ours, ratios

ROWS = 6


def rows(classes: int, scale: float = 2.0, count: int = ROWS) -> Tensor:
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(0))


def kl(layout: Layout, logits_BC: Tensor, temperature: int) -> float:
    decoded_BC = layout.log_probs(layout.encode(logits_BC), temperature)
    return float(Exact.at(logits_BC, temperature).kl(decoded_BC).mean())


@pytest.mark.parametrize(
    ("layout", "stored", "beside"),
    [
        (TinyViT(1000, 10), 40, 4),
        (TinyViT(1000, 100), 400, 4),
        (FKD(1000, 5), 20, 9),
        (FKD(1000, 5, "float32"), 40, 17),
        (DistillKit(1000, 10, 10), 20 + 13, 0),
        (DistillKit(128_000, 128, 16, (0, 1, 2, 3, 4, "sqrt")), 328, 0),
        (DistillKit(128_000, 50, 1, (0, 1, "sqrt")), 121, 0),
        (DistillKit(128_000, 128, 32, (0, 1, 2), "float32", delta=True), 412, 0),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else str(value),
)
def test_bytes_of_a_row(layout: Layout, stored: int, beside: int) -> None:
    record = layout.encode(rows(layout.classes))
    assert layout.stored_bytes(record) == stored * ROWS
    assert layout.beside == beside


def test_megatron_stores_17_bits_of_a_class_number_and_compresses_them() -> None:
    layout = Megatron(128_000, 128)
    logits_BC = rows(128_000)
    record = layout.encode(logits_BC)
    assert sum(column.nbytes for column in record.values()) == (2 * 128 + 2 * 128 + 16) * ROWS
    assert layout.stored_bytes(record) < 528 * ROWS
    assert torch.equal(layout.log_probs(record, 1).argmax(1), logits_BC.argmax(1))


def test_ml_dr_pickles_python_numbers() -> None:
    layout = DatasetReinforcement(1000, 10)
    stored = layout.stored_bytes(layout.encode(rows(1000, count=300)))
    assert 5 * 10 < stored / 300 < 12 * 10


@pytest.mark.parametrize("temperature", [1, 4])
@pytest.mark.parametrize(
    "layout",
    [TinyViT(10, 10), FKD(10, 10), FKD(10, 10, "float32"), Megatron(10, 10), DistillKit(10, 10, 10)],
    ids=lambda layout: layout.name,
)
def test_all_classes_kept_are_exact_up_to_rounding(layout: Layout, temperature: int) -> None:
    assert abs(kl(layout, rows(10), temperature)) < 2e-5


@pytest.mark.parametrize("classes", [10, 1000, 40_000])
def test_every_layout_teaches_one_unit_of_mass(classes: int) -> None:
    layouts = list(published(classes))
    assert len({layout.name for layout in layouts}) == len(layouts)
    for logits_BC in (rows(classes), rows(classes, 8.0)):
        for layout in layouts:
            record = layout.encode(logits_BC)
            for temperature in (1, 4):
                mass_B = layout.log_probs(record, temperature).exp().sum(1)
                assert torch.allclose(mass_B, torch.ones(ROWS).double()), layout.name


def test_layouts_whose_class_numbers_would_wrap_are_not_offered() -> None:
    systems = {layout.name.split()[0] for layout in published(128_000)}
    assert systems == {"Megatron", "DistillKit"}
    assert not any(isinstance(layout, FKD) for layout in published(4096))
    one = torch.zeros(1, 4096)
    one[0, 2049] = 9.0
    assert int(FKD(4096, 1).log_probs(FKD(4096, 1).encode(one), 1).argmax()) == 2048


def test_tinyvit_shares_less_than_nothing_where_float16_rounds_up() -> None:
    sure = torch.zeros(1, 10)
    sure[0, 3] = 12.0
    layout = TinyViT(10, 2)
    record = layout.encode(sure)
    assert float(record["values"].astype(np.float64).sum()) > 1
    assert int(layout.log_probs(record, 1).isinf().sum()) == 8
    assert kl(layout, sure, 1) == torch.inf


def test_ml_dr_flattens_a_row_whose_sum_exceeds_1() -> None:
    layout = DatasetReinforcement(100, 10)
    values = np.full((1, 10), 1e-4, np.float32)
    values[0, 0] = 0.9999
    record = {"values": values, "indices": np.arange(10)[None]}
    assert float(layout.log_probs(record, 1).exp().max()) == pytest.approx(0.23, abs=0.005)


def test_float16_probabilities_softened_again_lose_what_log_probabilities_keep() -> None:
    steep = torch.arange(10).float().mul(-1.8)[None]
    assert kl(TinyViT(10, 10), steep, 1) < 1e-6
    assert kl(TinyViT(10, 10), steep, 4) > 100 * kl(Megatron(10, 10), steep, 4)
    assert kl(TinyViT(10, 10), 2 * steep, 4) == torch.inf


def test_distillkit_softens_the_rest_as_one_class() -> None:
    flat = torch.zeros(1, 1000)
    flat[0, :5] = 5.0
    rest = {
        layout.name: float(layout.log_probs(layout.encode(flat), 4).exp()[0, 5:].sum())
        for layout in (Megatron(1000, 5), DistillKit(1000, 5, 5))
    }
    exact = float((flat[0].double() / 4).softmax(0)[5:].sum())
    assert rest["Megatron k=5"] == pytest.approx(exact, abs=1e-3)
    assert rest["DistillKit k=5 exact=5"] < 0.3 < exact


def test_distillkit_gives_the_rest_nothing_unless_told() -> None:
    assert kl(DistillKit(1000, 5, 5, missing="zero"), rows(1000), 1) == torch.inf


@pytest.mark.parametrize("delta", [False, True])
def test_distillkit_fits_a_curve_that_its_terms_can_say(delta: bool) -> None:
    places = torch.arange(64).float()
    logits_BC = (-0.03 * places - 5e-4 * places.square()).repeat(2, 1)
    layout = DistillKit(64, 64, 8, (0, 1, 2, "sqrt"), "float32", delta)
    assert abs(kl(layout, logits_BC, 1)) < 1e-8


@pytest.mark.parametrize("bits", [4, 10, 17])
def test_class_numbers_survive_packing(bits: int) -> None:
    numbers = np.random.Generator(np.random.Philox(0)).integers(0, 2**bits, (5, 7))
    stored = packed(numbers, bits)
    assert stored.shape == (5, -(-7 * bits // 8))
    assert np.array_equal(unpacked(stored, bits, 7), numbers)


def test_packing_is_highest_bit_first() -> None:
    assert packed(np.array([[1, 2, 3]]), 4).tolist() == [[0x12, 0x30]]


def test_ours_are_listed_once() -> None:
    listed = [spec.model_dump_json() for spec in ours(1000)]
    assert len(set(listed)) == len(listed)


def test_measuring_compares_by_bytes_and_loss() -> None:
    logits_BC = rows(40, 3.0)
    points = measure(logits_BC, calibration_BC=None)
    exact = next(point for point in points if point.name == "dense_f32")
    assert exact.kl == {1: 0.0, 4: 0.0}
    assert exact.bytes == 4 * 40
    assert exact.top1 == 1
    best = front([point for point in points if point.ours], 1)
    assert best[-1].floored[1] == 0
    assert all(a.bytes < b.bytes and a.floored[1] > b.floored[1] for a, b in itertools.pairwise(best))
    for row in ratios(points):
        for label in ("1", "4", "both"):
            assert row[label][2] == pytest.approx(row["bytes"] / row[label][1])


def test_an_infinite_loss_is_told_and_floored() -> None:
    logits_BC = rows(40)
    layout = DistillKit(40, 3, 3, missing="zero")
    point = Point("", False, 0)
    for temperature in (1, 4):
        point.add(layout.log_probs(layout.encode(logits_BC), temperature), Exact.at(logits_BC, temperature))
    found = point.mean(ROWS)
    assert found.kl[1] == torch.inf
    assert found.infinite == 1
    assert 0 < found.floored[1] < 20
