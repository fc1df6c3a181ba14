"""Step 8, stream: re-creates the teacher's views, joins them with the cached rows, stops and goes on anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader

from student_train.batch import Batch, Mixing
from student_train.cached_rows import CachedRows
from student_train.data import Rows
from student_train.steps import Share, Steps
from student_train.transfer import one_ahead
from student_train.view_order import ViewOrder
from teacher_cache import Cache
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.fingerprint import content_digest, fingerprint

__all__ = ["Batch", "Mixing", "Share", "ViewStream"]

_BEFORE: Mapping[str, Any] = {"views_per_decode": 1, "view_order": "epoch"}
"""What the states of earlier releases do not say, because there was nothing else."""


class ViewStream:
    """An iterable of batches; iterating once gives what is left of one epoch, then the next epoch begins.

    There is one place where it is, which each batch that is taken moves on: an iterator that is left goes on with the
    next one, and two at once would share the epoch. `peek` looks at a batch without taking it.

    Epoch e shows view e mod K of every row, K being the number of cached views, unless `view_order` says otherwise;
    with k `views_per_decode` it is one pass over the rows that shows each of them k times, the showings k·e to
    k·e + k − 1, side by side in a batch. The order of an epoch is a seeded bijection: it does not depend on the number
    of workers or processes, nor on where a run was stopped.
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
        view_order: ViewOrder = "epoch",
        workers: int = 0,
        share: Share | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Opens a stream.

        Args:
            data: a cache; `CachedRows(cache, size=160)` and the like; or labelled rows (`fields` is then empty).
            batch_size: views in a batch, of all processes together.
            fields: which cached fields each batch carries.
            seed: of the order; the views have their own, in the cache.
            shuffle: False keeps the source's order.
            drop_last: leave out a last batch that is smaller than the others.
            check_views: how many views of each batch are compared with the teacher's, pixel for pixel; 2 if not
                given, and none where the student has views of its own.
            views_per_decode: views of one row in a batch, all made from one decoding.
            view_order: which view a row shows next: `epoch` (all rows the same), `cycle` (each from a view of its
                own), `random` (each in an order of its own, none twice before all have been shown).
            workers: processes that prepare batches ahead; 0 prepares them where they are used.
            share: which part of every batch this process trains on, where several train together.
            pin_memory: put batches into page-locked memory, from which a GPU copies while it computes.

        Raises:
            MismatchError: a field is not in the cache; the message lists those that are.
            SpecError: the batch size does not fit the rows, the views or the processes, or a check has nothing to
                compare with.
        """
        self.data: Rows = CachedRows(data) if isinstance(data, Cache) else data
        self.fields = require_names(fields)
        self.data.require(self.fields)
        share = share or Share()
        require_seed(seed)
        _require_views(self.data, views_per_decode, batch_size)
        require_view_order(self.data, view_order)
        size = batch_size // views_per_decode
        if size < 1 or (drop_last and size > len(self.data.alive)):
            rule = f"must be in 1..{len(self.data.alive) * views_per_decode}, the views of rows that have data"
            raise SpecError("batch_size", rule, batch_size, "Choose another batch size.")
        _require_share(share, size, views_per_decode, drop_last)
        self.epoch, self.step = 0, 0
        # Rows may be held out of the same data: which are there is a part of its identity.
        rows = content_digest(np.ascontiguousarray(self.data.alive).data)
        self._data = fingerprint("stream-data", 1, {"data": self.data.fingerprint, "alive": f"{rows:016x}"})
        self._drop_last = drop_last
        check = proven_views(self.data, check_views)
        self._steps = Steps(self.data, self.fields, size, views_per_decode, shuffle, seed, check, view_order, share)
        self._loader: DataLoader[Batch] = DataLoader(
            self._steps,
            batch_size=None,
            sampler=_Places(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
            pin_memory=pin_memory,
            # Its own generator: a loader would draw from the global one, which is the student's.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        count = len(self.data.alive)
        return count // self._steps.size if self._drop_last else -(-count // self._steps.size)

    def __iter__(self) -> Iterator[Batch]:
        return self.on("cpu")

    @property
    def share(self) -> Share:
        """The part of every batch that it gives."""
        return self._steps.share

    def on(self, device: torch.device | str) -> Iterator[Batch]:
        """What is left of the epoch, on a device: the next batch is copied there while the present one is used."""
        for batch in one_ahead(self._loader, torch.device(device)):
            self.step = batch.step + 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def peek(self) -> Batch:
        """The next batch, made here; the stream stays where it is."""
        return self._steps[(self.epoch, self.step)]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain values; taken after a batch, it means that this batch is done.

        It is the same for every number of workers and processes, whose batches are parts of the same ones.
        """
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, in this or other processes, with any number of workers.

        Raises:
            MismatchError: the state is of a stream with another order, whose rest would be other batches.
        """
        ours = self._identity()
        # What a state of an earlier release does not say was not asked then.
        for name, value in {"data": ours["data"], **_BEFORE, **state}.items():
            if name in ours and value != ours[name]:
                hint = "Open the stream as it was opened then, over the same data."
                raise MismatchError(f"stream.{name}", f"must be {value}, as in the saved state", ours[name], hint)
        epoch, step = int(state["epoch"]), int(state["step"])
        if epoch < 0 or not 0 <= step <= len(self):
            hint = "Load what `state_dict` gave."
            raise MismatchError("stream.step", f"must be in 0..{len(self)}, and the epoch not below 0", step, hint)
        # After an epoch's last batch the next one begins.
        self.epoch, self.step = (epoch + 1, 0) if step == len(self) else (epoch, step)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._steps.seed,
            "batch_size": self._steps.size * self._steps.together,
            "views_per_decode": self._steps.together,
            "view_order": self._steps.order,
            "drop_last": self._drop_last,
            "shuffle": self._steps.shuffle,
            "rows": len(self.data.alive),
            "data": self._data,
        }


def _require_views(data: Rows, together: int, batch_size: int) -> None:
    if together < 1 or (data.views is not None and together > data.views):
        most = "" if data.views is None else f", at most {data.views}, the views that there are"
        raise SpecError("views_per_decode", f"must be at least 1{most}", together, "Choose another number.")
    if batch_size % together:
        rule = f"must be a multiple of views_per_decode ({together})"
        raise SpecError("batch_size", rule, batch_size, "Choose another batch size.")


def require_seed(seed: int) -> None:
    """Refuses what would draw as another seed does, or for another purpose."""
    if not 0 <= seed < 2**32:
        raise SpecError("seed", "must be in 0..2³²−1", seed, "Choose another seed.")


def proven_views(data: Rows, asked: int | None) -> int:
    """How many views of each batch are proven: as many as asked for; else two, where there is something to prove."""
    if asked is None:
        return 2 if data.provable else 0
    if asked < 0:
        raise SpecError("check_views", "must not be below 0", asked, "Choose 0 for none.")
    if asked and not data.provable:
        hint = "Leave it out: these are not the teacher's views, so there is nothing to compare with."
        raise SpecError("check_views", "needs the views that the teacher saw", asked, hint)
    return asked


def require_view_order(data: Rows, order: ViewOrder) -> None:
    """Refuses an order that does not exist, or that has nothing to order."""
    if order not in get_args(ViewOrder):
        known = ", ".join(get_args(ViewOrder))
        raise SpecError("view_order", f"must be one of {known}", order, "Choose one of them.")
    if order != "epoch" and data.views is None:
        hint = "Leave it out: every showing of a row is a new view."
        raise SpecError("view_order", "needs a number of views to choose from", order, hint)


def require_names(fields: Sequence[str]) -> tuple[str, ...]:
    """The names of fields; one string would be taken for as many as it has letters."""
    if isinstance(fields, str):
        raise SpecError("fields", "must be a sequence of names", fields, f"Write fields=({fields!r},).")
    return tuple(fields)


def _require_share(share: Share, size: int, together: int, drop_last: bool) -> None:
    if share.of < 1 or not 0 <= share.rank < share.of:
        raise SpecError("share", "must have a rank in 0..of−1", f"rank {share.rank} of {share.of}", "Number them so.")
    if size % share.of:
        rule = f"must be a multiple of {share.of * together}, {together} views of a row in each of {share.of} processes"
        raise SpecError("batch_size", rule, size * together, "Choose another batch size.")
    if share.of > 1 and not drop_last:
        hint = "Set drop_last."
        raise SpecError("drop_last", "must be set where several processes train together", drop_last, hint)


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
