"""The stream joins views and cached rows by identity, and can stop and go on anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_builds import ROWS, expected_logits, numpy_source

import teacher_cache as tc
from student_train import Batch, CachedRows, ViewStream
from student_train.data import LabelledRows, only
from teacher_cache.errors import MismatchError, SpecError, ViewMismatch
from teacher_cache.spec import NumpySource, ViewSpec, parse


def same(a: Batch, b: Batch) -> bool:
    place = (a.epoch, a.step) == (b.epoch, b.step) and np.array_equal(a.rows_B, b.rows_B)
    place = place and np.array_equal(a.view_B, b.view_B)
    pixels = torch.equal(a.views_BCHW, b.views_BCHW)
    return place and pixels and torch.equal(a.targets["logits"].values, b.targets["logits"].values)


def batches(stream: ViewStream, epochs: int) -> list[Batch]:
    return [batch for _ in range(epochs) for batch in stream]


def test_views_labels_and_targets_belong_together(built: Path) -> None:
    """The toy teacher's answer can be computed from the very pixels that the student sees."""
    cache = tc.open(built)
    for batch in batches(ViewStream(cache, batch_size=5, seed=3, check_views=5), 2):
        np.testing.assert_array_equal(batch.targets["logits"].values, expected_logits(batch.views_BCHW))
        assert cache.labels is not None
        np.testing.assert_array_equal(batch.labels_B, cache.labels[batch.rows_B])


def test_an_epoch_has_every_row_once_and_the_next_has_the_next_view(built: Path) -> None:
    stream = ViewStream(tc.open(built), batch_size=4)
    first, second, third = (list(stream) for _ in range(3))
    for epoch in (first, second, third):
        assert sorted(np.concatenate([batch.rows_B for batch in epoch])) == list(range(ROWS))
        assert len(epoch) == len(stream) == 7
    assert [epoch[0].view_B[0] for epoch in (first, second, third)] == [0, 1, 0]
    assert first[0].rows_B.tolist() != third[0].rows_B.tolist()


def test_drop_last_leaves_out_the_ragged_batch(built: Path) -> None:
    stream = ViewStream(tc.open(built), batch_size=4, drop_last=True)
    assert [len(batch) for batch in stream] == [4] * 6 == [4] * len(stream)


@pytest.mark.parametrize("built", ["zarr"], indirect=True)
@settings(max_examples=20)
@given(stop=st.integers(0, 20), seed=st.integers(0, 5))
def test_going_on_gives_the_batches_that_are_left(built: Path, stop: int, seed: int) -> None:
    cache = tc.open(built)
    whole = batches(ViewStream(cache, batch_size=4, seed=seed), 3)
    stream = ViewStream(cache, batch_size=4, seed=seed)
    seen: list[Batch] = []
    while len(seen) < stop:
        for batch in stream:
            seen.append(batch)
            if len(seen) == stop:
                break
    resumed = ViewStream(cache, batch_size=4, seed=seed)
    resumed.load_state_dict(stream.state_dict())
    rest: list[Batch] = []
    while resumed.epoch < 3:
        rest.extend(resumed)
    assert len(rest) == len(whole) - stop
    assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))


@pytest.mark.parametrize("built", ["zarr"], indirect=True)
def test_workers_change_nothing(built: Path) -> None:
    """In an order that draws, too: a worker has nothing but the epoch and the step to go by."""
    cache = tc.open(built)
    alone = batches(ViewStream(cache, batch_size=4, seed=1, view_order="random"), 2)
    helped = batches(ViewStream(cache, batch_size=4, seed=1, view_order="random", workers=2), 2)
    assert len(alone) == len(helped)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_a_state_of_another_order_is_refused(built: Path) -> None:
    cache = tc.open(built)
    state = ViewStream(cache, batch_size=4, seed=1).state_dict()
    with pytest.raises(MismatchError, match=r"stream\.seed"):
        ViewStream(cache, batch_size=4, seed=2).load_state_dict(state)
    with pytest.raises(MismatchError, match=r"stream\.batch_size"):
        ViewStream(cache, batch_size=5, seed=1).load_state_dict(state)


