"""Images a second of a Ray build, against the bare model loop over pre-decoded batches, in one run.

    python tests/benchmarks/bench_build.py CONFIG [--set KEY=VALUE …] [--json]

The limit is the same model on the same cores with the pixels already in memory: one process for each worker of
the build, each with as many threads. The build decodes, renders, digests, encodes, writes, fsyncs and commits
besides, in the same processes. Also prints the bytes of a row for dense and top-k, Zarr and Parquet.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from toy_builds import committed

import teacher_cache as tc
from teacher_cache.plan import first_views, open_parts, worker_count
from teacher_cache.spec import BuildSpec, parse, read_yaml


def bare_loop(spec: BuildSpec, seconds: float) -> tuple[int, float]:
    """Forward passes over batches that are already tensors; (images, seconds) after one warm-up pass."""
    torch.set_num_threads(spec.compute.threads)
    opened = open_parts(spec)
    _, views = first_views(opened, spec.teacher.micro_batch)
    opened.teacher(views.pixels_BCHW)
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for value in opened.teacher(views.pixels_BCHW).values():
            value.cpu()
        images += len(views.pixels_BCHW)
    return images, time.perf_counter() - started


def bare_rate(spec: BuildSpec, seconds: float) -> float:
    """Images a second of as many bare loops, side by side, as the build has workers."""
    count = worker_count(spec.compute)
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        found = pool.starmap(bare_loop, [(spec, seconds)] * count)
    return sum(images / elapsed for images, elapsed in found)


def build_rates(spec: BuildSpec, folder: Path) -> dict[str, float]:
    """Images a second of a whole build, and from its first commit to its last (without starting Ray)."""
    times: list[tuple[float, int]] = []
    # One view of a decoding: commits that come in bursts would count rows that were made before the first of them.
    compute = spec.compute.model_copy(update={"views_per_decode": 1})
    built = spec.model_copy(update={"cache": str(folder / "cache"), "compute": compute})
    report = tc.build(built, "ray", lambda done, total, new: times.append((time.perf_counter(), new)))
    commits = [(moment, rows) for moment, rows in times if rows]
    (first, before), (last, after) = commits[0], commits[-1]
    return {"whole": report.rows_per_second, "steady": (after - before) / (last - first), "rows": report.rows_built}


def bytes_per_row(data: dict[str, Any], folder: Path) -> dict[str, float]:
    """Stored bytes of a row's logits in each store and encoding, frames, footers and checksums included."""
    found = {}
    for store in ("zarr", "parquet"):
        for name, encoding in {"dense_f16": {"kind": "dense_f16"}, "top_k (k=3)": {"kind": "top_k", "k": 3}}.items():
            path = folder / f"{store}-{encoding['kind']}"
            small = {**data, "cache": str(path), "store": {**data.get("store", {}), "kind": store}}
            small["source"] = {**data["source"], "take": {"count": 2048}}
            small["views"] = {**data["views"], "count": 1}
            small["teacher"] = {**data["teacher"], "fields": {"logits": {"encoding": encoding}}}
            tc.build(parse(BuildSpec, small, "the benchmark"), "serial")
            cache = tc.open(path)
            sizes = [r.size for files in committed(cache).values() for r in files.values() if "/logits/" in r.path]
            found[f"{store} {name}"] = sum(sizes) / len(cache)
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--seconds", type=float, default=20, help="of each bare loop")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    data = read_yaml(arguments.config, arguments.overrides)
    spec = parse(BuildSpec, data, arguments.config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Before and after: what the machine's speed drifts by is seen, and the mean stands between.
        before = bare_rate(spec, arguments.seconds)
        rates = build_rates(spec, folder)
        after = bare_rate(spec, arguments.seconds)
        bare = (before + after) / 2
        result = {
            "machine": f"{platform.machine()}, {worker_count(spec.compute)} workers × {spec.compute.threads} threads",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "bare loop, images/s": [round(before, 1), round(after, 1)],
            "build, images/s": {key: round(value, 1) for key, value in rates.items()},
            "build / bare, steady": round(rates["steady"] / bare, 3),
            "build / bare, whole": round(rates["whole"] / bare, 3),
            "bytes per row": {key: round(value, 2) for key, value in bytes_per_row(data, folder).items()},
        }
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        for key, value in result.items():
            print(f"{key:26} {value}")


if __name__ == "__main__":
    main()
