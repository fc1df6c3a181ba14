"""Thousands of injections into small caches: every one is found, and no wrong row is ever read."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from injections import KINDS, Injector, heal, missed, read_all, rows_of
from PIL import Image
from toy_builds import toy_spec

import teacher_cache as tc
from teacher_cache.storage.zarr_shards import ZarrStore

SHORT, LONG = 200, 25_000
"""Injections into each cache."""

FIELDS: dict[str, Any] = {
    "ragged": {
        "logits": {"encoding": {"kind": "nucleus", "mass": 0.9, "cap": 5}},
        "feature:stem": {"encoding": "u8_channel"},
    },
    "sparse": {
        "logits": {"encoding": {"kind": "top_k", "k": 3, "tail": "prior"}},
        "feature:stem": {"pool": "mean", "encoding": "dense_f16"},
    },
}
CACHES = {
    "zarr, sealed": ("zarr", "ragged", None),
    "parquet, sealed": ("parquet", "ragged", None),
    "zarr, building": ("zarr", "sparse", 3),
    "parquet, building": ("parquet", "sparse", 3),
}


def write_images(folder: Path, seed: int) -> Path:
    """Ten images of ten classes, two of which cannot be decoded."""
    random = np.random.Generator(np.random.Philox(seed))
    for number in range(10):
        (folder / f"{number}").mkdir(parents=True)
        path = folder / f"{number}" / "image.png"
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(path)
        if number in (3, 7):
            path.write_bytes(b"no image")
    return folder


def build_small(root: Path, images: Path, store: str, fields: str, shards: int | None) -> Path:
    """Ten rows in two views and two shards; `shards` of them only, and unsealed, where a number is given."""
    spec = toy_spec(
        root,
        images,
        source={"kind": "folder", "path": str(images)},
        teacher__fields=FIELDS[fields],
        store={"kind": store, "shard_rows": 6, "chunk_rows": 2},
    )

    def stop(_done: int, _total: int, built: int) -> None:
        if shards is not None and built >= shards * 5 - 2:
            raise KeyboardInterrupt

    if shards is None:
        tc.build(spec, executor="serial")
    else:
        with pytest.raises(KeyboardInterrupt):
            tc.build(spec, "serial", stop)
    return root


@pytest.fixture(scope="module", params=list(CACHES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A small cache, and one of the same spec over other images; in memory where there is such a place."""
    memory = Path("/dev/shm")
    base = tmp_path_factory.mktemp("injections")
    folder = memory / f"teacher-cache-{base.parent.name}-{base.name}" if memory.is_dir() else base
    try:
        images = folder / "images"
        for seed, name in ((2, "donor"), (1, "cache")):
            shutil.rmtree(images, ignore_errors=True)
            build_small(folder / name, write_images(images, seed), *CACHES[request.param])
        yield folder / "cache", folder / "donor"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def metadata_once() -> Iterator[None]:
    """`metadata` is pure, and zarr makes it slowly: the verifier of a thousand states of one cache asks once."""
    with pytest.MonkeyPatch.context() as patch:
        real = lru_cache(lambda store, groups: ZarrStore.metadata.real(store, groups))  # type: ignore[attr-defined]
        once = lambda store, groups: real(store, tuple(groups))  # noqa: E731
        once.real = ZarrStore.metadata  # type: ignore[attr-defined]
        patch.setattr(ZarrStore, "metadata", once)
        yield


def run(cache: Path, donor: Path, seed: int, count: int) -> Counter[str]:
    """Injects `count` times; fails with the seed at the first that is missed. Leaves the cache as it was."""
    injector, sound = Injector(cache, donor, seed), rows_of(tc.open(cache))
    expected = {problem.place for problem in tc.verify(cache).problems}
    kinds: Counter[str] = Counter()
    for number in range(count):
        injection = injector.damage()
        try:
            wrong = missed(injection, cache, sound, expected)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, number {number}: {injection}: {error!r}") from error
        finally:
            heal(injector)
        assert wrong is None, f"seed {seed}, number {number}: {injection}: {wrong}"
        kinds[injection.kind] += 1
    assert read_all(cache) == injector.files
    return kinds


@pytest.mark.parametrize(
    "pair",
    [
        "zarr, sealed",
        "parquet, building",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zarr, building", "parquet, sealed")),
    ],
    indirect=True,
)
def test_every_injection_is_found(pair: tuple[Path, Path]) -> None:
    started = time.perf_counter()
    kinds = run(*pair, seed=20_260, count=SHORT)
    print(f"{SHORT / (time.perf_counter() - started):.0f} injections a second")
    assert len(kinds) == len(KINDS), "every kind was tried"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
def test_every_one_of_many_injections_is_found(pair: tuple[Path, Path], seed: int) -> None:
    run(*pair, seed=seed, count=LONG // 4)
