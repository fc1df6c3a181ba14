"""Step 10, metrics: what an epoch's loss was made of, and where its time went."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from time import perf_counter

import torch
from torch import Tensor

from student_train.batch import Batch
from student_train.together import World
from teacher_cache.errors import NonFiniteError


class Means:
    """Running means over rows, kept on the device: reading one every step would wait for the GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        """Of each value its own: a term counts only in the rows for which it was computed."""

    def add(self, values: dict[str, Tensor], rows: int) -> None:
        """One batch's values."""
        for name, value in values.items():
            self._rows[name] = self._rows.get(name, 0) + rows
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value * rows

    def read(self, world: World, device: torch.device) -> dict[str, float]:
        """The means over the rows of all processes.

        Raises:
            NonFiniteError: the loss became NaN or inf.
        """
        pairs = {name: (total, self._rows[name]) for name, total in self._sums.items()}
        means = {name: total / rows for name, (total, rows) in world.summed(pairs, device).items()}
        if not math.isfinite(means["loss"]):
            hint = "Lower train.lr; the last checkpoint is from the epoch before."
            raise NonFiniteError("loss", "must stay finite", means["loss"], hint)
        return means


class TimeSplit:
    """Where an epoch's seconds went.

    `seconds` = `data_seconds` (waiting for batches) + `step_seconds` (all the rest). `decode_seconds`,
    `view_seconds` and `target_seconds` are what making the batches took: without workers they are part of the
    waiting, with workers they are spent beside it, by all workers together. Of several processes, the first one's.
    """

    def __init__(self) -> None:
        self._started = perf_counter()
        self._waited = self._decode = self._view = self._target = 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, each waited for with a watch in hand."""
        before = perf_counter()
        for batch in batches:
            self._waited += perf_counter() - before
            if batch.spent is not None:
                self._decode += batch.spent.decode
                self._view += batch.spent.view
                self._target += batch.spent.target
            yield batch
            before = perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds from the beginning until now."""
        seconds = perf_counter() - self._started
        return {
            "seconds": seconds,
            "data_seconds": self._waited,
            "decode_seconds": self._decode,
            "view_seconds": self._view,
            "target_seconds": self._target,
            "step_seconds": seconds - self._waited,
        }
