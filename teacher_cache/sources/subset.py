"""A seeded subset of a source, chosen by identity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SourceError
from teacher_cache.fingerprint import key_digests
from teacher_cache.sources.base import Item, Source
from teacher_cache.spec import TakeSpec
from teacher_cache.views.philox import view_words


class Subset:
    """The `count` samples whose Philox words come first, in the source's own order."""

    def __init__(self, source: Source, take: TakeSpec) -> None:
        if take.count > len(source):
            raise SourceError("source.take.count", f"must be at most {len(source)}", take.count, "Take fewer.")
        # An address that no view has (view numbers stay below 2³² − 1): with one seed for both, samples chosen
        # for their small words would all be cropped at the top in view 0.
        words = view_words(key_digests(source.keys), 2**32 - 1, 0, 1, take.seed)
        rank = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1]
        self._source = source
        self._rows = np.sort(np.argsort(rank, kind="stable")[: take.count])
        self.keys = [source.keys[row] for row in self._rows]
        self.labels: NDArray[np.int64] | None = None if source.labels is None else source.labels[self._rows]
        self.class_names = source.class_names
        self.channels = source.channels
        self.sizes: NDArray[np.int64] = source.sizes[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Item:
        """The item of the source that stands at this place of the subset."""
        return self._source.item(int(self._rows[index]))
