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
from student_train.data import Rendered, Rows
from student_train.shuffle import shuffled
from teacher_cache import Cache, Target
from teacher_cache.encodings import joined
from teacher_cache.errors import MismatchError, SpecError


@dataclass(frozen=True)
class Mixing:
    """What a batch of mixed views is made of besides its own rows."""

    partners_B: NDArray[np.int64]
    """Row numbers of the partners."""
    labels_B: Tensor | None
    """The partners' class numbers."""
    shares_B: Tensor
    """float32, how much of each view is its own row's: the weight of its own label."""

    def to(self, device: torch.device | str) -> Mixing:
        """The same on a device."""
        labels = None if self.labels_B is None else self.labels_B.to(device, non_blocking=True)
        return Mixing(self.partners_B, labels, self.shares_B.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """One step's data. Everything in it belongs together by identity."""

    epoch: int
    step: int
    view_B: NDArray[np.int64]
    """The view number of each row."""
    rows_B: NDArray[np.int64]
    views_BCHW: Tensor
    """uint8, before normalisation."""
    labels_B: Tensor | None
    """int64 class numbers."""
    targets: Mapping[str, Target]
    """The cached fields that the stream was asked for."""
    mixing: Mixing | None = None
    """The other label of each row, where the recipe mixes."""

    def __len__(self) -> int:
        return len(self.rows_B)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        labels = None if self.labels_B is None else self.labels_B.to(device, non_blocking=True)
        targets = {name: target.to(device, non_blocking=True) for name, target in self.targets.items()}
        views = self.views_BCHW.to(device, non_blocking=True)
        mixing = None if self.mixing is None else self.mixing.to(device)
        return Batch(self.epoch, self.step, self.view_B, self.rows_B, views, labels, targets, mixing)


@dataclass(frozen=True)
class _Steps(Dataset[Batch]):
    """(epoch, step) to a batch: a pure function, so workers can compute it anywhere and in any order."""

    rows: Rows
    fields: tuple[str, ...]
    size: int
    """Rows in a batch, each with `together` views."""
    together: int
    shuffle: bool
    seed: int
    check: int
    """Views of a batch that are proven."""

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        epoch, step = place
        data, count = self.rows, len(self.rows.alive)
        places = np.arange(step * self.size, min((step + 1) * self.size, count))
        rows = data.alive[shuffled(places, count, self.seed, epoch) if self.shuffle else places]
        decoded, numbers = data.decode(rows), range(epoch * self.together, (epoch + 1) * self.together)
        checks = self._checks(epoch, step, len(rows))
        rendered = [data.render(decoded, number, check) for number, check in zip(numbers, checks, strict=True)]
        targets = {field: joined([data.read(field, number, rows) for number in numbers]) for field in self.fields}
        rows_B = np.tile(rows, self.together)
        labels = None if data.labels is None else torch.from_numpy(data.labels[rows_B])
        views = [item.views.pixels_BCHW for item in rendered]
        view_B = np.repeat([item.view for item in rendered], len(rows))
        pixels = views[0] if len(views) == 1 else torch.cat(views)
        return Batch(epoch, step, view_B, rows_B, pixels, labels, targets, _mixing(data, rendered))

    def _checks(self, epoch: int, step: int, rows: int) -> list[NDArray[np.int64]]:
        """Which places of each view are proven: others in every step, also where the order does not change."""
        first = (step + epoch * 31) * self.check
        chosen = (first + np.arange(min(self.check, rows * self.together))) % (rows * self.together)
        return [chosen[chosen // rows == number] % rows for number in range(self.together)]


def _mixing(data: Rows, rendered: Sequence[Rendered]) -> Mixing | None:
    mixed = [item.views.mixed for item in rendered if item.views.mixed is not None]
    partners = [item.partner_rows for item in rendered if item.partner_rows is not None]
    if not partners:
        return None
    partners_B = np.concatenate(partners)
    labels = None if data.labels is None else torch.from_numpy(data.labels[partners_B])
    shares_B = np.concatenate([item.shares_B for item in mixed])
    return Mixing(partners_B, labels, torch.from_numpy(shares_B).float())


class ViewStream:
    """An iterable of batches; iterating once gives what is left of one epoch, then the next epoch begins.

    Epoch e shows view e mod K of every row, K being the number of cached views; with k `views_per_decode` it is one
    pass over the rows that shows views k·e to k·e + k − 1 (mod K) of each, side by side in a batch. The order of an
    epoch is a seeded bijection: it does not depend on the number of workers, nor on where a run was stopped.
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
        check_views: int | None = None,
        views_per_decode: int = 1,
        workers: int = 0,
    ) -> None:
        """Opens a stream.

        Args:
            data: a cache; `CachedRows(cache, size=160)` and the like; or labelled rows (`fields` is then empty).
            batch_size: views in a batch.
            fields: which cached fields each batch carries.
            seed: of the order; the views have their own, in the cache.
            shuffle: False keeps the source's order.
            drop_last: leave out a last batch that is smaller than the others.
            check_views: how many views of each batch are compared with the teacher's, pixel for pixel; 2 if not
                given, and none where the student has views of its own.
            views_per_decode: views of one row in a batch, all made from one decoding.
            workers: processes that prepare batches ahead; 0 prepares them where they are used.

        Raises:
            MismatchError: a field is not in the cache; the message lists those that are.
            SpecError: the batch size does not fit the rows or the views, or a check has nothing to compare with.
        """
        self.data: Rows = CachedRows(data) if isinstance(data, Cache) else data
        self.data.require(fields)
        _require_views(self.data, views_per_decode, batch_size, check_views)
        size = batch_size // views_per_decode
        if size < 1 or (drop_last and size > len(self.data.alive)):
            rule = f"must be in 1..{len(self.data.alive) * views_per_decode}, the views of rows that have data"
            raise SpecError("batch_size", rule, batch_size, "Choose another batch size.")
        self.fields = tuple(fields)
        self.epoch, self.step = 0, 0
        self._drop_last = drop_last
        check = (2 if self.data.provable else 0) if check_views is None else check_views
        self._steps = _Steps(self.data, self.fields, size, views_per_decode, shuffle, seed, check)
        self._loader: DataLoader[Batch] = DataLoader(
            self._steps,
            batch_size=None,
            sampler=_Places(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
            # Its own generator: a loader would draw from the global one, which is the student's.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        count = len(self.data.alive)
        return count // self._steps.size if self._drop_last else -(-count // self._steps.size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self.step = batch.step + 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def peek(self) -> Batch:
        """The next batch, made here; the stream stays where it is."""
        return self._steps[(self.epoch, self.step)]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain values; taken after a batch, it means that this batch is done."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, in this or another process, with any number of workers.

        Raises:
            MismatchError: the state is of a stream with another order, whose rest would be other batches.
        """
        for name, ours in self._identity().items():
            # States of earlier releases knew one view of a decoding only.
            if state.get(name, 1) != ours:
                hint = "Open the stream as it was opened then."
                raise MismatchError(
                    f"stream.{name}", f"must be {state.get(name, 1)}, as in the saved state", ours, hint
                )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._steps.seed,
            "batch_size": self._steps.size * self._steps.together,
            "views_per_decode": self._steps.together,
            "drop_last": self._drop_last,
            "shuffle": self._steps.shuffle,
            "rows": len(self.data.alive),
        }


def _require_views(data: Rows, together: int, batch_size: int, check_views: int | None) -> None:
    if together < 1 or (data.views is not None and together > data.views):
        most = "" if data.views is None else f", at most {data.views}, the views that there are"
        raise SpecError("views_per_decode", f"must be at least 1{most}", together, "Choose another number.")
    if batch_size % together:
        rule = f"must be a multiple of views_per_decode ({together})"
        raise SpecError("batch_size", rule, batch_size, "Choose another batch size.")
    if check_views and not data.provable:
        hint = "Leave it out: these are not the teacher's views, so there is nothing to compare with."
        raise SpecError("check_views", "needs the views that the teacher saw", check_views, hint)


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
