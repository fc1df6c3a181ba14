"""Sealing: the receipts of a complete addition become a table for each view, and the manifest names them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from teacher_cache import poison, receipts
from teacher_cache.addition import Addition, TableRef, Totals
from teacher_cache.encodings import fidelity
from teacher_cache.errors import BuildError, CorruptionError
from teacher_cache.lease import sweep
from teacher_cache.manifest import Manifest, write_manifest
from teacher_cache.receipts import Receipt, Tally, committed_shards, read_receipt, receipt_path
from teacher_cache.samples import Samples, write_content, write_tombstones
from teacher_cache.spec import BuildSpec, is_logits
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.root import Root
from teacher_cache.tables import write_table

_BEGUN = ("samples", "content", "constants", "tombstones", "receipts")
"""The tables that come with an addition."""


def require_fidelity(spec: BuildSpec, addition: Addition, totals: Totals) -> None:
    """Raises where the measured error of the logits is beyond what the configuration allows."""
    bound = spec.fidelity.max_kl
    if bound is None:
        return
    for field in filter(is_logits, addition.fields):
        found = totals.fidelity[field]
        worst = max(fidelity.TEMPERATURES, key=lambda temperature: found.get(f"kl_t{temperature}", 0.0))
        value = found.get(f"kl_t{worst}", 0.0)
        if value > bound:
            rule = f"mean KL(teacher ‖ decoded) at T = {worst} must be at most {bound:g}"
            kept = addition.encodings[field].name
            hint = f"Keep more than {kept} does, in a new cache; or raise the bound: the same command then seals this."
            raise BuildError("fidelity.max_kl", f"{field}: {rule}", f"{value:.3g} over {found['rows']:.0f} rows", hint)


def _require_complete(root: Root, addition: Addition) -> None:
    """Whatever leads here: a cache with a hole is not sealed."""
    for view in addition.view_numbers:
        missing = np.flatnonzero(~committed_shards(root, addition, view))
        if len(missing):
            rule = f"must be committed before the cache is sealed, and {len(missing)} shards of this view are not"
            place = f"view {view}, shard {missing[0]}"
            raise BuildError(place, rule, "no receipt", "Run the same command again: it goes on.")


class _Contents:
    """The content digests of an addition's rows, put together from its receipts."""

    def __init__(self, samples: Samples, addition: Addition) -> None:
        self._samples, self._addition = samples, addition
        self._first = addition.extent.first_row
        self.known: NDArray[np.uint64] = samples.content[self._first : addition.extent.stop_row].copy()

    def add(self, receipt: Receipt) -> None:
        """Takes one shard in; `CorruptionError` where two views of a sample were read from different bytes."""
        start, stop = (row - self._first for row in self._addition.span(receipt.shard))
        known = self.known[start:stop]
        differs = (known != 0) & (receipt.content != 0) & (known != receipt.content)
        if differs.any():
            key = self._samples.key(self._first + start + int(differs.argmax()))
            hint = "Begin a new cache: this one holds answers for both contents."
            raise CorruptionError(key, "changed in the source during the build", f"view {receipt.view}", hint)
        self.known[start:stop] = np.maximum(known, receipt.content)


def seal(root: Root, spec: BuildSpec, manifest: Manifest) -> Manifest:
    """Turns the receipts of a complete addition into tables, and names them in the manifest.

    The order makes a kill harmless: tables under new names, then the manifest, then the receipts go.

    Raises:
        BuildError: the error that was measured is beyond `fidelity.max_kl`.
    """
    addition = manifest.additions[-1]
    _require_complete(root, addition)
    samples, tally = Samples(root, manifest), Tally()
    contents = _Contents(samples, addition)
    tables = tuple(_seal_view(root, addition, view, tally, contents) for view in addition.view_numbers)
    totals = tally.totals(addition)
    require_fidelity(spec, addition, totals)
    place = manifest.stops.index(addition.extent.stop_row)
    segment = manifest.segments[place]
    if not segment.content:
        segment = segment.model_copy(update={"content": write_content(root, contents.known)})
    sealed = manifest.with_last(state="sealed", receipts=tables, totals=totals).model_copy(
        update={
            "segments": (*manifest.segments[:place], segment, *manifest.segments[place + 1 :]),
            "tombstones": write_tombstones(root, {**samples.reasons, **tally.reasons}),
        }
    )
    write_manifest(root, sealed)
    clear_superseded(root, sealed)
    return sealed


def _seal_view(root: Root, addition: Addition, view: int, tally: Tally, contents: _Contents) -> TableRef:
    rows: list[tuple[int, int, str, int, str]] = []
    for shard in range(addition.grid.shards):
        receipt = read_receipt(root, receipt_path(view, shard), addition)
        contents.add(receipt)
        tally.add(receipt)
        rows += [(view, shard, record.path, record.size, record.digest) for record in receipt.files]
    columns = zip(*rows, strict=True)
    return write_table(root, "receipts", dict(zip(("view", "shard", "path", "size", "digest"), columns, strict=True)))


def clear_superseded(root: Root, manifest: Manifest) -> None:
    """Removes what a sealed manifest has taken the place of, and what builders that are gone have left.

    A kill in the middle is made good by the next call, and two may do it at the same time.
    """
    clear_tables(root, manifest, ("tombstones", "receipts"))
    sweep(root)


def clear_begun(root: Root, manifest: Manifest) -> None:
    """Removes what a builder has left that began or sealed an addition of which the manifest knows nothing."""
    clear_tables(root, manifest, _BEGUN)


def clear_tables(root: Root, manifest: Manifest, stems: Sequence[str]) -> None:
    """Removes tables that a sealed manifest does not name, and the receipts that they were made of.

    An addition that is begun must find none of the last one's: its own have the same names.
    """
    kept = {table.path for table in manifest.tables}
    for stem in stems:
        for name in list(root.names(f"{stem}-")):
            if name not in kept:
                root.remove(name)
    for folder in (receipts.FOLDER, poison.FOLDER):
        for name in list(root.names(f"{folder}/")):
            root.remove(name)
        if isinstance(root, LocalRoot):
            _remove_folders(root, folder)


def _remove_folders(root: LocalRoot, folder: str) -> None:
    for path in (*(root.path / folder).glob("*"), root.path / folder):
        with contextlib.suppress(OSError):
            path.rmdir()
