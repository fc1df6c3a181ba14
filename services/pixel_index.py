"""Where in a cache an image is, by its pixels: 64-bit digests sorted once, and looked up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.reader import Cache
from teacher_cache.views.digest import as_unsigned, pixel_digests


class Place(NamedTuple):
    """A view of a sample."""

    row: int
    view: int


class PixelIndex:
    """16 bytes for each committed view of each sample.

    A digest is no proof: whoever finds a place compares the pixels.
    """

    def __init__(self, cache: Cache) -> None:
        """Reads the digests of everything that is committed.

        Raises:
            CorruptionError: a stored digest is not what was committed.
        """
        found = list(_committed(cache))
        digests = np.concatenate([part for part, _ in found] or [np.empty(0, np.uint64)])
        # Stable: of equal views the first one is given, whichever it is today and tomorrow.
        order = np.argsort(digests, kind="stable")
        self._rows = len(cache)
        self._digests = digests[order]
        self._places = np.concatenate([part for _, part in found] or [np.empty(0, np.int64)])[order]

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, images_BCHW: Tensor) -> list[Place | None]:
        """Where each image may be, uint8 [B, C, H, W]."""
        asked_B = as_unsigned(pixel_digests(images_BCHW))
        first_B = np.searchsorted(self._digests, asked_B)
        return [self._at(int(place), digest) for place, digest in zip(first_B, asked_B, strict=True)]

    def _at(self, place: int, digest: np.uint64) -> Place | None:
        if place == len(self._digests) or self._digests[place] != digest:
            return None
        view, row = divmod(int(self._places[place]), self._rows)
        return Place(row, view)


def _committed(cache: Cache) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """Digests and places, view by view; a place is view × rows + row."""
    everything = np.arange(len(cache))
    for view in range(cache.views):
        rows = everything[cache.proves(view, everything)]
        yield cache.digests(view, rows), view * len(cache) + rows
