"""Constants: what all rows of a field share, measured once before a build and kept beside the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.encodings.scales import Shared
from teacher_cache.spec import Auto, EncodingSpec, FeatureHead, TopK, U8Channel

Arrays = Mapping[str, NDArray[Any]]


def needs_constants(spec: EncodingSpec) -> bool:
    """Whether an encoding reads constants."""
    return isinstance(spec, U8Channel | FeatureHead) or has_prior(spec)


def has_prior(spec: EncodingSpec | Auto) -> bool:
    """Whether the classes that it leaves out share their mass as the teacher's mean does."""
    return isinstance(spec, TopK) and spec.tail == "prior"


def to_columns(constants: Mapping[str, Arrays]) -> dict[str, list[Any]]:
    """Arrays by field and name to the columns of a table: `field`, `name`, `dtype`, `shape`, `data`."""
    rows = [
        (field, name, array.dtype.name, json.dumps(list(array.shape)), np.ascontiguousarray(array).tobytes())
        for field, arrays in sorted(constants.items())
        for name, array in sorted(arrays.items())
    ]
    names = ("field", "name", "dtype", "shape", "data")
    return {column: [row[place] for row in rows] for place, column in enumerate(names)}


def from_columns(columns: Mapping[str, list[Any]], digest: str) -> dict[str, Shared]:
    """The other way; `digest` is the table's and names the content."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for field, name, dtype, shape, data in zip(*(columns[key] for key in columns), strict=True):
        array = np.frombuffer(data, dtype).reshape(json.loads(shape)).copy()
        found.setdefault(field, {})[name] = torch.from_numpy(array)
    return {field: Shared(f"{digest}/{field}", tensors) for field, tensors in found.items()}
