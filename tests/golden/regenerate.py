"""Writes the golden caches again: `python tests/golden/regenerate.py`, only when the format's version changes.

Every byte of `data/` and every resolved parameter here is a promise to caches that people have already built.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import teacher_cache as tc
from teacher_cache.fingerprint import key_digests
from teacher_cache.spec import BuildSpec, ViewSpec
from teacher_cache.views import Pool, open_recipe, render_views
from teacher_cache.views.philox import Words

FEATURE = {"pool": "mean", "encoding": "dense_f16"}
TOP_K = {"encoding": {"kind": "top_k", "k": 3}}
CACHES: dict[str, dict[str, Any]] = {
    "zarr-dense": {"store": "zarr", "views": 1, "fields": {"logits": {"encoding": "dense_f32"}}},
    "zarr-top-k": {"store": "zarr", "views": 2, "fields": {"logits": TOP_K, "feature:stem": FEATURE}},
    "parquet-dense": {"store": "parquet", "views": 2, "fields": {"logits": {"encoding": "dense_f16"}, "feature:stem": FEATURE}},
    "parquet-top-k": {"store": "parquet", "views": 1, "fields": {"logits": TOP_K}},
}
"""Eleven digits, shards of 4 rows, chunks of 2: the last shard is ragged."""


def golden_spec(name: str, path: Path) -> BuildSpec:
    """The spec of one golden cache; the teacher's arithmetic is exact, so its bits are the same anywhere."""
    cache = CACHES[name]
    return BuildSpec.model_validate(
        {
            "cache": str(path),
            "source": {"kind": "digits", "split": "test", "take": {"count": 11, "seed": 4}},
            "views": {
                "recipe": [{"pad_crop": {"size": 8, "padding": 2}}, {"horizontal_flip": {}}],
                "seed": 2**63 + 5,
                "count": cache["views"],
            },
            "teacher": {"model": "toy_models:PixelSums", "micro_batch": 3, "fields": cache["fields"]},
            "store": {"kind": cache["store"], "shard_rows": 4, "chunk_rows": 2},
            "compute": {"device": "cpu", "threads": 1},
        }
    )


def stored(cache: tc.Cache) -> dict[str, Any]:
    """Every stored array of a cache, by `<field>/<view>/<part>`."""
    rows, found = range(len(cache)), {}
    for view in range(cache.views):
        found[f"digest/{view}"] = cache.digests(view, rows)
        found[f"params/{view}"] = cache.params(view, rows)
        for field in cache.fields:
            for part, values in cache.columns(field, view, rows).items():
                found[f"{field}/{view}/{part}"] = values
    return found


OPERATIONS: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "pad_crop": ({"size": [28, 30], "padding": 4}, [[32, 32], [40, 31]]),
    "horizontal_flip": ({"p": 0.3}, [[32, 32], [40, 31]]),
    "random_resized_crop": ({"size": 224}, [[375, 500], [500, 333], [4, 900], [900, 4]]),
    "resize": ({"size": 9}, [[32, 40], [7, 5]]),
    "center_crop": ({"size": 9}, [[32, 40], [7, 5]]),
    "color_jitter": ({"brightness": 0.4, "contrast": [0.2, 3.0], "hue": 0.5}, [[32, 32], [40, 31]]),
    "rand_augment": ({"num_ops": 3}, [[32, 40], [224, 320]]),
    "trivial_augment": ({}, [[32, 40], [224, 320]]),
    "random_erasing": ({"p": 0.8}, [[32, 40], [5, 400]]),
    "mixup": ({"alpha": 0.3}, [[32, 32], [40, 31]]),
    "cutmix": ({"alpha": 2.5}, [[32, 32], [40, 31]]),
}
"""One recipe for each operation, and the sizes of the images that it meets."""


def resolved_parameters() -> dict[str, Any]:
    """For each operation: what (seed, sample key, view) resolve to."""
    found = {}
    for name, (arguments, sizes) in OPERATIONS.items():
        for seed in (0, 2**64 - 1):
            recipe = open_recipe(ViewSpec.model_validate({"recipe": [{"center_crop": {"size": 1}}, {name: arguments}], "seed": seed}))
            (_, operation) = recipe.operations
            for view in (0, 1, 2**32 - 2):
                for key in ("digits/0000", "n01440764/é 1.JPEG"):
                    words = Words(key_digests([key] * len(sizes)), view, 1, seed)
                    params = operation.draw(words, np.array(sizes)).tolist()
                    outputs = operation.output_sizes(np.array(sizes)).tolist()
                    found[f"{name}|{seed}|{view}|{key}"] = {"params": params, "outputs": outputs}
    return found


RECIPES: dict[str, list[dict[str, Any]]] = {
    "cifar": [{"pad_crop": {"size": 32, "padding_mode": "reflect"}}, {"horizontal_flip": {}}, {"random_erasing": {"value": [9, 8, 7]}}],
    "integer": [{"random_resized_crop": {"size": [24, 28], "kernel": "integer"}}, {"horizontal_flip": {}}, {"mixup": {"alpha": 0.2}}],
    "nearest": [{"resize": {"size": 40, "interpolation": "nearest"}}, {"center_crop": {"size": 36}}, {"cutmix": {}}],
    "rand": [{"pad_crop": {"size": 32}}, {"rand_augment": {"num_ops": 1, "magnitude": 14}}],
    "augmented": [{"color_jitter": {"brightness": 0.5}}, {"trivial_augment": {}}, {"pad_crop": {"size": 30}}],
}
"""Whole recipes whose pixels are the same on any machine (integers, copies, and float arithmetic that does not fuse)."""


def rendered_views() -> dict[str, Any]:
    """For each recipe: (seed, sample key, view) to parameters and pixel digest."""
    keys = [f"n01440764/é {number}.JPEG" for number in range(6)]
    digests = key_digests(keys)
    ramp = np.arange(3 * 32 * 32).reshape(3, 32, 32)
    images = [torch.from_numpy(((ramp * (2 * number + 3) >> 3) % 256).astype(np.uint8)) for number in range(6)]
    found = {}
    for name, steps in RECIPES.items():
        for seed in (0, 2**64 - 1):
            recipe = open_recipe(ViewSpec.model_validate({"recipe": steps, "seed": seed}))
            for view in (0, 2**32 - 2):
                views = render_views(recipe, images, digests, view, Pool(digests, images.__getitem__))
                for key, params, digest in zip(keys, views.params_BP.tolist(), views.digests().tolist(), strict=True):
                    found[f"{name}|{seed}|{view}|{key}"] = {"params": params, "digest": f"{digest:016x}"}
    return found


def main() -> None:
    for name in CACHES:
        path = HERE / name
        shutil.rmtree(path, ignore_errors=True)
        tc.build(golden_spec(name, path), executor="serial")
        cache = tc.open(path)
        np.savez(HERE / f"{name}.npz", **stored(cache))
        text = json.dumps({"keys": list(cache.samples.keys), "labels": cache.labels.tolist(), "content": cache.samples.content.tolist(), "identity": cache.manifest.first.identity.model_dump()}, indent=1)
        (HERE / f"{name}.json").write_text(text + "\n")
    freeze()


def freeze() -> None:
    """Parameters and views: `python -c 'import regenerate; regenerate.freeze()'` adds what a new operation gives."""
    (HERE / "parameters.json").write_text(json.dumps(resolved_parameters(), indent=0) + "\n")
    (HERE / "views.json").write_text(json.dumps(rendered_views(), indent=0) + "\n")


if __name__ == "__main__":
    main()
