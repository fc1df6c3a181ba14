"""The rows that the report looks at: a seeded sample, and the shape of its soft targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings import SparseTarget, Target
from teacher_cache.reader import Cache
from teacher_cache.views.philox import below, view_words

TEMPERATURES = (1, 4)
LARGEST_K = 20
_BATCH = 256
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


def committed_rows(cache: Cache) -> NDArray[np.bool_]:
    """Which rows are committed in which view, for the first field that there is, [N, views]."""
    found = np.zeros((len(cache), cache.views), np.bool_)
    for index in cache.indices:
        if index.addition in cache.additions_of(cache.fields[0]):
            for view, shard in index.places():
                found[slice(*index.addition.span(shard)), view] = True
    return found


def pick(cache: Cache, count: int) -> Picks:
    """Up to `count` distinct rows, those with the smallest Philox words, each with one of its views."""
    committed = committed_rows(cache)
    views_N = committed.sum(1)
    words_N4 = view_words(cache.key_digests, 0, _ADDRESS, 1, 0)
    eligible = np.flatnonzero(cache.alive & (views_N > 0))
    rows = eligible[np.argsort(words_N4[eligible, 0], kind="stable")[:count]]
    places = below(words_N4[rows, 1], views_N[rows])
    views = [int(np.flatnonzero(committed[row])[k]) for row, k in zip(rows, places, strict=True)]
    return Picks(rows, np.array(views, np.int64))


def measure(cache: Cache, picks: Picks) -> SoftTargets | None:
    """Entropy at each temperature and top-k mass of the picked rows; None where there are none to measure."""
    if "logits" not in cache.fields or len(picks.rows) == 0:
        return None
    if cache.encoding_of("logits").name == "sampled_k":
        # Entropy and mass of one draw are the draw's, not the teacher's.
        return None
    classes = cache.shape_of("logits")[-1]
    entropies: dict[int, list[Tensor]] = {temperature: [] for temperature in TEMPERATURES}
    masses, kept = [], classes
    for target in (each.flat() for each in _targets(cache, picks)):
        kept = kept_classes(target, classes)
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
        targets += [cache.read("logits", view, rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]
    return targets


def kept_classes(target: Target, classes: int) -> int:
    """How many classes a target names; the others share their mass evenly."""
    return target.values_BK.shape[-1] if isinstance(target, SparseTarget) else classes
