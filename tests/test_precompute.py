"""Ray: the same bytes as the serial loop, whatever dies on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from toy_builds import toy_spec, tree, write_arrays

import teacher_cache as tc
from teacher_cache.build import build
from teacher_cache.errors import BuildError, NonFiniteError
from teacher_cache.plan import worker_count
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


@pytest.mark.parametrize("store", ["zarr", "parquet"])
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


def test_a_poison_shard_ends_the_build_and_is_named(cluster: None, tmp_path: Path) -> None:
    """Only after its own attempts: shards before it are committed, those behind it are not blamed."""
    spec = poisoned(tmp_path, "Dies", compute__attempts=2)
    with pytest.raises(BuildError, match=r"view 0, shard 2: killed its worker 2 times") as caught:
        build(spec, "ray")
    assert "serial" in caught.value.hint
    assert {(0, 0), (0, 1)} <= set(tc.open(spec.cache).files)
    assert (0, 2) not in tc.open(spec.cache).files


def test_errors_arrive_as_they_were_raised(cluster: None, tmp_path: Path) -> None:
    """Our types, with their field and hint, not Ray's wrapping; what was committed stays."""
    with pytest.raises(BuildError, match=r"images/20 … images/23.*the poison was too much") as caught:
        build(poisoned(tmp_path, "Raises"), "ray")
    assert type(caught.value) is BuildError
    assert caught.value.field == "images/20 … images/23"
    with pytest.raises(NonFiniteError, match=r"images/20, view 0, logits") as refused:
        build(poisoned(tmp_path, "NaNs", "nan"), "ray")
    assert type(refused.value) is NonFiniteError
    assert (0, 0) in tc.open(tmp_path / "nan").files


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