def test_another_view_than_the_teachers_is_refused(built: Path, tmp_path: Path, arrays: Path) -> None:
    """One pixel of one image changes after the build: its bytes are compared whenever they are read."""
    moved = shutil.copytree(arrays, tmp_path / "moved")
    images = np.load(moved / "images.npy")
    images[13, 4, 4] ^= 1
    np.save(moved / "images.npy", images)
    source = parse(NumpySource, numpy_source(moved), "test")
    with pytest.raises(MismatchError, match="images/13"):
        batches(ViewStream(tc.open(built, source), batch_size=4), 1)


def test_pixels_that_differ_are_found_by_digest(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a change of library: same bytes, same parameters, other pixels."""
    from teacher_cache.views.recipe import Recipe

    render = Recipe.render

    def brighter(self: Recipe, *arguments: Any) -> Any:
        views, mixed = render(self, *arguments)
        return torch.stack(list(views)) + 3, mixed

    monkeypatch.setattr(Recipe, "render", brighter)
    message = r"8 reference views 512 of 512 values \(100.00%\) differ, by at most 3 of 255.*same parameters"
    with pytest.raises(ViewMismatch, match=message):
        batches(ViewStream(tc.open(built), batch_size=4, check_views=1), 1)
    assert len(batches(ViewStream(tc.open(built), batch_size=4, check_views=0), 1)) == 7


def test_fields_that_are_not_there_are_refused_with_a_list(built: Path, arrays: Path) -> None:
    with pytest.raises(MismatchError, match=r"feature:nope.*feature:stem, logits"):
        ViewStream(tc.open(built), batch_size=4, fields=("feature:nope",))
    rows = LabelledRows(parse(NumpySource, numpy_source(arrays), "test"), ViewSpec(recipe=()))
    with pytest.raises(MismatchError, match="cannot be read without a cache"):
        ViewStream(rows, batch_size=4, fields=("logits",))


def test_batch_size_must_fit(built: Path) -> None:
    with pytest.raises(SpecError, match="batch_size"):
        ViewStream(tc.open(built), batch_size=ROWS + 1, drop_last=True)
    with pytest.raises(SpecError, match="batch_size"):
        ViewStream(tc.open(built), batch_size=0)


def test_labelled_rows_render_a_fresh_view_in_every_epoch(arrays: Path) -> None:
    views = ViewSpec(recipe=({"pad_crop": {"size": 8, "padding": 2}},))
    rows = LabelledRows(parse(NumpySource, numpy_source(arrays), "test"), views)
    stream = ViewStream(rows, batch_size=ROWS, fields=(), shuffle=False)
    first, second = [*stream, *stream]
    assert (set(first.view_B), set(second.view_B)) == ({0}, {1})
    assert not torch.equal(first.views_BCHW, second.views_BCHW)
    assert first.rows_B.tolist() == second.rows_B.tolist() == list(range(ROWS))


def test_a_state_of_other_data_is_refused(built: Path) -> None:
    """As many rows are not the same rows, nor as many views the same views."""
    cache = tc.open(built)
    state = ViewStream(cache, batch_size=4).state_dict()
    with pytest.raises(MismatchError, match=r"stream\.data"):
        ViewStream(CachedRows(cache, first_views=1), batch_size=4).load_state_dict(state)
    one, other = (only(CachedRows(cache), np.arange(20) + first) for first in (0, 3))
    with pytest.raises(MismatchError, match=r"stream\.data"):
        ViewStream(other, batch_size=4).load_state_dict(ViewStream(one, batch_size=4).state_dict())


def test_after_an_epochs_last_batch_the_next_one_begins(built: Path) -> None:
    stream = ViewStream(tc.open(built), batch_size=4)
    states = [stream.state_dict() for _ in stream]
    resumed = ViewStream(tc.open(built), batch_size=4)
    resumed.load_state_dict(states[-1])
    assert (resumed.epoch, resumed.step, len(list(resumed))) == (1, 0, 7)
    with pytest.raises(MismatchError, match=r"stream\.step"):
        resumed.load_state_dict({**states[-1], "step": 99})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"view_order": "cyle"}, "epoch, cycle, random"), ({"fields": "logits"}, "sequence"), ({"seed": 2**32}, "seed")],
)
def test_arguments_that_mean_nothing_are_refused(wrong: dict[str, Any], said: str, built: Path) -> None:
    with pytest.raises(SpecError, match=said):
        ViewStream(tc.open(built), batch_size=4, **wrong)
