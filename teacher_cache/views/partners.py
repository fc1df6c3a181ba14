"""Who a sample is mixed with: chosen from the whole plan by the sample's own address.

The samples are ranked by their key digests, so that neither the order of a source nor a batch decides anything;
only the set of keys does, and the cache's sample table records it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.errors import MismatchError
from teacher_cache.views.philox import below

Decode = Callable[[int], Tensor | None]
"""Row number to the decoded uint8 image [C, H, W]; None where the sample cannot be decoded."""


@dataclass(frozen=True)
class Partners:
    """One partner for each sample of a batch."""

    digests_B: NDArray[np.uint64]
    images: list[Tensor]


class Pool:
    """The samples that the plan covers. As safe to share as `decode` is."""

    def __init__(self, digests_N: NDArray[np.uint64], decode: Decode) -> None:
        """Ranks the samples.

        Args:
            digests_N: key digests by row number.
            decode: fetches a row's image.
        """
        self._rows = np.argsort(digests_N)
        self._ranked = digests_N[self._rows]
        self._decode = decode

    def choose(self, words_B4: NDArray[np.uint32], digests_B: NDArray[np.uint64]) -> Partners:
        """Another sample for each sample, all others being equally likely.

        A sample that cannot be decoded is no partner: the next one by rank takes its place.

        Args:
            words_B4: block 0 of the mixing operation; word 0 is used.
            digests_B: the samples that want a partner; members of the plan.
        """
        count = len(self._ranked)
        own = np.searchsorted(self._ranked, digests_B)
        steps = 1 + below(words_B4[:, 0], count - 1) if count > 1 else np.zeros(len(digests_B), np.int64)
        found = [self._next(int(rank)) for rank in (own + steps) % count]
        digests = self._ranked[[rank for rank, _ in found]]
        return Partners(digests, [image for _, image in found])

    def _next(self, rank: int) -> tuple[int, Tensor]:
        """The first sample from `rank` on that can be decoded; the asking sample itself is one, in the worst case."""
        for _ in range(len(self._ranked)):
            image = self._decode(int(self._rows[rank]))
            if image is not None:
                return rank, image
            rank = (rank + 1) % len(self._ranked)
        raise AssertionError("a sample that was decoded wants a partner, so the plan holds one that can be")

    def rows(self, digests_B: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The row numbers of partners.

        Raises:
            MismatchError: a digest belongs to no sample of the plan.
        """
        ranks = np.minimum(np.searchsorted(self._ranked, digests_B), len(self._ranked) - 1)
        strange = self._ranked[ranks] != digests_B
        if strange.any():
            hint = "The cache was built over another set of samples: restore the data set."
            raise MismatchError("partner", "must be a sample of the plan", f"{digests_B[strange][0]:016x}", hint)
        return self._rows[ranks]

    def images(self, digests_B: NDArray[np.uint64]) -> list[Tensor]:
        """The images of partners that were chosen before.

        Raises:
            MismatchError: one of them is unknown or cannot be decoded any more.
        """
        images = []
        for digest, row in zip(digests_B, self.rows(digests_B), strict=True):
            image = self._decode(int(row))
            if image is None:
                hint = "It could be decoded when the view was made: restore the data set."
                raise MismatchError("partner", "must be decodable", f"{digest:016x}", hint)
            images.append(image)
        return images
