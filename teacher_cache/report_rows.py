"""What the report shows of single rows: a sample, its soft targets' shape, and a gallery of views."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from teacher_cache.encodings import SparseTarget, Target
from teacher_cache.fingerprint import key_digests
from teacher_cache.reader import Cache
from teacher_cache.views.philox import below, view_words

TEMPERATURES = (1, 4)
LARGEST_K = 20
_BATCH = 256
_BARS = 3
_PIXELS = 128
_ADDRESS = 2**16 - 2


@dataclass(frozen=True)
class Picks:
    """Seeded rows that have data in some committed view; the same ones whatever order the source has."""

    rows: NDArray[np.int64]
    views: NDArray[np.int64]
    """One committed view of each row."""


@dataclass(frozen=True)
class SoftTargets:
    """The shape of the teacher's distributions over a sample of S rows."""

    classes: int
    kept: int
    """How many classes the encoding keeps by name; the others share their mass evenly."""
    entropies: dict[int, NDArray[np.float64]]
    """By temperature: nats, [S]."""
    mass_SK: NDArray[np.float64]
    """Mass of the 1, 2, … K largest classes at T = 1."""


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


def committed_views(cache: Cache) -> NDArray[np.bool_]:
    """Which shard is committed in which view, [shards, views]."""
    found = np.zeros((cache.manifest.grid.shards, cache.views), np.bool_)
    for view, shard in cache.files:
        found[shard, view] = True
    return found


def pick(cache: Cache, count: int) -> Picks:
    """Up to `count` distinct rows, those with the smallest Philox words, each with one of its views."""
    committed = committed_views(cache)
    shard_N = np.arange(len(cache)) // cache.manifest.grid.shard_rows
    views_N = committed.sum(1)[shard_N]
    words_N4 = view_words(key_digests(cache.samples.keys), 0, _ADDRESS, 1, 0)
    eligible = np.flatnonzero(cache.alive & (views_N > 0))
    rows = eligible[np.argsort(words_N4[eligible, 0], kind="stable")[:count]]
    places = below(words_N4[rows, 1], views_N[rows])
    views = [int(np.flatnonzero(committed[shard_N[row]])[k]) for row, k in zip(rows, places, strict=True)]
    return Picks(rows, np.array(views, np.int64))


def measure(cache: Cache, picks: Picks) -> SoftTargets | None:
    """Entropy at each temperature and top-k mass of the picked rows; None where there are none to measure."""
    if "logits" not in cache.fields or len(picks.rows) == 0:
        return None
    classes = cache.manifest.field_shapes["logits"][0]
    entropies: dict[int, list[Tensor]] = {temperature: [] for temperature in TEMPERATURES}
    masses, kept = [], classes
    for target in _targets(cache, picks):
        kept = _kept(target, classes)
        for temperature, found in entropies.items():
            found.append(torch.special.entr(target.log_probs(temperature).double().exp()).sum(1))
        probs_BC = target.log_probs(1).double().exp()
        masses.append(probs_BC.topk(min(classes, LARGEST_K), dim=1).values.cumsum(1))
    return SoftTargets(
        classes,
        kept,
        {temperature: torch.cat(found).numpy() for temperature, found in entropies.items()},
        torch.cat(masses).numpy(),
    )


def _targets(cache: Cache, picks: Picks) -> list[Target]:
    targets = []
    for view in np.unique(picks.views).tolist():
        rows = np.sort(picks.rows[picks.views == view])
        targets += [
            cache.read("logits", view, rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)
        ]
    return targets


def _kept(target: Target, classes: int) -> int:
    return target.values_BK.shape[1] if isinstance(target, SparseTarget) else classes


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
    committed = committed_views(cache)
    shard_rows = cache.manifest.grid.shard_rows
    shown = {row: np.flatnonzero(committed[row // shard_rows])[:views].tolist() for row in rows}
    pictures: dict[int, list[Picture]] = {row: [] for row in rows}
    for view in sorted({view for some in shown.values() for view in some}):
        wanted = [row for row in rows if view in shown[row]]
        bars = _bars(cache, view, wanted)
        for row, image_CHW, top in zip(wanted, cache.render(view, wanted), bars, strict=True):
            pictures[row].append(Picture(view, _png(image_CHW), top))
    labels = cache.labels
    return [
        GalleryRow(
            cache.samples.keys[row],
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
    if "logits" not in cache.fields:
        return [()] * len(rows)
    target, labels = cache.read("logits", view, rows), cache.labels
    # A stable sort: `topk` leaves the order of equal probabilities open.
    probs_BC, order_BC = target.log_probs(1).double().exp().sort(dim=1, descending=True, stable=True)
    count = min(_BARS, _kept(target, probs_BC.shape[1]))
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
    # A view of ImageNet's size would make the page some megabytes heavier than anybody can see.
    image.thumbnail((_PIXELS, _PIXELS))
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
