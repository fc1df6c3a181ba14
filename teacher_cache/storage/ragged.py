"""Rows of different lengths: padded arrays [rows, cap] in memory, and on disk one row after the other.

In what follows R counts rows, K places of a padded row (0 … cap − 1), E elements of all the rows together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.encodings import Columns, Part
from teacher_cache.errors import BuildError, SpecError
from teacher_cache.storage.base import COUNT, Grid, Group

_NOBODY = int(np.iinfo(np.uint32).max)
"""The count of a row that nobody wrote: a tombstone's."""


def require_room(group: Group, grid: Grid) -> None:
    """Refuses shards whose elements uint32 cannot count.

    Raises:
        SpecError: shard_rows · cap reaches the largest uint32, which stands for what nobody wrote.
    """
    if grid.shard_rows * group.cap >= _NOBODY:
        rule = f"times {group.cap}, the most values of a row in {group.path}, must be less than {_NOBODY}"
        raise SpecError("store.shard_rows", rule, grid.shard_rows, "Choose smaller shards.")


def lengths_of(group: Group, columns: Columns) -> NDArray[np.int64]:
    """How many elements of each row are stored, [R]: `count`, and none of a tombstone.

    Raises:
        BuildError: a row counts more than its places.
    """
    count_R = columns[COUNT].astype(np.int64)
    lengths_R = np.where(count_R == _NOBODY, 0, count_R)
    if (lengths_R > group.cap).any():
        rule = f"must be at most {group.cap}, the places of a row"
        raise BuildError(f"{group.path}/{COUNT}", rule, lengths_R.max(), "Correct the encoding.")
    return lengths_R


def offsets_of(lengths_R: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Where each row ends, [R]: the number of elements up to and including it."""
    return np.cumsum(lengths_R).astype(np.uint32)


def flatten(padded_RK: NDArray[Any], lengths_R: NDArray[np.int64]) -> NDArray[Any]:
    """The elements [E] of padded rows, one row after the other; what is beyond a row's length is left out."""
    flat_E: NDArray[Any] = padded_RK[_filled(lengths_R, padded_RK.shape[1])]
    return flat_E


def places_of(starts_R: NDArray[np.int64], lengths_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the elements [E] of some rows are in a flat array; rows in any order, repeats allowed."""
    first_R = np.cumsum(lengths_R) - lengths_R
    return np.repeat(starts_R - first_R, lengths_R) + np.arange(lengths_R.sum())


def pad(elements_E: NDArray[Any], lengths_R: NDArray[np.int64], part: Part) -> NDArray[Any]:
    """Elements of rows, one row after the other, to padded rows [R, cap]; the opposite of `flatten`."""
    padded_RK = np.full((len(lengths_R), *part.shape), part.fill, part.dtype)
    padded_RK[_filled(lengths_R, part.shape[0])] = elements_E
    return padded_RK


def _filled(lengths_R: NDArray[np.int64], cap: int) -> NDArray[np.bool_]:
    filled_RK: NDArray[np.bool_] = np.arange(cap) < lengths_R[:, None]
    return filled_RK
