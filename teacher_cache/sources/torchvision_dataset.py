"""Any class of `torchvision.datasets` whose items are (image, label)."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torchvision
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.errors import SourceError
from teacher_cache.sources.base import Channels, Item, array_item, decoding, pixels_of, require_bytes


class TorchvisionDataset:
    """Images are PIL images or uint8 arrays; labels come from `targets`, `labels` or `_labels`.

    A key is the class's name, its constructor arguments without paths, and the index.
    """

    def __init__(self, dataset: str, arguments: dict[str, Any], channels: Channels = None) -> None:
        self.channels = channels
        kind = getattr(torchvision.datasets, dataset, None)
        if kind is None:
            raise SourceError("source.dataset", "is not in torchvision.datasets", dataset, "Check its spelling.")
        # torchvision's own loader makes everything RGB, and 16 bits white.
        own = {"loader": _load} if "loader" in inspect.signature(kind).parameters else {}
        try:
            self._data = kind(**{**own, **arguments})
        except (RuntimeError, TypeError, OSError, ValueError) as error:
            hint = f"Its constructor said: {error}"
            raise SourceError("source.arguments", f"do not open {dataset}", arguments, hint) from error
        plain = {key: value for key, value in sorted(arguments.items()) if key not in ("root", "download")}
        stem = "/".join([dataset, *(f"{key}={value}" for key, value in plain.items())])
        self.keys = [f"{stem}/{index}" for index in range(len(self._data))]
        self.labels = _labels(self._data)
        names = getattr(self._data, "classes", None)
        self.class_names = tuple(str(name) for name in names) if names else None
        self.sizes: NDArray[np.int64] = np.zeros(len(self.keys), np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, index: int) -> Item:
        """One image of the data set, as uint8."""
        try:
            with decoding():
                image = self._data[index][0]
        except OSError as error:
            hint = "Put the data set back, or check the mount; then run the same command again."
            raise SourceError(self.keys[index], "must be readable, as when it was opened", error, hint) from error
        array = pixels_of(image, self.channels) if isinstance(image, Image.Image) else np.asarray(image)
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            hint = "Do not pass a `transform` that makes tensors."
            raise SourceError("source.dataset", "must give uint8 images", f"{array.dtype} {array.shape}", hint)
        return array_item(array)


def _load(path: str) -> Image.Image:
    with Image.open(path) as image:
        require_bytes(image)
        return image.convert("RGB")


def _labels(data: Any) -> NDArray[np.int64] | None:
    for name in ("targets", "labels", "_labels"):
        values = getattr(data, name, None)
        if values is not None and len(values) == len(data):
            return np.asarray(values).astype(np.int64)
    return None
