"""`FORMAT.md` cannot rot: every Python block in it runs, in order, against fresh caches."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from toy_builds import toy_spec

import teacher_cache as tc
from teacher_cache.manifest import FORMAT_VERSION, Manifest
from teacher_cache.spec import EncodingSpec
from teacher_cache.views.operations import OPERATIONS

TEXT = (files("teacher_cache") / "FORMAT.md").read_text(encoding="utf-8")
BLOCKS = list(re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def namespace(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`CACHE` and `PARQUET_CACHE`, as the page promises."""
    root = tmp_path_factory.mktemp("format")
    for kind in ("zarr", "parquet"):
        store = {"kind": kind, "shard_rows": 8, "chunk_rows": 4}
        tc.build(toy_spec(root / kind, arrays, store=store), executor="serial")
    return {"CACHE": str(root / "zarr"), "PARQUET_CACHE": str(root / "parquet")}


def test_every_block_runs(namespace: dict[str, Any]) -> None:
    """In one namespace, in the order of the page; a failure has the page's line number."""
    assert len(BLOCKS) >= 10
    for block in BLOCKS:
        line = TEXT[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), "FORMAT.md", "exec"), namespace)


def test_it_is_about_this_version() -> None:
    assert TEXT.startswith(f"# The cache format, version {FORMAT_VERSION}\n")


def test_it_names_everything_that_is_there() -> None:
    """Every key of the manifest, every encoding and every native operation has its line."""
    for key in Manifest.model_fields:
        assert f"`{key}`" in TEXT, key
    for kind in EncodingSpec.__args__[0].__args__:  # type: ignore[attr-defined]
        assert f"`{kind.model_fields['kind'].annotation.__args__[0]}`" in TEXT, kind
    for name, kind in OPERATIONS.items():
        needed = {"resize", "center_crop", "pad_crop", "random_resized_crop"}
        operation = kind(size=8) if name in needed else kind()
        stored = ", ".join(f"`{param}`" for param in operation.params) or "–"
        assert f"| `{name}` | {operation.blocks} | {stored} |" in TEXT, name
