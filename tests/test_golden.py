"""Caches, parameters and fingerprints that have been given out: they must read, and come out, as they did.

`python tests/golden/regenerate.py` writes them again; do that only together with a new format version.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import teacher_cache as tc
from teacher_cache.views.operations import OPERATIONS

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

import regenerate  # noqa: E402 - beside the caches that it writes

NAMES = pytest.mark.parametrize("name", list(regenerate.CACHES))
TRANSCENDENTAL = ("tail_logmass", "lse")
"""Parts that need exp and log: on another processor the last bit of float16 may round the other way."""


def same(part: str, ours: Any, theirs: Any) -> bool:
    """Bit for bit, except where exp and log are in between."""
    if part.endswith(TRANSCENDENTAL):
        return bool(np.allclose(ours.astype(float), theirs.astype(float), rtol=2.0**-9, atol=2.0**-9))
    return bool(ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes())


@NAMES
def test_it_opens_and_reads(name: str) -> None:
    """Every stored array, key, label and content digest is what it was on the day of the release."""
    cache = tc.open(GOLDEN / name)
    described = json.loads((GOLDEN / f"{name}.json").read_text())
    assert cache.manifest.format_version == 2
    assert list(cache.samples.keys) == described["keys"]
    assert cache.labels is not None
    assert cache.labels.tolist() == described["labels"]
    assert cache.samples.content.tolist() == described["content"]
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        found = regenerate.stored(cache)
        assert set(found) == set(arrays)
        for key, values in found.items():
            assert values.dtype == arrays[key].dtype
            assert values.tobytes() == arrays[key].tobytes(), key


@NAMES
def test_it_verifies(name: str) -> None:
    """Bytes, views and answers: the views of today are those that the teacher saw then."""
    report = tc.verify(GOLDEN / name, views=30, recompute=30)
    assert report.ok, report.problems


@NAMES
def test_a_build_of_today_gives_the_same(name: str, tmp_path: Path) -> None:
    """The same fingerprints and rows; for Zarr the same files, byte for byte (Parquet's depend on pyarrow)."""
    tc.build(regenerate.golden_spec(name, tmp_path / "cache"), executor="serial")
    fresh, old = tc.open(tmp_path / "cache"), tc.open(GOLDEN / name)
    described = json.loads((GOLDEN / f"{name}.json").read_text())
    assert fresh.manifest.first.identity.model_dump() == described["identity"]
    theirs = regenerate.stored(old)
    for key, values in regenerate.stored(fresh).items():
        assert same(key, values, theirs[key]), key
    if name.startswith("zarr"):
        files = [path for path in (GOLDEN / name / "data").rglob("*") if path.is_file()]
        for path in files:
            ours = tmp_path / "cache" / path.relative_to(GOLDEN / name)
            if path.name == "zarr.json":
                assert json.loads(ours.read_text()) == json.loads(path.read_text())
            elif not any(part in path.as_posix() for part in TRANSCENDENTAL):
                assert ours.read_bytes() == path.read_bytes(), path


def test_parameters_resolve_as_they_did() -> None:
    """(operation, seed, sample key, view) to parameters and sizes: a change here moves every view ever cached."""
    frozen = json.loads((GOLDEN / "parameters.json").read_text())
    assert regenerate.resolved_parameters() == frozen
    assert len(frozen) == 11 * 2 * 3 * 2
    assert {key.partition("|")[0] for key in frozen} == set(OPERATIONS), "a new operation is frozen too"


def test_views_render_as_they_did() -> None:
    """(recipe, seed, sample key, view) to parameters and pixel digest, where pixels do not depend on the machine."""
    frozen = json.loads((GOLDEN / "views.json").read_text())
    assert regenerate.rendered_views() == frozen
    assert len(frozen) == 5 * 2 * 2 * 6
