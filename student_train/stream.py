"""Step 8, stream: re-creates the teacher's views, joins them with the cached rows, stops and goes on anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from student_train.cached_rows import CachedRows
from student_train.data import Rows
from student_train.shuffle import shuffled
from teacher_cache import Cache, Target
from teacher_cache.errors import MismatchError, SpecError


@dataclass(frozen=True)
class Batch:
    """One step's data. Everything in it belongs together by identity."""

    epoch: int
    step: int
    view: int
    """The view number of every row."""
    rows_B: NDArray[np.int64]
    views_BCHW: Tensor
    """uint8, before normalisation."""
    labels_B: Tensor | None
    """int64 class numbers."""
    targets: Mapping[str, Target]
    """The cached fields that the stream was asked for."""

    def __len__(self) -> int:
        return len(self.rows_B)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        labels = None if self.labels_B is None else self.labels_B.to(device, non_blocking=True)
        targets = {name: target.to(device, non_blocking=True) for name, target in self.targets.items()}
        views = self.views_BCHW.to(device, non_blocking=True)
        return Batch(self.epoch, self.step, self.view, self.rows_B, views, labels, targets)


class _Steps(Dataset[Batch]):
    """(epoch, step) to a batch: a pure function, so workers can compute it anywhere and in any order."""

    def __init__(self, rows: Rows, fields: Sequence[str], size: int, shuffle: bool, seed: int, check: int) -> None:
        self._rows, self._fields, self._size, self._shuffle = rows, tuple(fields), size, shuffle
        self._seed, self._check = seed, check

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        epoch, step = place
        data, count = self._rows, len(self._rows.alive)
        places = np.arange(step * self._size, min((step + 1) * self._size, count))
        rows = data.alive[shuffled(places, count, self._seed, epoch) if self._shuffle else places]
        view = epoch % data.views if data.views is not None else epoch
        views = data.render(view, rows, self._check)
        targets = {field: data.read(field, view, rows) for field in self._fields}
        labels = None if data.labels is None else torch.from_numpy(data.labels[rows])
        return Batch(epoch, step, view, rows, views.pixels_BCHW, labels, targets)


class ViewStream:
    """An iterable of batches; iterating once gives what is left of one epoch, then the next epoch begins.

    Epoch e shows view e mod K of every row, K being the number of cached views. The order of an epoch is a
    seeded bijection: it does not depend on the number of workers, nor on where a run was stopped.
    """

    def __init__(
        self,
        data: Cache | Rows,
        *,
        batch_size: int,
        fields: Sequence[str] = ("logits",),
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        check_views: int = 2,
        workers: int = 0,
    ) -> None:
        """Opens a stream.

        Args:
            data: a cache, or labelled rows without one (then `fields` must be empty).
            batch_size: rows in a batch.
            fields: which cached fields each batch carries.
            seed: of the order; the views have their own, in the cache.
            shuffle: False keeps the source's order.
            drop_last: leave out a last batch that is smaller than the others.
            check_views: how many views of each batch are compared with the teacher's, pixel for pixel.
            workers: processes that prepare batches ahead; 0 prepares them where they are used.

        Raises:
            MismatchError: a field is not in the cache; the message lists those that are.
        """
        self.data: Rows = CachedRows(data) if isinstance(data, Cache) else data
        missing = [field for field in fields if field not in self.data.fields]
        if missing:
            there = ", ".join(self.data.fields) or "none"
            raise MismatchError("field", "must be in the cache", missing[0], f"The cache holds: {there}.")
        if batch_size < 1 or (drop_last and batch_size > len(self.data.alive)):
            rule = f"must be in 1..{len(self.data.alive)}, the rows that have data"
            raise SpecError("batch_size", rule, batch_size, "Choose another batch size.")
        self.fields = tuple(fields)
        self.epoch, self.step = 0, 0
        self._batch_size, self._drop_last, self._shuffle, self._seed = batch_size, drop_last, shuffle, seed
        steps = _Steps(self.data, fields, batch_size, shuffle, seed, check_views)
        self._loader: DataLoader[Batch] = DataLoader(
            steps,
            batch_size=None,
            sampler=_Places(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        count = len(self.data.alive)
        return count // self._batch_size if self._drop_last else -(-count // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self.step = batch.step + 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain values; taken after a batch, it means that this batch is done."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, in this or another process, with any number of workers.

        Raises:
            MismatchError: the state is of a stream with another order, whose rest would be other batches.
        """
        for name, ours in self._identity().items():
            if state[name] != ours:
                hint = "Open the stream as it was opened then."
                raise MismatchError(f"stream.{name}", f"must be {state[name]}, as in the saved state", ours, hint)
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "batch_size": self._batch_size,
            "drop_last": self._drop_last,
            "shuffle": self._shuffle,
            "rows": len(self.data.alive),
        }


class _Places:
    """The (epoch, step) places that are left of the stream's present epoch."""

    def __init__(self, stream: ViewStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self._stream.epoch
        for step in range(self._stream.step, len(self._stream)):
            yield epoch, step

    def __len__(self) -> int:
        return len(self._stream)
