"""What of an addition that is being built is left to do, from the names of its receipts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.addition import Addition
from teacher_cache.errors import CorruptionError
from teacher_cache.manifest import Manifest, read_manifest
from teacher_cache.poison import is_current, known_poison
from teacher_cache.receipts import committed_shards, read_receipt, receipt_path
from teacher_cache.shard_job import Work
from teacher_cache.storage.root import Root

_MOST_HELD = 2**30
"""Bytes of finished rows that a worker may hold because several views are made from one decoding."""


class Left(NamedTuple):
    """What is left, and how much is not."""

    works: list[Work]
    done: int
    """Views of rows that are committed."""


def what_is_left(root: Root, addition: Addition, together: int) -> Left | None:
    """What has to be made still, `together` views of the same rows at a time; None where it is sealed meanwhile.

    Raises:
        CorruptionError: a receipt that must be looked into cannot be trusted.
    """
    works, done, numbers = list[Work](), 0, addition.view_numbers
    sizes_S = np.array([rows_of(addition, shard) for shard in range(addition.grid.shards)])
    try:
        poison = known_poison(root, addition)
        for first in range(numbers.start, numbers.stop, together):
            views = range(first, min(first + together, numbers.stop))
            made_VS = np.stack([_made(root, addition, view, poison) for view in views])
            done += int((made_VS * sizes_S).sum())
            for shard in np.flatnonzero(~made_VS.all(axis=0)).tolist():
                left = tuple(view for view, made in zip(views, made_VS[:, shard], strict=True) if not made)
                works.append(Work(left, shard, poison.get(shard, ())))
    except CorruptionError:
        # Another builder may be sealing: its receipts go while we read them.
        if is_open(read_manifest(root), addition):
            raise
        return None
    if works and not is_open(read_manifest(root), addition):
        return None
    return Left(works, done)


def _made(root: Root, addition: Addition, view: int, poison: Mapping[int, Sequence[int]]) -> NDArray[np.bool_]:
    """The shards of a view that need not be made again, [shards]: of most of them it is enough that they are there."""
    made = committed_shards(root, addition, view)
    for shard, rows in poison.items():
        if made[shard]:
            made[shard] = is_current(read_receipt(root, receipt_path(view, shard), addition), rows)
    return made


def rows_of(addition: Addition, shard: int) -> int:
    """How many rows a shard has."""
    start, stop = addition.span(shard)
    return stop - start


def is_open(manifest: Manifest, addition: Addition) -> bool:
    """Whether an addition is still being built."""
    now = manifest.open_addition
    return now is not None and now.identity == addition.identity


def views_together(addition: Addition, asked: int, workers: int) -> int:
    """How many views are made from one decoding: as told, or fewer where workers or memory would run out.

    A worker holds the rows of all these views until they are committed.
    """
    first, count = addition.extent.first_view, addition.extent.views
    held = addition.store.shard_rows * sum(part.row_bytes for group in addition.groups(first) for part in group.parts)
    together = max(1, min(asked, count, _MOST_HELD // held))
    while together > 1 and -(-count // together) * addition.grid.shards < 4 * workers:
        together -= 1
    return together
