"""Views of rows as a build makes them, whether or not a cache holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.loader import ViewLoader
from teacher_cache.reader import Cache
from teacher_cache.views.digest import as_unsigned, pixel_digests


@dataclass(frozen=True)
class Rendered:
    """Views of some rows, as a build makes them."""

    rows: NDArray[np.int64]
    """Those that could be decoded, in the order asked for."""
    views_BCHW: Tensor
    """uint8, one for each of them."""
    digests: NDArray[np.uint64]
    broken: frozenset[int]
    """The rows that could not."""


def render(
    cache: Cache | None,
    loader: ViewLoader,
    stops: Sequence[int],
    view: int,
    rows: Sequence[int],
    shape: tuple[int, int, int],
) -> Rendered:
    """Those that a cache knows, from its stored parameters; the others as the recipe draws them.

    Args:
        cache: None where there is none.
        loader: reads the data set, with the cache's tombstones.
        stops: the row after the last of each segment.
        view: its number.
        rows: numbers of samples.
        shape: (C, H, W) of a view.

    Raises:
        ViewMismatch: a view cannot be made again as the teacher saw it.
        MismatchError: a sample's bytes have changed since.
    """
    decoded = loader.decode(rows)
    pixels_BCHW = torch.zeros((len(decoded.rows), *shape), dtype=torch.uint8)
    known = np.zeros(len(decoded.rows), np.bool_)
    if cache is not None and (there := cache.proves(view, decoded.rows)).any():
        known, here = there, decoded.at(np.flatnonzero(there))
        views = cache.render_views(view, here)
        cache.check_views(view, here.rows, views)
        pixels_BCHW[known] = views.pixels_BCHW
    segments = np.where(known, -1, np.searchsorted(stops, decoded.rows, side="right"))
    # Partners of a mixed view come from the rows that were there when the row's own segment came.
    for segment in np.unique(segments[~known]):
        places = np.flatnonzero(segments == segment)
        pixels_BCHW[places] = loader.views(decoded.at(places), view).pixels_BCHW
    broken = frozenset(row for row, _ in decoded.broken)
    return Rendered(decoded.rows, pixels_BCHW, as_unsigned(pixel_digests(pixels_BCHW)), broken)
