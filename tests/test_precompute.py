"""Ray: the same bytes as the serial loop, whatever dies on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from toy_builds import committed, toy_spec, tree, write_arrays

import teacher_cache as tc
from teacher_cache.build import build
from teacher_cache.errors import BuildError, NonFiniteError, TombstoneError, WorkError
from teacher_cache.plan import open_parts, worker_count
from teacher_cache.poison import KILLED
from teacher_cache.sources import BrokenSample, Item
from teacher_cache.sources.numpy_arrays import NumpyArrays
from teacher_cache.spec import BuildSpec, ComputeSpec


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all of these tests: `run_on_ray` uses what is already there."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def poisoned(tmp_path: Path, model: str, name: str = "cache", **changes: Any) -> BuildSpec:
    """Row 20 (shard 2) is poison for the misbehaving teachers."""
    folder = write_arrays(tmp_path / "arrays", poison=20)
    described = {
        "views": {"recipe": [], "count": 1},
        "teacher__fields": {"logits": {"encoding": "dense_f32"}},
        "teacher__model": f"toy_models:{model}",
        "compute__workers": 1,
        **changes,
    }
    return toy_spec(tmp_path / name, folder, **described)


@pytest.mark.parametrize("store", ["zarr", pytest.param("parquet", marks=pytest.mark.slow)])
def test_it_writes_what_the_serial_loop_writes(store: str, cluster: None, arrays: Path, tmp_path: Path) -> None:
    """Two workers, eight shards, any order: the trees are equal, byte for byte, and so are the figures."""
    described = {"kind": store, "shard_rows": 8, "chunk_rows": 4}
    told: list[tuple[int, int, int]] = []
    spec = toy_spec(tmp_path / "ray", arrays, store=described, compute__workers=2)
    one = build(spec, "ray", lambda *numbers: told.append(numbers))
    other = build(toy_spec(tmp_path / "serial", arrays, store=described), "serial")
    assert tree(tmp_path / "ray") == tree(tmp_path / "serial")
    assert (one.shards_built, one.rows_built, one.fidelity) == (8, 54, other.fidelity)
    assert [done for done, _, _ in told] == sorted({done for done, _, _ in told})
    assert told[-1] == (54, 54, 54)


def test_a_worker_that_dies_is_replaced(cluster: None, tmp_path: Path) -> None:
    """Its shard is tried again and the bytes are those of a build in which nothing died."""
    marker = tmp_path / "died"
    arguments = {"marker": str(marker)}
    report = build(poisoned(tmp_path, "Dies", teacher__arguments=arguments), "ray")
    assert marker.exists()
    assert report.shards_built == 4
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    build(poisoned(tmp_path, "Dies", "whole", teacher__arguments=arguments), "serial")
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def poisonous(tmp_path: Path, name: str, poison: dict[int, int], **changes: Any) -> BuildSpec:
    """`DiesOf` 251 and up; `poison` maps rows to where in its first line of pixels that value stands."""
    folder = write_arrays(tmp_path / "arrays")
    images = np.load(folder / "images.npy")
    for number, (row, column) in enumerate(poison.items()):
        images[row, 0, column] = 251 + number
    np.save(folder / "images.npy", images)
    values = list(range(251, 251 + len(poison)))
    # Small shards and one attempt: every death costs the start of a worker.
    store = {"kind": "zarr", "shard_rows": 4, "chunk_rows": 4}
    told = {"compute__workers": 1, "compute__attempts": 1, "views": {"recipe": [], "count": 1}, "store": store}
    changes = told | {"teacher__micro_batch": 3} | changes
    arguments = {"values": values, **changes.pop("teacher__arguments", {})}
    return toy_spec(
        tmp_path / name, folder, teacher__model="toy_models:DiesOf", teacher__arguments=arguments, **changes
    )


def without(spec: BuildSpec, rows: set[int], path: Path) -> dict[str, str]:
    """The tree of a serial build in which these rows cannot be decoded."""
    decoded = NumpyArrays.item

    def item(source: NumpyArrays, row: int) -> Item:
        if row in rows:
            raise BrokenSample(KILLED)
        return decoded(source, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NumpyArrays, "item", item)
        build(spec.model_copy(update={"cache": str(path)}), "serial")
    return tree(path)


@pytest.mark.slow
def test_poison_becomes_a_tombstone(cluster: None, tmp_path: Path) -> None:
    """Two samples of one shard: the rest is as if these could not be decoded."""
    store = {"kind": "parquet", "shard_rows": 8, "chunk_rows": 4}
    spec = poisonous(tmp_path, "cache", {16: 0, 21: 0}, store=store, compute__attempts=2)
    report = build(spec, "ray")
    assert report.tombstones == tuple((f"images/{row}", KILLED) for row in (16, 21))
    assert report.shards_built == 4
    assert tree(tmp_path / "cache") == without(spec, {16, 21}, tmp_path / "whole")
    cache = tc.open(spec.cache)
    with pytest.raises(TombstoneError, match=r"images/21.*killed its worker"):
        cache.read("logits", 0, [20, 21])
    # Asked again, its neighbours are asked without it: it would end this very process.
    assert tc.verify(spec.cache, recompute=27, views="all").ok
    assert build(spec, "ray").tombstones == report.tombstones


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_poison_in_one_view_is_poison_in_all(cluster: None, tmp_path: Path) -> None:
    """A flip hides one sample in view 1 and another in view 0: whoever comes first, both are left out of both.

    View 0 is committed with the second one in it, and made again when that kills in view 1; stopped in between, the
    build comes to the same end, and so does one that makes both views together.
    """
    views = {"recipe": [{"horizontal_flip": {}}], "count": 2, "seed": 11}
    flips = open_parts(poisonous(tmp_path, "none", {}, views=views))
    flipped = [flips.view_of(list(range(16, 20)), view).params_BP[:, 0].astype(bool) for view in (0, 1)]
    first = 16 + int(np.flatnonzero(~flipped[0] & flipped[1])[0])
    second = 16 + int(np.flatnonzero(flipped[0] & ~flipped[1])[0])
    poison = {first: 0, second: 0}
    spec = poisonous(tmp_path, "cache", poison, views=views)
    expected = without(spec, set(poison), tmp_path / "whole")

    def stop(_done: int, _total: int, built: int) -> None:
        if built >= 27:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(spec, "ray", stop)
    halfway = tc.open(spec.cache)
    assert set(np.flatnonzero(~halfway.alive)) == {first}
    halfway.read("logits", 0, [second])
    told: list[tuple[int, int, int]] = []
    report = build(spec, "ray", lambda *numbers: told.append(numbers))
    assert {key for key, _ in report.tombstones} == {f"images/{row}" for row in poison}
    assert tree(tmp_path / "cache") == expected
    assert told[-1][:2] == (54, 54)
    assert report.shards_built == 8, "seven of view 1, and one of view 0 again"
    together = spec.model_copy(update={"compute": spec.compute.model_copy(update={"views_per_decode": 2})})
    build(together.model_copy(update={"cache": str(tmp_path / "together")}), "ray")
    assert tree(tmp_path / "together") == expected


@pytest.mark.slow
def test_a_serial_build_leaves_out_what_ray_has_found(cluster: None, tmp_path: Path) -> None:
    """The poison lies in the receipts; the serial loop, which could not survive it, goes on without it."""
    views = {"recipe": [{"horizontal_flip": {}}], "count": 2, "seed": 11}
    changes = {"compute__attempts": 1, "views": views}
    spec = poisoned(tmp_path, "Dies", **changes)

    def stop(_done: int, _total: int, built: int) -> None:
        if built >= 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(spec, "ray", stop)
    build(spec, "serial")
    assert tree(tmp_path / "cache") == without(spec, {20}, tmp_path / "whole")


@pytest.mark.slow
def test_no_single_sample_is_to_blame(cluster: None, tmp_path: Path) -> None:
    """Two that kill only together are no tombstones: the build ends and names the shard, what is committed stays."""
    spec = poisonous(tmp_path, "cache", {17: 0, 18: 0}, teacher__arguments={"together": True})
    with pytest.raises(BuildError, match=r"view 0, shard 4: killed its worker 1 times.*rows 16\.\.19 die") as caught:
        build(spec, "ray")
    assert "serial" in caught.value.hint
    assert set(committed(tc.open(spec.cache))) >= {(0, 0), (0, 1)}
    assert (0, 4) not in committed(tc.open(spec.cache))
    assert tc.open(spec.cache).alive.all()


@pytest.mark.slow
def test_a_recipe_that_mixes_is_not_bisected(cluster: None, tmp_path: Path) -> None:
    """There a partner may be to blame, and other rows' views depend on which samples are there."""
    views = {"recipe": [{"cutmix": {}}], "count": 1, "seed": 3}
    spec = poisonous(tmp_path, "cache", dict.fromkeys(range(8, 12), 0), views=views)
    with pytest.raises(BuildError, match="killed its worker 1 times, in a recipe that mixes"):
        build(spec, "ray")


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("Raises", BuildError, r"images/20 … images/23.*the poison was too much"),
        pytest.param(
            "OtherShape",
            BuildError,
            r"images/20 … images/23.*must answer logits as \(4, 10\)",
            marks=pytest.mark.slow,
        ),
        pytest.param("NaNs", NonFiniteError, r"images/20, view 0, logits.*nan", marks=pytest.mark.slow),
        pytest.param("Infinite", NonFiniteError, r"images/20, view 0, logits.*inf", marks=pytest.mark.slow),
    ],
)
def test_errors_arrive_as_they_were_raised(
    model: str, kind: type[WorkError], message: str, cluster: None, tmp_path: Path
) -> None:
    """Our types, with their field and hint, not Ray's wrapping; what was committed stays; the serial loop's words."""
    with pytest.raises(kind, match=message) as caught:
        build(poisoned(tmp_path, model), "ray")
    assert type(caught.value) is kind
    assert {(0, 0), (0, 1)} <= set(committed(tc.open(tmp_path / "cache")))
    with pytest.raises(kind) as serial:
        build(poisoned(tmp_path, model, "serial"), "serial")
    assert str(serial.value) == str(caught.value)


@pytest.mark.slow
def test_a_ray_build_goes_on_after_a_serial_one(cluster: None, arrays: Path, tmp_path: Path) -> None:
    """Executors may change between two runs; committed shards are kept."""

    def progress(done: int, _total: int, _built: int) -> None:
        if done >= 24:
            raise KeyboardInterrupt

    spec = toy_spec(tmp_path / "cache", arrays)
    with pytest.raises(KeyboardInterrupt):
        build(spec, "serial", progress)
    assert build(spec, "ray").shards_built == 5
    build(toy_spec(tmp_path / "whole", arrays), "serial")
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")
    assert ray.is_initialized(), "a Ray that was there before is not shut down"
    assert build(spec, "ray").shards_built == 0


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As told; else one for each `threads` cores, never none."""
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert worker_count(ComputeSpec(device="cpu", workers=7)) == 7
    assert worker_count(ComputeSpec(device="cpu", threads=2)) == 2
    assert worker_count(ComputeSpec(device="cpu", threads=9)) == 1
