"""Step 1, source: a data set with a length, items by index, stable keys, labels, class names, a fingerprint."""

from __future__ import annotations

from typing import assert_never

import numpy as np

from teacher_cache.errors import SourceError
from teacher_cache.sources.base import BrokenSample, Item, Source, source_fingerprint, source_fingerprints
from teacher_cache.spec import (
    DigitsSource,
    FolderSource,
    NumpySource,
    ParquetSource,
    SourceSpec,
    TorchvisionSource,
)

__all__ = ["BrokenSample", "Item", "Source", "open_source", "source_fingerprint", "source_fingerprints"]


def open_source(spec: SourceSpec) -> Source:
    """Opens the data set that a configuration describes.

    Raises:
        SourceError: it is not there, has another layout, is empty, or gives two samples one key.
    """
    from teacher_cache.sources.subset import Subset

    source = _open(spec)
    if spec.take is not None:
        source = Subset(source, spec.take)
    if len(source) == 0:
        raise SourceError("source", "has no samples", spec, "Check its path and split.")
    _check_keys(source)
    _check_labels(source)
    return source


def _check_keys(source: Source) -> None:
    # Hashes and not a set of the keys: of millions of samples that would be the largest thing in memory.
    hashes = np.fromiter(map(hash, source.keys), np.int64, len(source))
    hashes.sort()
    alike = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not alike:
        return
    seen: set[str] = set()
    for key in source.keys:
        if hash(key) in alike:
            if key in seen:
                raise SourceError("source", "gives two samples one key", key, "Make the image paths unique.")
            seen.add(key)


def _open(spec: SourceSpec) -> Source:
    # Imported where used: a build over a folder should not pay for pyarrow, nor need scikit-learn.
    match spec:
        case DigitsSource():
            from teacher_cache.sources.digits import Digits

            return Digits(spec.split)
        case FolderSource():
            from teacher_cache.sources.folder import Folder

            return Folder(spec.path, spec.channels)
        case ParquetSource():
            from teacher_cache.sources.parquet import ParquetImages

            paths = (spec.path,) if isinstance(spec.path, str) else spec.path
            return ParquetImages(paths, spec.class_names, spec.channels)
        case TorchvisionSource():
            from teacher_cache.sources.torchvision_dataset import TorchvisionDataset

            return TorchvisionDataset(spec.dataset, spec.arguments, spec.channels)
        case NumpySource():
            from teacher_cache.sources.numpy_arrays import NumpyArrays

            return NumpyArrays(spec.images, spec.labels, spec.class_names)
    assert_never(spec)


def _check_labels(source: Source) -> None:
    labels, names = source.labels, source.class_names
    if labels is None or names is None:
        return
    if int(labels.max()) >= len(names) or int(labels.min()) < 0:
        rule = f"labels must be in 0..{len(names) - 1}, one for each class name"
        raise SourceError("source", rule, f"{int(labels.min())}..{int(labels.max())}", "Check the class names.")
