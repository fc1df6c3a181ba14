"""What a stream shows: several views of one decoding, the student's own size, its own views, and the four schemes."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream import batches, same
from toy_builds import ROWS, expected_logits, numpy_source, toy_spec, tree

import teacher_cache as tc
from student_train import CachedRows, OwnViews, ViewStream
from student_train.opening import open_data
from student_train.recipes import CompareSpec, DataSpec, FitSpec
from student_train.run import train_one
from student_train.train import FitResult
from teacher_cache import left
from teacher_cache.encodings import DenseTarget, SparseTarget, joined
from teacher_cache.errors import MismatchError, SpecError, ViewMismatch
from teacher_cache.sources.base import Item
from teacher_cache.sources.numpy_arrays import NumpyArrays
from teacher_cache.spec import ViewSpec, load_spec, parse, read_yaml
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.views import open_recipe

MANY = {"recipe": [{"pad_crop": {"size": 8, "padding": 2}}, "horizontal_flip"], "count": 6, "seed": 11}


@pytest.fixture(scope="module")
def many(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of six views of each sample, built with four views of each decoding."""
    path = tmp_path_factory.mktemp("many") / "cache"
    tc.build(toy_spec(path, arrays, views=MANY, compute__views_per_decode=4), executor="serial")
    return path


