"""Step 8, data set: the joined rows one by one, for people who have a loader, a sampler and a loop of their own."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from student_train.batch import Batch
from student_train.cached_rows import CachedRows
from student_train.data import Rows
from student_train.steps import Share, Steps, make_batch
from student_train.stream import proven_views, require_names, require_seed, require_view_order
from student_train.view_order import ViewOrder
from teacher_cache import Cache
from teacher_cache.errors import SpecError
from teacher_cache.views import pixels


class ViewDataset(Dataset[Batch]):
    """A map-style data set: index to a batch of one row, several indices to one batch, joined by identity.

        loader = DataLoader(ViewDataset(cache), batch_size=64, shuffle=True, collate_fn=ViewDataset.collate)

    Index i is the i-th row that has data. Call `set_epoch` before each epoch, as with a distributed sampler:
    it says which view is shown, and reaches worker processes that live through several epochs.
    """

    def __init__(
        self,
        data: Cache | Rows,
        *,
        fields: Sequence[str] = ("logits",),
        view_order: ViewOrder = "epoch",
        seed: int = 0,
        check_views: int | None = None,
    ) -> None:
        """Opens the data set.

        Args:
            data: as for `ViewStream`.
            fields: which cached fields each batch carries.
            view_order: as for `ViewStream`.
            seed: of the view order.
            check_views: how many views of each batch are proven; 2 if not given, and none where there is nothing to
                compare with.

        Raises:
            MismatchError: a field is not in the cache.
            SpecError: a check or a view order has nothing to go by; the seed is out of range.
        """
        self.data: Rows = CachedRows(data) if isinstance(data, Cache) else data
        names = require_names(fields)
        self.data.require(names)
        require_seed(seed)
        require_view_order(self.data, view_order)
        check = proven_views(self.data, check_views)
        pixels.load()
        self._steps = Steps(self.data, names, 1, 1, False, seed, check, view_order, Share())
        # In shared memory: what is set here reaches workers that were started before.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.data.alive)

    def set_epoch(self, epoch: int) -> None:
        """Says how often the rows have been shown before."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """What torch's loader calls for a whole batch: rows are gathered and rendered together.

        The batch's rows are in the order of their views, and say which they are; its `step` is the first row's number.
        """
        places = [operator.index(index) for index in indices]
        if not places:
            raise SpecError("indices", "must name at least one row", "none", "Leave out empty batches.")
        rows = self.data.alive[np.array(places, np.int64)]
        return make_batch(self._steps, int(self._epoch), int(rows[0]), rows)

    @staticmethod
    def collate(batch: Batch | Sequence[Batch]) -> Batch:
        """For a loader's `collate_fn`: the batch is one already.

        Raises:
            SpecError: they are single rows, because something stands between the loader and this data set.
        """
        if not isinstance(batch, Batch):
            hint = "Give the loader the ViewDataset itself; to join two caches, grow one."
            raise SpecError("collate_fn", "must be given a whole batch", type(batch).__name__, hint)
        return batch
