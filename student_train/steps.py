"""Step 8, steps: (epoch, step) to a batch, a pure function, so that any worker of any process can make it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from student_train.batch import Batch, Mixing, Spent
from student_train.data import Rendered, Rows
from student_train.shuffle import shuffled
from student_train.view_order import ViewOrder, numbers
from teacher_cache.encodings import joined


@dataclass(frozen=True)
class Share:
    """The part of every batch that one of several processes trains on."""

    rank: int = 0
    of: int = 1


@dataclass(frozen=True)
class Steps(Dataset[Batch]):
    """All batches of a run."""

    rows: Rows
    fields: tuple[str, ...]
    size: int
    """Rows in a batch of all processes together, each with `together` views."""
    together: int
    shuffle: bool
    seed: int
    check: int
    """Views of a batch that are proven."""
    order: ViewOrder
    share: Share

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        epoch, step = place
        return make_batch(self, epoch, step, self._rows_of(epoch, step))

    def _rows_of(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Row numbers: a stretch of the epoch's order, of which each process has its own part."""
        count, part = len(self.rows.alive), self.size // self.share.of
        first = step * self.size + self.share.rank * part
        places = np.arange(first, min(first + part, count))
        return self.rows.alive[shuffled(places, count, self.seed, epoch) if self.shuffle else places]


@dataclass(frozen=True)
class _Group:
    """The rows of a batch that show the same view."""

    number: int
    places: NDArray[np.int64]
    """Among the batch's rows."""
    check: NDArray[np.int64]
    """Which of them are proven."""


def make_batch(steps: Steps, epoch: int, step: int, rows: NDArray[np.int64]) -> Batch:
    """Decodes some rows once, and joins each of their views with its own answers."""
    data, clock = steps.rows, _Clock()
    with clock("decode"):
        decoded = data.decode(rows)
    rendered: list[Rendered] = []
    groups = list(_groups(steps, epoch, step, rows))
    with clock("view"):
        for group in groups:
            part = decoded if len(group.places) == len(rows) else decoded.at(group.places)
            rendered.append(data.render(part, group.number, group.check))
        views = [item.views.pixels_BCHW for item in rendered]
        pixels = views[0] if len(views) == 1 else torch.cat(views)
    with clock("target"):
        parts = {field: [data.read(field, g.number, rows[g.places]) for g in groups] for field in steps.fields}
        targets = {field: joined(part) for field, part in parts.items()}
    rows_B = np.concatenate([rows[group.places] for group in groups])
    view_B = np.repeat([item.view for item in rendered], [len(group.places) for group in groups])
    labels = None if data.labels is None else torch.from_numpy(data.labels[rows_B])
    return Batch(epoch, step, view_B, rows_B, pixels, labels, targets, _mixing(data, rendered), clock.spent)


def _groups(steps: Steps, epoch: int, step: int, rows: NDArray[np.int64]) -> Iterator[_Group]:
    """By view, each showing of the rows after the other."""
    total = len(rows) * steps.together
    chosen = ((step + epoch * 31) * steps.check + np.arange(min(steps.check, total))) % total
    before = 0
    for showing in range(epoch * steps.together, (epoch + 1) * steps.together):
        for number, places in _by_view(steps, showing, rows):
            # Others in every step, also where the order does not change.
            check = chosen[(chosen >= before) & (chosen < before + len(places))] - before
            yield _Group(number, places, check)
            before += len(places)


def _by_view(steps: Steps, showing: int, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    if steps.order == "epoch" or steps.rows.views is None:
        # The data itself knows which view its n-th showing is: where any number can be rendered, it is a new one.
        yield showing, np.arange(len(rows))
        return
    number_B = numbers(steps.order, showing, steps.rows.key_digests[rows], steps.rows.views, steps.seed)
    for number in np.unique(number_B).tolist():
        yield number, np.flatnonzero(number_B == number)


def _mixing(data: Rows, rendered: Sequence[Rendered]) -> Mixing | None:
    mixed = [item.views.mixed for item in rendered if item.views.mixed is not None]
    partners = [item.partner_rows for item in rendered if item.partner_rows is not None]
    if not partners:
        return None
    partners_B = np.concatenate(partners)
    labels = None if data.labels is None else torch.from_numpy(data.labels[partners_B])
    shares_B = np.concatenate([item.shares_B for item in mixed])
    return Mixing(partners_B, labels, torch.from_numpy(shares_B).float())


class _Clock:
    """Where the time goes while a batch is made."""

    def __init__(self) -> None:
        self._spent = {"decode": 0.0, "view": 0.0, "target": 0.0}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        before = perf_counter()
        yield
        self._spent[what] += perf_counter() - before

    @property
    def spent(self) -> Spent:
        return Spent(**self._spent)