class TestSeveralViewsOfOneDecoding:
    @pytest.mark.parametrize(
        ("together", "executor"),
        [(1, "serial"), (3, "serial"), (6, "serial"), pytest.param(3, "ray", marks=pytest.mark.slow)],
    )
    def test_building_gives_the_same_bytes(
        self, many: Path, arrays: Path, tmp_path: Path, together: int, executor: Any
    ) -> None:
        spec = toy_spec(tmp_path / "cache", arrays, views=MANY, compute__views_per_decode=together)
        tc.build(spec, executor=executor)
        assert tree(tmp_path / "cache") == tree(many)

    @pytest.mark.parametrize(
        ("told", "bytes_held", "expected"), [(6, 2**30, 6), (4, 2**30, 4), (9, 2**30, 6), (6, 1500, 3), (6, 1, 1)]
    )
    def test_how_many_views_go_together(
        self,
        many: Path,
        monkeypatch: pytest.MonkeyPatch,
        told: int,
        bytes_held: int,
        expected: int,
    ) -> None:
        """As told, but no more than there are, nor than a worker's memory or the other workers' idleness allow."""
        manifest = tc.open(many).manifest.first
        held = 8 * sum(part.row_bytes for group in manifest.groups(0) for part in group.parts)
        assert held == 496
        monkeypatch.setattr(left, "_MOST_HELD", bytes_held)
        assert left.views_together(manifest, told, workers=1) == expected
        assert left.views_together(manifest, told, workers=3) <= min(expected, 3)

    def test_building_decodes_once(self, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """27 rows × 6 views in groups of 3 are 54 decodings, besides the few of planning."""
        seen: list[int] = []
        item = NumpyArrays.item

        def counted(self: NumpyArrays, index: int) -> Item:
            seen.append(index)
            return item(self, index)

        monkeypatch.setattr(NumpyArrays, "item", counted)
        spec = toy_spec(tmp_path / "cache", arrays, views=MANY, compute__views_per_decode=3)
        tc.build(spec, executor="serial")
        planning = len(seen) - 2 * ROWS
        assert 0 < planning <= 40

    @pytest.mark.parametrize(
        ("device", "threads", "expected"), [("cuda", None, "cuda"), ("cpu", None, None), ("cuda", 8, None)]
    )
    def test_views_are_made_where_the_teacher_is(
        self, arrays: Path, tmp_path: Path, device: str, threads: int | None, expected: str | None
    ) -> None:
        """On its GPU if it runs here; a remote teacher's device is not ours."""
        from teacher_cache.begin import begin, prepare
        from teacher_cache.plan import open_parts
        from teacher_cache.shard_job import open_job

        class Elsewhere:
            """All that `open_job` asks of a teacher."""

        opened = open_parts(toy_spec(tmp_path / "cache", arrays))
        root = LocalRoot(tmp_path / "cache")
        manifest = begin(root, prepare(root, opened))
        teacher: Any = Elsewhere()
        teacher.device, teacher.threads = device, threads
        how = open_job(root, manifest, dataclasses.replace(opened, teacher=teacher)).how
        assert (how.device.type if how.device else None, how.batched) == (expected, True)

    def test_a_build_killed_between_two_commits_goes_on(self, many: Path, arrays: Path, tmp_path: Path) -> None:
        """One of four views of a shard is committed: only the three others are made."""
        spec = toy_spec(tmp_path / "cache", arrays, views=MANY, compute__views_per_decode=4)

        def stop(done: int, _total: int, _built: int) -> None:
            if done >= 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tc.build(spec, "serial", stop)
        for view in (0, 2):
            (tmp_path / f"cache/receipts/v{view:04}/s000000.json").unlink()
        report = tc.build(spec, "serial")
        assert report.shards_built == 6 * 4 - 2
        assert tree(tmp_path / "cache") == tree(many)

    def test_a_shard_that_was_committed_meanwhile_is_not_made_again(self, arrays: Path, tmp_path: Path) -> None:
        """A worker that died after one commit of two: the retry returns the receipt that is there."""
        from teacher_cache.begin import begin, prepare
        from teacher_cache.plan import open_parts
        from teacher_cache.shard_job import Work, open_job, run_work

        spec = toy_spec(tmp_path / "cache", arrays, views=MANY)
        opened = open_parts(spec)
        root = LocalRoot(tmp_path / "cache")
        job = open_job(root, begin(root, prepare(root, opened)), opened)
        (first,) = run_work(job, Work((1,), 0))
        before = (tmp_path / "cache/data/views/v0001/digest/c/0").stat().st_mtime_ns
        again, other = run_work(job, Work((1, 2), 0))
        assert (again.to_bytes(), other.view) == (first.to_bytes(), 2)
        assert (tmp_path / "cache/data/views/v0001/digest/c/0").stat().st_mtime_ns == before

    @settings(max_examples=8)
    @given(together=st.sampled_from([1, 2, 3, 6]), size=st.integers(1, 4), seed=st.integers(0, 3))
    def test_training(self, many: Path, together: int, size: int, seed: int) -> None:
        """Each batch has k views of its rows, joined with their own answers; each pass has every row k times."""
        cache = tc.open(many)
        stream = ViewStream(
            cache, batch_size=size * together, views_per_decode=together, seed=seed, check_views=size * together
        )
        shown = []
        for batch in batches(stream, 6 // together):
            np.testing.assert_array_equal(batch.targets["logits"].dense().values, expected_logits(batch.views_BCHW))
            assert cache.labels is not None
            np.testing.assert_array_equal(batch.labels_B, cache.labels[batch.rows_B])
            assert len(batch) <= size * together
            shown += list(zip(batch.rows_B.tolist(), batch.view_B.tolist(), strict=True))
        assert sorted(shown) == [(row, view) for row in range(ROWS) for view in range(6)]

    def test_training_decodes_once(self, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = tc.open(many)
        seen: list[int] = []
        item = type(cache.source).item

        def counted(self: Any, index: int) -> Item:
            seen.append(index)
            return item(self, index)

        monkeypatch.setattr(type(cache.source), "item", counted)
        list(ViewStream(cache, batch_size=9, views_per_decode=3))
        assert sorted(seen) == list(range(ROWS))

    def test_workers_and_resuming_change_nothing(self, many: Path) -> None:
        cache = tc.open(many)

        def stream(**more: Any) -> ViewStream:
            return ViewStream(cache, batch_size=8, views_per_decode=2, seed=1, **more)

        state = torch.get_rng_state()
        whole = batches(stream(), 2)
        helped = batches(stream(workers=1), 2)
        assert all(same(a, b) for a, b in zip(whole, helped, strict=True))
        assert torch.equal(torch.get_rng_state(), state), "dropout draws from it"
        stopped = stream()
        for _ in zip(range(3), stopped, strict=False):
            pass
        resumed = stream()
        resumed.load_state_dict(stopped.state_dict())
        rest = [*resumed, *resumed]
        assert all(same(a, b) for a, b in zip(rest, whole[3:], strict=True))

    def test_what_does_not_fit_is_refused(self, many: Path) -> None:
        cache = tc.open(many)
        with pytest.raises(SpecError, match="views_per_decode: must be at least 1, at most 6"):
            ViewStream(cache, batch_size=7, views_per_decode=7)
        with pytest.raises(SpecError, match=r"batch_size: must be a multiple of views_per_decode \(4\)"):
            ViewStream(cache, batch_size=6, views_per_decode=4)

    def test_a_sample_of_every_batch_is_checked(self, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Unshuffled batches are the same in every epoch: the checked places move on, until all have been seen."""
        seen: set[tuple[int, int]] = set()
        check = CachedRows._check

        def spy(self: CachedRows, view: int, decoded: Any, rendered: Any, places: Any) -> None:
            seen.update((int(row), view) for row in decoded.rows[places])
            check(self, view, decoded, rendered, places)

        monkeypatch.setattr(CachedRows, "_check", spy)
        stream = ViewStream(tc.open(many), batch_size=9, shuffle=False)
        batches(stream, 1)
        assert len(seen) == 2 * 3, "two views of each batch"
        batches(stream, 29)
        assert len(seen) > 0.6 * 6 * ROWS


def test_targets_are_joined_row_by_row() -> None:
    dense = [DenseTarget(torch.arange(6.0).view(2, 3) + 10 * part) for part in range(2)]
    assert joined(dense).dense().values.tolist() == [[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15]]
    half = torch.zeros((2, 1), dtype=torch.float16)
    sparse = [
        SparseTarget(half, torch.full((2, 1), part, dtype=torch.uint8), half[:, 0], half[:, 0] + part, classes=5)
        for part in range(3)
    ]
    whole = joined(sparse)
    assert isinstance(whole, SparseTarget)
    assert (len(whole), whole.classes) == (6, 5)
    assert torch.equal(whole.log_probs(2.0), torch.cat([part.log_probs(2.0) for part in sparse]))
    assert joined(dense[:1]) is dense[0]


SIZED = {"recipe": [{"random_resized_crop": {"size": 8}}, "horizontal_flip"], "count": 2, "seed": 3}


@pytest.fixture(scope="module")
def sized(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of crops that were resized to 8×8."""
    path = tmp_path_factory.mktemp("sized") / "cache"
    tc.build(toy_spec(path, arrays, views=SIZED), executor="serial")
    return path


class TestStudentsSize:
    """The student renders the teacher's crop at its own resolution, and is still proven."""

    def test_views_are_the_students_and_answers_the_teachers(self, sized: Path) -> None:
        cache = tc.open(sized)
        plain, own = (
            ViewStream(rows, batch_size=9, check_views=9) for rows in (CachedRows(cache), CachedRows(cache, size=6))
        )
        for ours, theirs in zip(own, plain, strict=True):
            assert ours.views_BCHW.shape[2:] == (6, 6)
            assert (ours.rows_B == theirs.rows_B).all()
            assert torch.equal(ours.targets["logits"].dense().values, theirs.targets["logits"].dense().values)

    def test_the_proof_is_at_the_teachers_size(self, sized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from teacher_cache.views.recipe import Recipe

        render = Recipe.render

        def brighter(self: Recipe, *arguments: Any) -> Any:
            views, mixed = render(self, *arguments)
            return torch.stack(list(views)) + 9, mixed

        monkeypatch.setattr(Recipe, "render", brighter)
        with pytest.raises(ViewMismatch):
            list(ViewStream(CachedRows(tc.open(sized), size=6), batch_size=9, check_views=1))

    def test_it_is_part_of_the_datas_fingerprint_and_travels(self, sized: Path) -> None:
        cache = tc.open(sized)
        rows = [CachedRows(cache), CachedRows(cache, size=6), CachedRows(cache, size=(6, 7))]
        assert len({item.fingerprint for item in rows}) == 3
        assert rows[0].fingerprint == cache.manifest.whole
        copied = pickle.loads(pickle.dumps(rows[2]))
        assert copied.fingerprint == rows[2].fingerprint
        assert next(iter(ViewStream(copied, batch_size=9))).views_BCHW.shape[2:] == (6, 7)

    def test_a_recipe_that_does_not_allow_it(self, many: Path) -> None:
        with pytest.raises(SpecError, match="size"):
            CachedRows(tc.open(many), size=6)


OWN = ViewSpec.model_validate({"recipe": [{"pad_crop": {"size": 8, "padding": 1}}], "seed": 99})


class TestOwnViews:
    """Fixed and independent teachers: answers by sample and cached view, pixels from the student's own recipe."""

    def test_answers_cycle_and_views_are_fresh(self, many: Path) -> None:
        cache = tc.open(many)
        stream = ViewStream(OwnViews(cache, OWN), batch_size=ROWS, shuffle=False)
        seen = set()
        for number, batch in enumerate(batches(stream, 8)):
            expected = cache.read("logits", number % 6, range(ROWS)).dense().values
            assert torch.equal(batch.targets["logits"].dense().values, expected)
            assert (batch.view_B == number).all()
            seen.add(batch.views_BCHW.numpy().tobytes())
        assert len(seen) == 8

    def test_a_recipe_without_randomness_shows_what_it_can(self, many: Path) -> None:
        clean = ViewSpec(recipe=())
        stream = ViewStream(OwnViews(tc.open(many), clean), batch_size=ROWS, shuffle=False)
        first, second = batches(stream, 2)
        assert torch.equal(first.views_BCHW, second.views_BCHW)
        assert not torch.equal(first.targets["logits"].dense().values, second.targets["logits"].dense().values)

    def test_there_is_nothing_to_check(self, many: Path) -> None:
        rows = OwnViews(tc.open(many), OWN)
        with pytest.raises(SpecError, match="check_views: needs the views that the teacher saw"):
            ViewStream(rows, batch_size=4, check_views=1)
        assert ViewStream(rows, batch_size=4, check_views=0) is not None

    def test_its_fingerprint_names_both(self, many: Path) -> None:
        cache = tc.open(many)
        other = ViewSpec.model_validate({**OWN.model_dump(), "seed": 1})
        names = {CachedRows(cache).fingerprint, *(OwnViews(cache, views).fingerprint for views in (OWN, other))}
        assert len(names) == 3
        rows = OwnViews(cache, OWN)
        there = ViewStream(pickle.loads(pickle.dumps(rows)), batch_size=9)
        assert all(same(a, b) for a, b in zip(there, ViewStream(rows, batch_size=9), strict=True))

    def test_mixing_is_refused(self, many: Path) -> None:
        """The cached answer is for the sample alone: beside a mixed view it would be wrong in silence."""
        mixing = ViewSpec.model_validate({"recipe": ["mixup"], "seed": 4})
        with pytest.raises(SpecError, match=r"must not mix.*Mix in the cache's own recipe"):
            OwnViews(tc.open(many), mixing)


class TestConfiguration:
    """All of it can be written in a YAML file."""

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "either `cache`"),
            ({"source": {"kind": "digits"}}, "either `cache`"),
            ({"cache": "c", "views": {"recipe": []}, "size": 160}, "leave out `views`"),
            ({"cache": "c", "views": {"recipe": []}, "tolerance": "rounding"}, "leave out `views`"),
            ({"source": {"kind": "digits"}, "views": {"recipe": []}, "size": 8}, "are for the views"),
            ({"cache": "c", "size": 0}, "above 0"),
            ({"cache": "c", "size": [8, -1]}, "above 0"),
            ({"cache": "c", "tolerance": "some"}, "exact"),
        ],
    )
    def test_what_does_not_go_together(self, data: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            parse(DataSpec, data, "test")

    def test_the_four_schemes_of_the_examples(self) -> None:
        """What the README shows can be read, and differs in what it should."""
        folder = Path(__file__).parent.parent / "examples/schemes"
        specs = {name: load_spec(folder / f"{name}.yaml") for name in ("clean", "consistent", "matching")}
        assert specs["clean"].views.count == 1
        assert len({spec.teacher.model_dump_json() for spec in specs.values()}) == 1
        assert open_recipe(specs["matching"].views).mixing == 1
        compared = parse(CompareSpec, read_yaml(folder / "compare.yaml"), "compare.yaml")
        own = {arm: spec.data.views is not None if spec.data else False for arm, spec in compared.arms.items()}
        assert own == {"fixed": True, "independent": True, "consistent": False, "matching": False}
        caches = {arm: (spec.data or compared.data).cache for arm, spec in compared.arms.items()}
        assert set(caches.values()) == {spec.cache for spec in specs.values()}

    @pytest.mark.parametrize(
        ("data", "train", "expected"),
        [
            ({}, {}, (1, None, "exact", 2)),
            ({"size": 6, "tolerance": "rounding"}, {}, (1, 6, "rounding", 2)),
            ({}, {"views_per_decode": 2, "check_views": 5}, (2, None, "exact", 5)),
        ],
    )
    def test_a_run_opens_what_is_written(
        self,
        sized: Path,
        arrays: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        data: dict[str, Any],
        train: dict[str, Any],
        expected: tuple[Any, ...],
    ) -> None:
        """Nothing that a configuration says is ignored on its way to the stream."""
        seen: list[tuple[Any, ...]] = []

        def spy(_student: Any, stream: ViewStream, *_: Any, **__: Any) -> FitResult:
            rows, steps = stream.data, stream._steps
            assert isinstance(rows, CachedRows)
            seen.append((steps.together, rows._size, rows._tolerance, steps.check))
            return FitResult([])

        monkeypatch.setattr("student_train.run.fit", spy)
        described = {
            "run": str(tmp_path / "run"),
            "data": {"cache": str(sized), **data},
            "student": {"model": "small_cnn", "arguments": {"width": 2}},
            "train": {"epochs": 1, "batch_size": 8, "device": "cpu", **train},
            "evaluate": {"source": numpy_source(arrays), "views": {"recipe": []}},
            "objective": [{"kind": "kd"}],
        }
        spec = parse(FitSpec, described, "test")
        train_one(spec, open_data(spec), spec.objective, 0, tmp_path / "run")
        assert seen == [expected]

    def test_an_arm_may_have_its_own_data(self, arrays: Path, many: Path, tmp_path: Path) -> None:
        """The four schemes are arms of one comparison; a bare list is an objective, as before."""
        from student_train.compare import compare

        clean = tmp_path / "clean"
        tc.build(toy_spec(clean, arrays, views={"recipe": [], "count": 1}), executor="serial")
        source = toy_spec(clean, arrays).source.model_dump()
        described = {
            "run": str(tmp_path / "run"),
            "data": {"cache": str(many)},
            "student": {"model": "small_cnn", "arguments": {"width": 2}},
            "train": {"epochs": 1, "batch_size": 8, "device": "cpu", "threads": 1},
            "evaluate": {"source": source, "views": {"recipe": []}},
            "arms": {
                "fixed": {"objective": [{"kind": "kd"}], "data": {"cache": str(clean), "views": OWN.model_dump()}},
                "independent": {
                    "objective": [{"kind": "kd"}],
                    "data": {"cache": str(many), "views": OWN.model_dump()},
                },
                "consistent": [{"kind": "kd"}],
            },
            "seeds": [0, 1],
        }
        found = compare(parse(CompareSpec, described, "test"))
        losses = {arm: [run[-1]["loss"] for run in runs] for arm, runs in found.history.items()}
        assert len({tuple(values) for values in losses.values()}) == 3
        again = compare(parse(CompareSpec, described, "test"))
        assert again.history == found.history

    def test_what_an_arm_does_not_allow_is_said_before_any_is_trained(self, many: Path, tmp_path: Path) -> None:
        from student_train.compare import compare

        source = tc.open(many).spec.source.model_dump()
        described = {
            "run": str(tmp_path / "run"),
            "data": {"cache": str(many)},
            "student": {"model": "small_cnn", "arguments": {"width": 2}},
            "train": {"epochs": 1, "batch_size": 8, "views_per_decode": 4, "check_views": 3, "device": "cpu"},
            "evaluate": {"source": source, "views": {"recipe": []}},
            "arms": {
                "consistent": [{"kind": "kd"}],
                "clean": {
                    "objective": [{"kind": "cross_entropy"}],
                    "data": {"source": source, "views": {"recipe": []}},
                },
            },
        }
        with pytest.raises(SpecError, match="views_per_decode: must be at least 1, at most 1"):
            compare(parse(CompareSpec, described, "test"))
        assert not (tmp_path / "run").exists()


def test_a_state_of_an_earlier_release_is_read(many: Path) -> None:
    """It knew nothing of several views of one decoding, and means one."""
    state = ViewStream(tc.open(many), batch_size=8).state_dict()
    del state["views_per_decode"]
    ViewStream(tc.open(many), batch_size=8).load_state_dict(state)
    with pytest.raises(MismatchError, match="views_per_decode"):
        ViewStream(tc.open(many), batch_size=8, views_per_decode=2).load_state_dict(state)
