"""Which view a row shows next: each once in K showings, the same for any workers, processes and neighbours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_stream import batches, same
from toy_builds import ROWS, expected_logits, numpy_source, toy_spec

import teacher_cache as tc
from student_train import OwnViews, ViewStream
from student_train.stream import Share
from student_train.view_order import ViewOrder, numbers
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.fingerprint import key_digests
from teacher_cache.spec import ViewSpec

ORDERS: tuple[ViewOrder, ...] = get_args(ViewOrder)
DIGESTS = key_digests([f"sample/{number}" for number in range(2000)])


@pytest.fixture(scope="module")
def four(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of four views."""
    path = tmp_path_factory.mktemp("four") / "cache"
    views = {"recipe": [{"pad_crop": {"size": 8, "padding": 2}}, "horizontal_flip"], "count": 4, "seed": 1}
    tc.build(toy_spec(path, arrays, views=views), executor="serial")
    return path


@given(order=st.sampled_from(ORDERS), views=st.integers(1, 12), turn=st.integers(0, 3), seed=st.integers(0, 2**32 - 1))
def test_k_showings_have_every_view_once(order: ViewOrder, views: int, turn: int, seed: int) -> None:
    rounds = [numbers(order, turn * views + place, DIGESTS[:50], views, seed) for place in range(views)]
    assert (np.sort(np.stack(rounds), axis=0) == np.arange(views)[:, None]).all()


@given(order=st.sampled_from(ORDERS), showing=st.integers(0, 20), seed=st.integers(0, 100), data=st.data())
def test_a_row_does_not_look_at_its_neighbours(order: ViewOrder, showing: int, seed: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, 1999), min_size=1, max_size=20)))
    whole = numbers(order, showing, DIGESTS, 5, seed)
    assert numbers(order, showing, DIGESTS[places], 5, seed).tolist() == whole[places].tolist()


@pytest.mark.parametrize("order", ["cycle", "random"])
def test_every_view_is_as_often_as_another(order: ViewOrder) -> None:
    """2,000 rows, 5 views: 400 each, with a standard deviation of 18."""
    for showing in range(10):
        counted = Counter(numbers(order, showing, DIGESTS, 5, 3).tolist())
        assert all(abs(counted[view] - 400) < 90 for view in range(5))


def test_cycles_follow_the_views_order_and_random_ones_do_not() -> None:
    cycle = np.stack([numbers("cycle", showing, DIGESTS, 5, 0) for showing in range(10)])
    assert (np.diff(cycle, axis=0) % 5 == 1).all()
    drawn = np.stack([numbers("random", showing, DIGESTS, 5, 0) for showing in range(10)])
    assert len({tuple(order) for order in drawn[:5].T}) == 120, "all orders of five views occur"
    assert (drawn[:5] != drawn[5:]).any(axis=0).mean() > 0.95, "another order in the next round"


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
class TestStreams:
    def stream(self, cache: Path, order: ViewOrder, together: int, **more: Any) -> ViewStream:
        return ViewStream(
            tc.open(cache), batch_size=8, view_order=order, views_per_decode=together, seed=4, check_views=8, **more
        )

    def test_everything_belongs_together(self, four: Path, order: ViewOrder, together: int) -> None:
        cache, shown = tc.open(four), []
        for batch in batches(self.stream(four, order, together), 4 // together):
            np.testing.assert_array_equal(batch.targets["logits"].dense().values, expected_logits(batch.views_BCHW))
            assert cache.labels is not None
            np.testing.assert_array_equal(batch.labels_B, cache.labels[batch.rows_B])
            shown += list(zip(batch.rows_B.tolist(), batch.view_B.tolist(), strict=True))
            assert order == "epoch" or together == 2 or len(set(batch.view_B.tolist())) > 1 or len(batch) < 8
        assert sorted(shown) == [(row, view) for row in range(ROWS) for view in range(4)]

    def test_going_on_gives_the_batches_that_are_left(self, four: Path, order: ViewOrder, together: int) -> None:
        whole = batches(self.stream(four, order, together), 2)
        stopped = self.stream(four, order, together)
        for _ in zip(range(2), stopped, strict=False):
            pass
        resumed = self.stream(four, order, together)
        resumed.load_state_dict(stopped.state_dict())
        rest = [*resumed, *resumed]
        assert all(same(a, b) for a, b in zip(rest, whole[len(whole) - len(rest) :], strict=True))
        assert len(rest) < len(whole)

    def test_processes_share_the_same_batches(self, four: Path, order: ViewOrder, together: int) -> None:
        """Of 1, 2 and 4 processes, each batch has the same rows and views; a run goes on with another number."""
        alone = batches(self.stream(four, order, together, drop_last=True), 2)
        for world in (2, 4 // together):
            parts = [self.stream(four, order, together, drop_last=True, share=Share(r, world)) for r in range(world)]
            of_ranks = [batches(part, 1) for part in parts]
            state = parts[0].state_dict()
            assert all(part.state_dict() == state for part in parts)
            later = self.stream(four, order, together, drop_last=True)
            later.load_state_dict(state)
            assert all(same(a, b) for a, b in zip(list(later), alone[len(later) :], strict=True))
            for step, expected in enumerate(alone[: len(later)]):
                pairs = [
                    pair
                    for rank in of_ranks
                    for pair in zip(rank[step].rows_B.tolist(), rank[step].view_B.tolist(), strict=True)
                ]
                assert len({len(rank[step]) for rank in of_ranks}) == 1
                assert sorted(pairs) == sorted(zip(expected.rows_B.tolist(), expected.view_B.tolist(), strict=True))


def test_a_state_of_another_view_order_is_refused(four: Path) -> None:
    cache = tc.open(four)
    state = ViewStream(cache, batch_size=8, view_order="cycle").state_dict()
    with pytest.raises(MismatchError, match=r"stream\.view_order"):
        ViewStream(cache, batch_size=8).load_state_dict(state)
    older = ViewStream(cache, batch_size=8).state_dict()
    del older["view_order"]
    ViewStream(cache, batch_size=8).load_state_dict(older)
    with pytest.raises(MismatchError, match=r"stream\.view_order: must be epoch"):
        ViewStream(cache, batch_size=8, view_order="random").load_state_dict(older)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"share": Share(0, 2)}, "drop_last"),
        ({"share": Share(2, 2), "drop_last": True}, r"rank in 0\.\.of−1"),
        ({"share": Share(0, 3), "drop_last": True}, "must be a multiple of 3, 1 views"),
        ({"share": Share(0, 4), "drop_last": True, "views_per_decode": 4}, "must be a multiple of 16, 4 views"),
    ],
)
def test_shares_that_do_not_fit_are_refused(more: dict[str, Any], said: str, four: Path) -> None:
    with pytest.raises(SpecError, match=said):
        ViewStream(tc.open(four), batch_size=8, **more)


def test_views_without_end_have_no_order(four: Path) -> None:
    own = OwnViews(tc.open(four), ViewSpec(recipe=({"pad_crop": {"size": 8, "padding": 2}},)))
    with pytest.raises(SpecError, match="view_order"):
        ViewStream(own, batch_size=8, view_order="cycle")


def test_a_source_without_randomness_shows_its_one_view(arrays: Path) -> None:
    from student_train.data import LabelledRows
    from teacher_cache.spec import NumpySource, parse

    rows = LabelledRows(parse(NumpySource, numpy_source(arrays), "test"), ViewSpec(recipe=()))
    stream = ViewStream(rows, batch_size=9, fields=(), view_order="random")
    assert {int(view) for batch in batches(stream, 2) for view in batch.view_B} == {0}
