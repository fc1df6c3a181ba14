"""The joined rows under somebody else's loader: any sampler, any order, any workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler
from toy_builds import ROWS, expected_logits, numpy_source

import teacher_cache as tc
from student_train import Batch, OwnViews, ViewDataset, ViewStream
from student_train.data import LabelledRows
from student_train.transfer import one_ahead
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.spec import NumpySource, ViewSpec, parse


def belongs_together(batch: Batch, cache: tc.Cache) -> bool:
    assert cache.labels is not None
    right = np.array_equal(batch.targets["logits"].dense().values, expected_logits(batch.views_BCHW))
    return right and np.array_equal(batch.labels_B, cache.labels[batch.rows_B])


ZARR = pytest.mark.parametrize("built", ["zarr"], indirect=True)
"""Where the store has no part in it."""


@ZARR
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_ones_own(built: Path, workers: int) -> None:
    """Workers that live through both epochs see the second one's view."""
    cache = tc.open(built)
    data = ViewDataset(cache, check_views=5)
    loader = DataLoader(
        data,
        batch_size=5,
        shuffle=True,
        collate_fn=ViewDataset.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator().manual_seed(0),
    )
    orders = []
    for epoch in range(2):
        data.set_epoch(epoch)
        seen = list(loader)
        assert all(belongs_together(batch, cache) for batch in seen)
        assert {int(view) for batch in seen for view in batch.view_B} == {epoch}
        orders.append([int(row) for batch in seen for row in batch.rows_B])
        assert sorted(orders[-1]) == list(range(ROWS))
    assert orders[0] != orders[1]


def test_a_row_may_come_twice(built: Path) -> None:
    cache = tc.open(built)
    data = ViewDataset(cache, view_order="cycle")
    sampler = WeightedRandomSampler([1.0, *[0.01] * (len(data) - 1)], 40, generator=torch.Generator().manual_seed(1))
    seen = list(DataLoader(data, batch_size=8, sampler=sampler, collate_fn=ViewDataset.collate))
    assert all(belongs_together(batch, cache) for batch in seen)
    assert sum(int((batch.rows_B == 0).sum()) for batch in seen) > 20


def test_one_index_is_a_batch_of_one_row(built: Path) -> None:
    data = ViewDataset(tc.open(built))
    batch = data[3]
    assert (len(batch), batch.rows_B.tolist(), len(data)) == (1, [3], ROWS)


def test_what_does_not_fit_is_refused(built: Path, arrays: Path) -> None:
    own = OwnViews(tc.open(built), ViewSpec(recipe=({"pad_crop": {"size": 8, "padding": 2}},)))
    with pytest.raises(SpecError, match="check_views"):
        ViewDataset(own, check_views=2)
    with pytest.raises(SpecError, match="view_order"):
        ViewDataset(own, view_order="random")
    rows = LabelledRows(parse(NumpySource, numpy_source(arrays), "test"), ViewSpec(recipe=()))
    with pytest.raises(MismatchError, match="logits"):
        ViewDataset(rows)
    assert len(next(iter(DataLoader(ViewDataset(rows, fields=()), batch_size=4, collate_fn=ViewDataset.collate)))) == 4


def test_a_state_is_of_the_batch_in_hand_and_not_of_the_one_ahead(built: Path) -> None:
    stream = ViewStream(tc.open(built), batch_size=4)
    places = [(batch.step, stream.state_dict()["step"]) for batch in stream.on("cpu")]
    assert places == [(step, step + 1) for step in range(7)]
    assert stream.state_dict()["epoch"] == 1


def test_a_device_gets_all_of_a_batch(built: Path) -> None:
    """`meta` stands for a device that there is on every machine."""
    stream = ViewStream(tc.open(built), batch_size=4, fields=("logits", "feature:stem"))
    for batch in one_ahead(stream, torch.device("meta")):
        assert batch.labels_B is not None
        tensors = [batch.views_BCHW, batch.labels_B, *(target.dense().values for target in batch.targets.values())]
        assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches(built: Path) -> None:
    ours = list(ViewStream(tc.open(built), batch_size=4))
    stream = ViewStream(tc.open(built), batch_size=4, pin_memory=True)
    for there, here in zip(stream.on("cuda"), ours, strict=True):
        assert there.views_BCHW.is_cuda
        assert torch.equal(there.views_BCHW.cpu(), here.views_BCHW)
        assert torch.equal(there.targets["logits"].dense().values.cpu(), here.targets["logits"].dense().values)


@ZARR
def test_what_a_batch_cost_is_told(built: Path) -> None:
    for batch in ViewStream(tc.open(built), batch_size=4):
        assert batch.spent is not None
        assert min(batch.spent.decode, batch.spent.view, batch.spent.target) > 0


@ZARR
@pytest.mark.parametrize("wrong", [{"seed": 2**32}, {"seed": -1}, {"check_views": -1}, {"view_order": "cyle"}])
def test_arguments_that_mean_nothing_are_refused(wrong: dict[str, Any], built: Path) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        ViewDataset(tc.open(built), **wrong)


def test_what_is_no_row_number_is_refused(built: Path) -> None:
    data = ViewDataset(tc.open(built))
    for wrong in (1.7, [True, False][0:1] * 0, "1"):
        with pytest.raises((TypeError, SpecError)):
            data.__getitems__([wrong] if not isinstance(wrong, list) else wrong)
    assert data[np.int64(3)].rows_B.tolist() == data[torch.tensor(3)].rows_B.tolist() == [3]
    with pytest.raises(SpecError, match="whole batch"):
        ViewDataset.collate([data[0], data[1]])


@ZARR
def test_what_forked_workers_draw_with_is_loaded_before_them(built: Path) -> None:
    program = (
        "import sys, teacher_cache as tc, student_train as st\n"
        f"cache = tc.open({str(built)!r})\n"
        "print('torchvision' in sys.modules, st.ViewDataset(cache) and 'torchvision' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert answer.stdout.split() == ["False", "True"]
