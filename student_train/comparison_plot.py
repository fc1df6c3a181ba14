"""A comparison as a picture: how each arm got there, and where every pair of seeds ended."""

from __future__ import annotations

import io
import statistics
from typing import TYPE_CHECKING

import numpy as np

from student_train.comparison import Comparison
from student_train.evaluate import MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which can be told apart by people who see few colours."""
_MARKERS = "osD^vPX"


def picture(comparison: Comparison) -> bytes:
    """A PNG: accuracy by epoch (mean and one standard deviation), and the end of every arm and seed.

    The thin lines of the right half join the students of one seed, which began with the same weights.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        # The user's own matplotlibrc must not change the picture.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
        wide = max(10.0, 6 + 0.7 * len(comparison.history))
        figure = Figure(figsize=(wide, 4), dpi=120, layout="constrained")
        curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_curves(curves, comparison)
        _draw_ends(ends, comparison)
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _draw_curves(axes: Axes, comparison: Comparison) -> None:
    from matplotlib.ticker import MaxNLocator

    measure = "validation_accuracy" if "validation_accuracy" in comparison.measures else "accuracy"
    for number, (arm, seeds) in enumerate(comparison.history.items()):
        values_SE = 100 * np.array([[entry[measure] for entry in history] for history in seeds])
        epochs = [entry["epoch"] for entry in seeds[0]]
        mean, spread = values_SE.mean(0), values_SE.std(0, ddof=1)
        colour, marker = _look(number)
        axes.plot(epochs, mean, color=colour, marker=marker, markersize=3, linewidth=1.2, label=arm)
        axes.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel=f"{MEASURES[measure].title} (%)", title="while training: mean ± std over seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_ends(axes: Axes, comparison: Comparison) -> None:
    arms = list(comparison.history)
    values_AS = 100 * np.array([comparison.values("accuracy", arm) for arm in arms])
    axes.plot(values_AS, color="#999999", linewidth=0.6, zorder=1)
    for number, values in enumerate(values_AS):
        colour, marker = _look(number)
        axes.scatter([number] * len(values), values, color=colour, marker=marker, s=22, zorder=2)
        axes.hlines(statistics.fmean(values), number - 0.25, number + 0.25, color=colour, linewidth=2)
    axes.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
    axes.set(ylabel="accuracy (%)", title="after the last epoch: every seed, and the mean")
    axes.grid(axis="y", alpha=0.3)


def _look(number: int) -> tuple[str, str]:
    # Of more arms than colours, those of one colour have other markers.
    return _COLOURS[number % len(_COLOURS)], _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)]
