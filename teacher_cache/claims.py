"""What one of several builders may work on: shards that it has claimed, and temporary files that are nobody else's."""

from __future__ import annotations

import re
from functools import cache

from teacher_cache.addition import Addition
from teacher_cache.errors import BuildError
from teacher_cache.index import planned_files
from teacher_cache.lease import LEAD, Hold, Lease, claims
from teacher_cache.manifest import MANIFEST
from teacher_cache.poison import is_current
from teacher_cache.receipts import Receipt, read_receipt, receipt_path, shard_claim
from teacher_cache.shard_job import Work
from teacher_cache.storage import open_store
from teacher_cache.storage.root import Root, remove_unfinished


class Claims:
    """Claims the shards of one cache for one builder."""

    def __init__(self, root: Root, addition: Addition, lease: Lease) -> None:
        self._root, self._addition, self._lease = root, addition, lease
        self._building = self._authority()

    @property
    def hold(self) -> Hold:
        """For workers in other processes: whether a claim is still held."""
        return self._lease.hold

    def take(self, work: Work) -> Work | None:
        """What of this work is ours to do: neither committed nor another's; None where nothing is left.

        Raises:
            BuildError: this builder has lost its lease, or the folder cannot be used.
        """
        self.require()
        views = tuple(view for view in work.views if self._take(view, work))
        return work._replace(views=views) if views else None

    def _take(self, view: int, work: Work) -> bool:
        name = shard_claim(view, work.shard)
        if name in self._lease.held:
            return True
        if self._lease.claim(name) is not None:
            return False
        # Looked for after claiming: who held it before has committed it first. Sealing takes receipts away, but
        # not while a shard that is not committed is claimed.
        if not self.is_done(view, work) and self._authority() == self._building:
            return True
        self._lease.release(name)
        return False

    def is_done(self, view: int, work: Work) -> bool:
        """Whether the shard is committed, and was made without the rows that are known to kill by now."""
        place = receipt_path(view, work.shard)
        if not self._root.exists(place):
            return False
        return not work.poison or is_current(read_receipt(self._root, place, self._addition), work.poison)

    def _authority(self) -> bytes:
        try:
            return self._root.read(MANIFEST)
        except FileNotFoundError as error:
            hint = "Is the disk still mounted, the folder still there? Bring it back, then run the same command again."
            raise BuildError(f"{self._root.url}/{MANIFEST}", "cannot be read any more", error, hint) from error

    def require(self) -> None:
        """Raises `BuildError` where this builder has lost its lease: that explains whatever else went wrong."""
        self._lease.require()

    def committed(self, receipt: Receipt) -> None:
        """Gives back the claim to a shard whose receipt is written."""
        self._lease.release(shard_claim(receipt.view, receipt.shard))

    def tidy(self) -> None:
        """Removes what writers that are gone, and our own, have left under temporary names."""
        leads, ours = self.hold.owns(LEAD), self._lease.held

        @cache
        def finals(others: bool) -> frozenset[str]:
            names = set(claims(self._root)) - set(ours) if others else set(ours)
            return frozenset(path for name in names for path in self._finals(name))

        # Whoever leads cleans up for all that are gone; others only what is certainly their own.
        remove_unfinished(self._root, lambda final: final in finals(True) if leads else final not in finals(False))

    def _finals(self, name: str) -> list[str]:
        """The files of the shard that a claim names."""
        found = re.fullmatch(r"v(\d+)-s(\d+)", name)
        if found is None:
            return []
        view, shard = int(found[1]), int(found[2])
        if view not in self._addition.view_numbers:
            return []
        store = open_store(self._addition.store.kind, self._addition.grid)
        return [*planned_files(self._addition, store, view, shard), receipt_path(view, shard)]
