"""The toy build: 27 images of 8×8 in `.npy` files, an exact teacher, two views, shards of 8 rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache import Cache
from teacher_cache.addition import Addition
from teacher_cache.manifest import read_manifest
from teacher_cache.spec import BuildSpec
from teacher_cache.storage import FileRecord
from teacher_cache.storage.local_root import LocalRoot

ROWS = 27
CLASSES = 10
RECIPE = [{"pad_crop": {"size": 8, "padding": 2}}, {"horizontal_flip": {}}]


def write_arrays(folder: Path, poison: int | None = None) -> Path:
    """Writes `images.npy` and `labels.npy`; one image may be all white (`toy_models.POISON`)."""
    folder.mkdir(parents=True, exist_ok=True)
    words = np.random.Generator(np.random.Philox(3)).integers(0, 100, (ROWS, 8, 8))
    labels = np.arange(ROWS) % 8
    images = words.astype(np.uint8)
    images[np.arange(ROWS), labels] += 150
    if poison is not None:
        images[poison] = 255
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder


def numpy_source(folder: Path) -> dict[str, Any]:
    """The source of those files."""
    names = [f"class {number}" for number in range(CLASSES)]
    files = {"images": str(folder / "images.npy"), "labels": str(folder / "labels.npy")}
    return {"kind": "numpy", **files, "class_names": names}


def toy_spec(cache: Path, arrays: Path, **changes: Any) -> BuildSpec:
    """A spec of the toy build; `teacher__micro_batch=8` changes one key, `teacher={...}` a whole section."""
    described: dict[str, Any] = {
        "cache": str(cache),
        "source": numpy_source(arrays),
        "views": {"recipe": RECIPE, "count": 2, "seed": 11},
        "teacher": {
            "model": "toy_models:PixelSums",
            "micro_batch": 4,
            "fields": {
                "logits": {"encoding": "dense_f32"},
                "feature:stem": {"pool": "mean", "encoding": "dense_f16"},
            },
        },
        "store": {"kind": "zarr", "shard_rows": 8, "chunk_rows": 4},
        "compute": {"device": "cpu", "threads": 1, "views_per_decode": 1},
    }
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        if inner:
            described[section] = {**described[section], inner: value}
        else:
            described[section] = value
    return BuildSpec.model_validate(described)


def tree(root: Path) -> dict[str, str]:
    """Every file below a folder, with the digest of its bytes."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def committed(cache: Cache) -> dict[tuple[int, int], dict[str, FileRecord]]:
    """The files of every committed (view, shard) of a cache that has not grown, by path."""
    (index,) = cache.indices
    return {place: dict(index.files(*place)) for place in index.places()}


def addition_of(path: str | Path) -> Addition:
    """The addition that began a cache."""
    return read_manifest(LocalRoot(Path(path))).first


def expected_logits(pixels_BCHW: torch.Tensor) -> NDArray[np.float32]:
    """What `toy_models:PixelSums` must answer, computed with NumPy's integers."""
    flat = pixels_BCHW.numpy().reshape(len(pixels_BCHW), -1).astype(np.int64)
    classes, places = np.meshgrid(np.arange(CLASSES), np.arange(flat.shape[1]), indexing="ij")
    sums = flat @ ((classes * 7 + places * 3) % 11 - 5).T
    return (sums * 2.0**-10).astype(np.float32)
