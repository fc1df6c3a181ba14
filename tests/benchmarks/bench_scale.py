"""What size costs: a simulated cache of 14 million samples × 90 views × 2 teachers, and the memory of real builds.

    python tests/benchmarks/bench_scale.py structure [--rows 14000000] [--views 90] [--json]
    python tests/benchmarks/bench_scale.py memory [--rows 10000 100000 1000000] [--json]

`structure` writes real tables and a real manifest, shards at the two ends only, and, of an addition that is being
built, empty receipts: whoever looks for what is left reads their names. `memory` builds over made-up 8×8 images with
a tiny teacher, each size in a process of its own. Memory is the peak that a process needs beyond what importing this
package takes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from simulated import Size, simulate
from toy_builds import toy_spec, write_arrays

import teacher_cache as tc
import teacher_cache.build
from teacher_cache.left import what_is_left
from teacher_cache.manifest import read_manifest
from teacher_cache.storage.local_root import LocalRoot


def resident() -> float:
    """Memory of this process that no file stands behind, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, and the peak of memory beyond what was there before, sampled a hundred times a second."""
    before, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    peak[0] = max(peak[0], resident())
    done.set()
    thread.join()
    return {"seconds": seconds, "MB": peak[0] - before}


def open_and_read(path: Path) -> dict[str, dict[str, float]]:
    """Opening, then the first row of the first view and the last of the last, each for the first time."""
    opened: list[tc.Cache] = []
    found = {"open": measured(lambda: opened.append(tc.open(path)))}
    cache = opened[0]
    first, last = (0, 0), (cache.views - 1, len(cache) - 1)
    cache.read("logits", 0, [len(cache) - 1])
    for name, (view, row) in {"first row": first, "last row": last}.items():
        fresh = tc.open(path)
        found[name] = measured(lambda: fresh.read("logits", view, [row]))  # noqa: B023 - called at once
        found[f"key of the {name}"] = measured(lambda: fresh.samples.key(row))  # noqa: B023 - called at once
    return found


def plan(path: Path) -> dict[str, dict[str, float]]:
    """What of the second teacher's answers is left."""
    root = LocalRoot(path)
    return {"plan what is left": measured(lambda: what_is_left(root, read_manifest(root).additions[-1], 1))}


def status(path: Path) -> dict[str, dict[str, float]]:
    """How much of both is committed."""

    def count() -> int:
        return sum(int(index.shards(view).sum()) for index in tc.open(path).indices for view in index.views)

    return {"count what is committed": measured(count)}


def build(path: Path) -> dict[str, dict[str, float]]:
    """A serial build, one view."""
    spec = toy_spec(
        path / "cache",
        path,
        views={"recipe": [{"horizontal_flip": {}}], "count": 1, "seed": 1},
        teacher={"model": "toy_models:PixelSums", "micro_batch": 256, "fields": {"logits": {"encoding": "dense_f16"}}},
        store={"kind": "zarr", "shard_rows": 4096, "chunk_rows": 512},
    )
    return {"build": measured(lambda: tc.build(spec, "serial"))}


STEPS = {"open": open_and_read, "plan": plan, "status": status, "build": build}


def in_a_process(step: str, path: Path) -> dict[str, dict[str, float]]:
    """One step where nothing was done before."""
    command = [sys.executable, __file__, "step", step, str(path)]
    found: dict[str, dict[str, float]] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def structure(rows: int, views: int) -> dict[str, Any]:
    """A simulated cache, opened, read and planned."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        tc.build(toy_spec(path / "template", write_arrays(path / "arrays")), "serial")
        simulate(path / "cache", path / "template", Size(rows, views, 4096))
        found = {
            name: value
            for step in ("open", "plan", "status")
            for name, value in in_a_process(step, path / "cache").items()
        }
    return {f"{rows:,} samples × {views} views × 2 teachers": found}


def memory(sizes: list[int]) -> dict[str, Any]:
    """Builds of several sizes."""
    found = {}
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            random = np.random.Generator(np.random.Philox(1))
            images = np.lib.format.open_memmap(path / "images.npy", "w+", np.uint8, (rows, 8, 8))
            for first in range(0, rows, 2**16):
                images[first : first + 2**16] = random.integers(0, 250, (min(2**16, rows - first), 8, 8))
            images.flush()
            np.save(path / "labels.npy", np.arange(rows) % 10)
            found[f"{rows:,} samples"] = in_a_process("build", path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("structure")
    one.add_argument("--rows", type=int, default=14_000_000)
    one.add_argument("--views", type=int, default=90)
    several = commands.add_parser("memory")
    several.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    for command in (one, several):
        command.add_argument("--json", action="store_true")
    step = commands.add_parser("step")
    step.add_argument("name", choices=STEPS)
    step.add_argument("path", type=Path)
    options = parser.parse_args()
    if options.command == "step":
        print(json.dumps(STEPS[options.name](options.path)))
        return
    found = structure(options.rows, options.views) if options.command == "structure" else memory(options.rows)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    for place, steps in found.items():
        print(place)
        for name, figures in steps.items():
            print(f"  {name:28} {figures['seconds']:9.3f} s {figures['MB']:9.1f} MB")


if __name__ == "__main__":
    main()
