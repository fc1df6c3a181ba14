"""Images and labels in `.npy` files, read through a memory map."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SourceError
from teacher_cache.sources.base import Item, Numbered, array_item


class NumpyArrays:
    """uint8 images [N, H, W] or [N, H, W, C]; a key is the file's stem and the index."""

    channels = None

    def __init__(self, images: str, labels: str | None, class_names: tuple[str, ...] | None) -> None:
        self._images = _load("source.images", images, mmap=True)
        if self._images.dtype != np.uint8 or self._images.ndim not in (3, 4):
            found = f"{self._images.dtype} {self._images.shape}"
            hint = "Scale them to 0..255 and save as uint8: a view's pixels are bytes, and so is its digest."
            raise SourceError("source.images", "must be uint8 [N, H, W] or [N, H, W, C]", found, hint)
        self.labels: NDArray[np.int64] | None = None
        if labels is not None:
            given = _load("source.labels", labels, mmap=False)
            if given.dtype.kind not in "iu":
                raise SourceError("source.labels", "must be integers", given.dtype, "Save class numbers.")
            self.labels = given.astype(np.int64, copy=False)
            if self.labels.shape != (len(self._images),):
                rule = f"needs one label for each of {len(self._images)} images"
                raise SourceError("source.labels", rule, self.labels.shape, "Check the files belong together.")
        self.keys = Numbered(Path(images).stem, len(self._images))
        self.class_names = class_names
        # One number for all, seen N times.
        self.sizes: NDArray[np.int64] = np.broadcast_to(np.int64(math.prod(self._images.shape[1:])), len(self._images))

    def __len__(self) -> int:
        return len(self._images)

    def item(self, index: int) -> Item:
        """One image of the array."""
        return array_item(np.asarray(self._images[index]))


def _load(field: str, path: str, mmap: bool) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SourceError(field, "must be a readable .npy file", path, f"Check it: {error}") from error
    return array
