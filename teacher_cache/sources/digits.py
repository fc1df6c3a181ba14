"""scikit-learn's digits: 1,797 real images of 8×8 that need no download."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SourceError
from teacher_cache.sources.base import Item, array_item

_TEST_EVERY = 3


class Digits:
    """Greyscale 8×8; every third image is the test split. Pixels 0..16 are scaled to 0..255."""

    channels = None

    def __init__(self, split: Literal["train", "test", "all"]) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            hint = "Install the extra: pip install 'teacher-cache[digits]'."
            raise SourceError("source.kind", "`digits` needs scikit-learn", error, hint) from error
        data = load_digits()
        rows = np.arange(len(data.target))
        test = rows % _TEST_EVERY == 0
        self._rows = rows[{"train": ~test, "test": test, "all": rows >= 0}[split]]
        self._images: NDArray[np.uint8] = np.rint(data.images * (255 / 16)).astype(np.uint8)
        self.keys = [f"digits/{row:04d}" for row in self._rows]
        self.labels: NDArray[np.int64] = data.target[self._rows].astype(np.int64)
        self.class_names = tuple(str(name) for name in data.target_names)
        self.sizes: NDArray[np.int64] = np.full(len(self._rows), 64, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Item:
        """One 8×8 image."""
        return array_item(self._images[self._rows[index]])
