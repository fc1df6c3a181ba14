"""The report's plots: inline SVG whose colours are the page's CSS variables, so that they follow dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from teacher_cache.report_comparison import Comparison, Curve
from teacher_cache.report_rows import SoftTargets

COLOURS = 6
"""How many the style sheet has: --c0 … --c5, from Okabe and Ito's palette."""
_DASHES = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)))
# Placeholders: matplotlib knows no CSS variables, so these stand for them until the SVG is written.
_INK, _GRID = "#010101", "#020202"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


@dataclass(frozen=True)
class Plot:
    """A figure of the page."""

    title: str
    svg: Markup
    caption: str
    legend: tuple[tuple[int, int, str], ...] = ()
    """(colour, dashes, name): the page's own text, so that any name can be read at any size."""


def colour(number: int) -> str:
    """The placeholder of a series' colour."""
    return f"#1000{number % COLOURS}0"


def dashes(number: int) -> int:
    """A second mark beside the colour, for those who cannot tell colours apart and for a seventh series."""
    return number % len(_DASHES)


def entropy_plot(soft: SoftTargets) -> Plot:
    """Histogram of the soft targets' entropy at each temperature, on one scale from 0 to ln C."""
    top = math.log(soft.classes)
    edges = np.linspace(0, top * 1.001 if top else 1.0, 41)

    def draw(axes: Any) -> None:
        for number, entropy_S in enumerate(soft.entropies.values()):
            shares = 100 * np.histogram(np.clip(entropy_S, 0, edges[-1]), edges)[0] / len(entropy_S)
            axes.stairs(shares, edges, fill=True, color=colour(number), alpha=0.3, linewidth=0)
            axes.stairs(shares, edges, color=colour(number), linewidth=1.4, linestyle=_DASHES[number])
        axes.set(xlabel="entropy (nats)", ylabel="share of rows (%)", xlim=(0, edges[-1]), ylim=(0, None))

    means = ", ".join(f"{value.mean():.3f} at T={t}" for t, value in soft.entropies.items())
    caption = (
        f"Over {len(soft.mass_SK):,} rows. Mean entropy in nats: {means}. "
        f"An even distribution over {soft.classes:,} classes has ln {soft.classes} = {top:.3f}, the right edge."
    )
    legend = tuple((number, number, f"T={t}") for number, t in enumerate(soft.entropies))
    return Plot("Entropy of the soft targets", _svg("entropy", draw), caption, legend)


def mass_plot(soft: SoftTargets) -> Plot:
    """Mean mass in the k largest classes at T = 1, with the 10 and 90 % quantiles."""
    mean_K = 100 * soft.mass_SK.mean(0)
    low_K, high_K = 100 * np.quantile(soft.mass_SK, (0.1, 0.9), axis=0)
    ks = np.arange(1, len(mean_K) + 1)
    legend = [(0, 0, "mean"), (0, 3, "10 to 90 % of the rows")]
    cut = soft.kept < soft.classes and soft.kept <= len(ks)

    def draw(axes: Any) -> None:
        axes.fill_between(ks, low_K, high_K, color=colour(0), alpha=0.25, linewidth=0)
        axes.plot(ks, mean_K, color=colour(0), marker="o", markersize=3, linewidth=1.4)
        if cut:
            axes.axvline(soft.kept, color=colour(1), linewidth=1.2, linestyle=_DASHES[1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        limits = {"xlim": (0.5, len(ks) + 0.5), "ylim": (None, 101)}
        axes.set(xlabel="k largest classes", ylabel="mass at T = 1 (%)", **limits)

    shown = sorted({k for k in (1, 3, 5, 10, soft.kept) if k <= len(ks) and (k == 1 or k < soft.classes)})
    figures = ", ".join(f"{mean_K[k - 1]:.2f} % for k = {k}" for k in shown)
    caption = f"Over {len(soft.mass_SK):,} rows. Mean mass: {figures}."
    if cut:
        legend.append((1, 1, f"k = {soft.kept}: kept by the encoding"))
        caption += f" Beyond k = {soft.kept} the curve spreads the kept tail mass evenly over the other classes."
    return Plot("Mass in the largest classes", _svg("mass", draw), caption, tuple(legend))


def training_plots(comparison: Comparison) -> list[Plot]:
    """Accuracy and loss per epoch for every arm; a curve that nobody recorded is left out."""
    held_out = any(arm.curve("validation_accuracy") is not None for arm in comparison.arms.values())
    wanted = (
        ("validation_accuracy", "Accuracy on held-out rows while training", "accuracy (%)", 100.0)
        if held_out
        else ("accuracy", "Accuracy while training", "accuracy (%)", 100.0),
        ("loss", "Loss while training", "training loss", 1.0),
    )
    plots = []
    for name, title, unit, scale in wanted:
        curves = [(number, arm, comparison.arms[arm].curve(name)) for number, arm in enumerate(comparison.arms)]
        drawn = [(number, arm, curve) for number, arm, curve in curves if curve is not None]
        if not drawn:
            continue
        ends = "; ".join(f"{arm} {scale * curve.mean[-1]:.4g}" for _, arm, curve in drawn)
        caption = f"Mean over seeds, with one standard deviation where there are several. At the end: {ends}."
        legend = tuple((number % COLOURS, dashes(number), arm) for number, arm, _ in drawn)
        plots.append(Plot(title, _curves_svg(name, drawn, unit, scale), caption, legend))
    return plots


def _curves_svg(name: str, drawn: Sequence[tuple[int, str, Curve]], unit: str, scale: float) -> Markup:
    def draw(axes: Any) -> None:
        for number, _, curve in drawn:
            mean, spread = scale * curve.mean, scale * curve.std
            look = {"color": colour(number), "linestyle": _DASHES[dashes(number)], "linewidth": 1.5}
            axes.fill_between(curve.epochs, mean - spread, mean + spread, color=colour(number), alpha=0.2, linewidth=0)
            axes.plot(curve.epochs, mean, marker="o" if len(mean) == 1 else None, **look)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel=unit)

    return _svg(name, draw)


def _svg(name: str, draw: Any) -> Markup:
    """Draws one pair of axes and returns an `<svg>` that may stand in a page beside others."""
    data = io.BytesIO()
    with matplotlib.rc_context():
        # The user's own matplotlibrc must not change the page.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        draw(figure.subplots())
        nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(data, format="svg", transparent=True, metadata=nothing)
    return Markup(_inline(data.getvalue().decode(), name))


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None, "matplotlib always writes one"
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Several figures share one page, so each id gets the figure's name.
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for placeholder, variable in _variables():
        body = body.replace(placeholder, variable)
    return f'<svg {view_box[0]} aria-hidden="true" focusable="false">{body}'


def _variables() -> Iterable[tuple[str, str]]:
    yield from ((colour(number), f"var(--c{number})") for number in range(COLOURS))
    yield from ((_INK, "var(--ink)"), (_GRID, "var(--grid)"))
