"""The reader: rows in the order asked for, and a refusal wherever something does not fit."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_builds import CLASSES, ROWS, expected_logits, numpy_source, toy_spec, write_arrays

import teacher_cache as tc
from teacher_cache.errors import (
    CorruptionError,
    HoleError,
    MismatchError,
    SourceError,
    TeacherCacheError,
    ViewMismatch,
)
from teacher_cache.reader import Cache
from teacher_cache.spec import NumpySource


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A cache to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


@given(view=st.integers(0, 1), rows=st.lists(st.integers(0, ROWS - 1), max_size=40))
def test_rows_in_any_order_with_repeats(built: Path, view: int, rows: list[int]) -> None:
    """`read` is fancy indexing into the whole, for lists, arrays and tensors of row numbers."""
    cache = tc.open(built)
    whole = cache.read("logits", view, range(ROWS)).dense().values
    for asked in (rows, np.array(rows, np.int64), torch.tensor(rows, dtype=torch.int64)):
        found = cache.read("logits", view, asked)  # type: ignore[arg-type]
        assert isinstance(found, tc.DenseTarget)
        assert found.values.shape == (len(rows), CLASSES)
        assert torch.equal(found.values, whole[rows])
    assert cache.digests(view, rows).shape == (len(rows),)
    assert cache.params(view, rows).shape == (len(rows), 3)


@given(start=st.integers(0, ROWS - 1), stop=st.integers(-1, ROWS), step=st.sampled_from([-3, -1, 1, 2]))
def test_a_range_is_its_numbers(built: Path, start: int, stop: int, step: int) -> None:
    """In either direction, and where it is empty."""
    cache, rows = tc.open(built), range(start, stop, step)
    found = cache.read("logits", 1, rows).dense().values
    assert torch.equal(found, cache.read("logits", 1, list(rows)).dense().values)
    assert len(found) == len(rows)


@given(view=st.integers(0, 1), rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=9))
def test_stored_proof_is_the_view(built: Path, view: int, rows: list[int]) -> None:
    """Digests and parameters are those of the views rendered now, and the target is the teacher's answer."""
    cache = tc.open(built)
    views = cache.render_views(view, rows)
    assert (views.digests() == cache.digests(view, rows)).all()
    assert (views.params_BP == cache.params(view, rows)).all()
    assert (cache.read("logits", view, rows).dense().values.numpy() == expected_logits(views.pixels_BCHW)).all()


def test_what_a_cache_says_of_itself(built: Path) -> None:
    cache = tc.open(str(built))
    assert (cache.views, cache.teachers, len(cache), cache.complete) == (2, ("teacher",), ROWS, True)
    assert cache.labels is not None
    assert cache.labels.tolist() == [row % 8 for row in range(ROWS)]
    assert cache.alive.all()
    assert cache.spec.cache == str(built)
    assert cache.spec.teacher.model == "toy_models:PixelSums"
    assert cache.manifest.param_names == ("0.pad_crop.top", "0.pad_crop.left", "1.horizontal_flip.flip")


def test_no_rows_is_no_error(built: Path) -> None:
    """An empty batch has empty arrays of the right shape."""
    cache = tc.open(built)
    assert cache.read("logits", 0, []).dense().values.shape == (0, CLASSES)
    assert cache.render(0, []).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("rows", [[ROWS], [-1], [0, 1, 10**12]])
def test_rows_outside_the_plan(built: Path, rows: list[int]) -> None:
    """No wrapping of negative numbers, no clipping."""
    with pytest.raises(HoleError, match=r"row: must be in 0\.\.26"):
        tc.open(built).read("logits", 0, rows)


@pytest.mark.parametrize("rows", [[0.5], np.array([1.0, 2.0]), np.ones(ROWS, np.bool_), ["3"]])
def test_rows_that_are_no_row_numbers(built: Path, rows: Any) -> None:
    """A mask is not read as rows 0 and 1, nor 0.5 as row 0."""
    with pytest.raises(TeacherCacheError, match=r"rows?:.*integers"):
        tc.open(built).read("logits", 0, rows)


@pytest.mark.parametrize("view", [-1, 2])
def test_views_outside_the_plan(built: Path, view: int) -> None:
    for ask in ("digests", "params", "render"):
        with pytest.raises(HoleError, match=r"view: must be in 0\.\.1"):
            getattr(tc.open(built), ask)(view, [0])


def test_an_unknown_field(built: Path) -> None:
    with pytest.raises(MismatchError, match=r"found: logit\).*feature:stem.*logits|found: logit\).*logits.*stem"):
        tc.open(built).read("logit", 0, [0])


def test_a_copy_in_another_process_is_a_cache(built: Path) -> None:
    """Pickling carries the place, not the maps."""
    cache = tc.open(built)
    cache.read("logits", 0, range(ROWS))
    data = pickle.dumps(cache)
    assert len(data) < 2000
    again = pickle.loads(data)
    assert isinstance(again, Cache)
    assert torch.equal(again.read("logits", 1, [3]).dense().values, cache.read("logits", 1, [3]).dense().values)


