"""Fixtures shared by the tests of `teacher_cache`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from toy_builds import toy_spec, write_arrays

import teacher_cache as tc

_SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# `make test` draws the same examples each time, so that a failure is the change's; `make test-all` looks further.
settings.register_profile("laws", _SHARED, max_examples=40, derandomize=True)
settings.register_profile("explore", _SHARED, max_examples=200)
settings.load_profile("laws")
# Workers and subprocesses must find `toy_models` too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: whatever else there is fits beside it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """`fsync` matters when the power fails, which no test can make happen; that it is called is tested apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        yield


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data set; never changed by a test."""
    return write_arrays(tmp_path_factory.mktemp("arrays"))


@pytest.fixture(scope="session", params=["zarr", "parquet"])
def built(request: pytest.FixtureRequest, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed toy cache of each store; never changed by a test (copy it first)."""
    path = tmp_path_factory.mktemp(request.param) / "cache"
    store = {"kind": request.param, "shard_rows": 8, "chunk_rows": 4}
    tc.build(toy_spec(path, arrays, store=store), executor="serial")
    return path
