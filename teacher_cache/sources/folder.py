"""A folder with one folder of images for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SourceError
from teacher_cache.sources.base import Channels, Item, decode_image

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Folder:
    """Class names are the folders' names, sorted; a key is the path below the root, with forward slashes."""

    def __init__(self, path: str, channels: Channels = None) -> None:
        self.channels = channels
        self._root = Path(path)
        if not self._root.is_dir():
            raise SourceError("source.path", "must be a folder", path, "Check the path.")
        names = sorted(entry.name for entry in self._root.iterdir() if entry.is_dir())
        files = [
            (file, number)
            for number, name in enumerate(names)
            for file in sorted((self._root / name).rglob("*"))
            if file.suffix.lower() in _SUFFIXES
        ]
        if not files:
            hint = "Put the images into one folder for each class."
            raise SourceError("source.path", "has no class folder with images", path, hint)
        self._files = [file for file, _ in files]
        self.keys = [file.relative_to(self._root).as_posix() for file in self._files]
        self.labels: NDArray[np.int64] = np.array([number for _, number in files], np.int64)
        self.class_names = tuple(names)
        self.sizes: NDArray[np.int64] = np.array([file.stat().st_size for file in self._files], np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def item(self, index: int) -> Item:
        """Reads and decodes one file; a file that is gone raises `SourceError`: it was there at the start."""
        try:
            data = self._files[index].read_bytes()
        except OSError as error:
            # A file that is gone or a mount that fails says nothing about the sample: no tombstone.
            hint = "Put it back, or check the mount; then run the same command again."
            raise SourceError(
                self.keys[index], "must be readable, as when the source was opened", error, hint
            ) from error
        return decode_image(data, self.channels)