def test_many_shards_do_not_stay_open(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used are closed; what is read stays right."""
    monkeypatch.setattr("teacher_cache.storage.zarr_groups._MOST_FILES", 5)
    monkeypatch.setattr("teacher_cache.storage.parquet_groups._MOST_BYTES", 700)
    cache = tc.open(built)
    for _ in range(2):
        for view in range(2):
            whole = cache.read("logits", view, range(ROWS)).dense().values
            assert (whole.numpy() == expected_logits(cache.render(view, range(ROWS)))).all()
        assert sum(reader.load for reader in cache._gatherer.readers.values()) <= 1


def test_a_low_limit_of_open_files_is_respected(arrays: Path, tmp_path: Path) -> None:
    """More shards than handles: the least recently used are closed, and nothing is called corrupt."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    store = {"kind": "zarr", "shard_rows": 1, "chunk_rows": 1}
    fields = {"logits": {"encoding": {"kind": "top_k", "k": 3}}}
    spec = toy_spec(tmp_path / "cache", arrays, store=store, teacher__fields=fields, views__count=4)
    tc.build(spec, executor="serial")
    # What other tests still hold open counts too: half of the limit must be free, as for any process.
    gc.collect()
    limit = 128 + 2 * len(list(Path("/proc/self/fd").iterdir()))
    assert limit < ROWS * 4 * 5, "there must be more shards than handles"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        cache = tc.open(tmp_path / "cache")
        for view in range(4):
            assert len(cache.read("logits", view, range(ROWS))) == len(cache.digests(view, range(ROWS))) == ROWS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _read_all(cache: Cache, view: int) -> None:
    for field in cache.fields:
        cache.read(field, view, range(ROWS))
    cache.digests(view, range(ROWS))
    cache.params(view, range(ROWS))


def test_a_damaged_row_is_never_read(copied: Path) -> None:
    """A flip in any data file of a view: reading that view's rows raises, the other view is fine."""
    for path in sorted((copied / "data").rglob("*")):
        if not path.is_file() or path.name == "zarr.json" or "v0001" not in str(path):
            continue
        original = path.read_bytes()
        path.write_bytes(bytes([original[0] ^ 4]) + original[1:])
        cache = tc.open(copied)
        with pytest.raises(CorruptionError):
            _read_all(cache, 1)
        _read_all(cache, 0)
        path.write_bytes(original)


class TestSource:
    """The student's views must come from the same bytes."""

    def _built(self, tmp_path: Path) -> tuple[Path, Path]:
        folder = write_arrays(tmp_path / "arrays")
        tc.build(toy_spec(tmp_path / "cache", folder), executor="serial")
        return folder, tmp_path / "cache"

    def _change(self, folder: Path, row: int) -> None:
        images = np.load(folder / "images.npy")
        images[row, 3, 3] ^= 1
        np.save(folder / "images.npy", images)

    def test_changed_bytes_of_a_sample(self, tmp_path: Path) -> None:
        folder, path = self._built(tmp_path)
        self._change(folder, 5)
        cache = tc.open(path)
        cache.render(0, [4, 6])
        with pytest.raises(MismatchError, match=r"images/5.*bytes that the teacher saw"):
            cache.render(0, [4, 5])

    def test_another_data_set(self, tmp_path: Path) -> None:
        folder, path = self._built(tmp_path)
        np.save(folder / "labels.npy", np.zeros(ROWS, np.int64))
        with pytest.raises(MismatchError, match="source"):
            tc.open(path).render(0, [0])
        assert len(tc.open(path).read("logits", 0, [0])) == 1, "targets need no source"

    def test_a_data_set_that_has_moved(self, tmp_path: Path) -> None:
        folder, path = self._built(tmp_path)
        folder.rename(tmp_path / "moved")
        with pytest.raises(SourceError):
            tc.open(path).render(0, [0])
        moved = NumpySource.model_validate(numpy_source(tmp_path / "moved"))
        pixels = tc.open(path, source=moved).render(1, [7])
        assert (tc.open(path).read("logits", 1, [7]).dense().values.numpy() == expected_logits(pixels)).all()
        assert pickle.loads(pickle.dumps(tc.open(path, source=moved))).render(1, [7]).equal(pixels)
        assert tc.verify(path, views=5, recompute=5, source=moved).ok

    def test_pixels_that_differ(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another library renders otherwise: `ViewMismatch` names sample, view and the reason."""
        _, path = self._built(tmp_path)
        cache = tc.open(path)
        rendered = cache.render_views(1, [2, 9])
        rendered.pixels_BCHW[1, 0, 0, 0] ^= 1
        with pytest.raises(ViewMismatch, match=r"images/9, view 1.*1 of 2 rows differ.*are not the rows' views"):
            cache.check_views(1, [2, 9], rendered)
        monkeypatch.setattr("teacher_cache.views.operations.crops.below", lambda words, _bound: words[:, :2] * 0)
        assert len(tc.open(path).render(1, range(ROWS))) == ROWS, "stored parameters do not depend on drawing"
        with pytest.raises(ViewMismatch, match=r"parameters drawn now differ too \(\[0, 0, "):
            cache.check_views(1, [2, 9], rendered)

    def test_the_wrong_view_or_row(self, built: Path) -> None:
        """Views of another number or sample are not taken for these."""
        cache = tc.open(built)
        with pytest.raises(ViewMismatch):
            cache.check_views(0, range(ROWS), cache.render_views(1, range(ROWS)))
        with pytest.raises(ViewMismatch):
            cache.check_views(0, [3], cache.render_views(0, [4]))


@pytest.mark.parametrize("place", ["manifest.json", "receipts-", "samples-", "data/"])
def test_a_pipe_in_a_files_place_is_refused(place: str, built: Path, tmp_path: Path) -> None:
    """Whoever opens a pipe waits for a writer, and none comes."""
    root = Path(shutil.copytree(built, tmp_path / "cache"))
    for path in [path for path in root.rglob("*") if path.is_file()]:
        name = path.relative_to(root).as_posix()
        if name.startswith(place) and not name.endswith("zarr.json"):
            path.unlink()
            os.mkfifo(path)
    read = (lambda: tc.open(root).labels) if place == "samples-" else (lambda: tc.open(root).read("logits", 0, [0]))
    with pytest.raises(tc.CacheError, match=r"must be a file|must have \d+ bytes|a place with a cache"):
        read()
