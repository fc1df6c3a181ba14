"""The report's gallery: views rendered again, compared with what the teacher saw, and the teacher's answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from teacher_cache.reader import Cache
from teacher_cache.report_rows import committed_rows, kept_classes

MAX_PIXELS = 128
"""Longer sides are shrunk: at ImageNet's size the page would grow by megabytes that nobody can see."""
_BARS = 3


@dataclass(frozen=True)
class Bar:
    """One of a teacher's most likely classes."""

    name: str
    percent: float
    is_label: bool


@dataclass(frozen=True)
class Picture:
    """One view as the teacher saw it."""

    view: int
    png: str
    """Base64."""
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class GalleryRow:
    """One sample and some of its views."""

    key: str
    label: str | None
    pictures: tuple[Picture, ...]


def gallery(cache: Cache, rows: Sequence[int], views: int) -> list[GalleryRow]:
    """The first committed views of some rows, each compared with the digest of what the teacher saw.

    Args:
        cache: where from.
        rows: row numbers, alive.
        views: at most this many of each row.

    Raises:
        SourceError: the data set cannot be opened.
        MismatchError: the data set or the rendered views are not those that the teacher saw.
    """
    committed = committed_rows(cache)
    shown = {row: np.flatnonzero(committed[row])[:views].tolist() for row in rows}
    pictures: dict[int, list[Picture]] = {row: [] for row in rows}
    for view in sorted({view for some in shown.values() for view in some}):
        wanted = [row for row in rows if view in shown[row]]
        bars = _bars(cache, view, wanted)
        for row, image_CHW, top in zip(wanted, cache.render(view, wanted), bars, strict=True):
            pictures[row].append(Picture(view, _png(image_CHW), top))
    labels = cache.labels
    return [
        GalleryRow(
            cache.samples.key(row),
            None if labels is None else class_name(cache, int(labels[row])),
            tuple(pictures[row]),
        )
        for row in rows
    ]


def class_name(cache: Cache, number: int) -> str:
    """A class's name, or `class 7` where the cache has no names."""
    names = cache.manifest.class_names
    return f"class {number}" if names is None else names[number]


def _bars(cache: Cache, view: int, rows: list[int]) -> list[tuple[Bar, ...]]:
    # A sequence has too many distributions to draw one beside each view.
    if "logits" not in cache.fields or len(cache.shape_of("logits")) != 1:
        return [()] * len(rows)
    target, labels = cache.read("logits", view, rows), cache.labels
    # A stable sort: `topk` leaves the order of equal probabilities open.
    probs_BC, order_BC = target.log_probs(target.drawn_at or 1).double().exp().sort(dim=1, descending=True, stable=True)
    count = min(_BARS, kept_classes(target, probs_BC.shape[1]))
    return [
        tuple(
            Bar(class_name(cache, c), 100 * p, labels is not None and int(labels[row]) == c)
            for p, c in zip(probs[:count].tolist(), order[:count].tolist(), strict=True)
        )
        for row, probs, order in zip(rows, probs_BC, order_BC, strict=True)
    ]


def _png(image_CHW: Tensor) -> str:
    """Greyscale or RGB as PNG; with another number of channels, the first one only."""
    array = image_CHW.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array if array.shape[2] == 3 else np.ascontiguousarray(array[:, :, 0]))
    image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
