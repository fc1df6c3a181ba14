"""`build`: begin or go on, run what is missing, seal."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from teacher_cache import samples as sample_table
from teacher_cache.encodings import fidelity
from teacher_cache.errors import BuildError, SpecError
from teacher_cache.manifest import Manifest, write_manifest
from teacher_cache.plan import Opened, begin, open_parts, worker_count
from teacher_cache.receipts import Receipt, add_up, read_receipts
from teacher_cache.shard_job import Work, open_job, run_work
from teacher_cache.spec import BuildSpec
from teacher_cache.storage import remove_temporary

_MOST_HELD = 2**30
"""Bytes of finished rows that a worker may hold because several views are made from one decoding."""

Executor = Literal["ray", "serial"]
Progress = Callable[[int, int, int], None]
"""Called after each shard with (rows done, rows in all, rows that this run has computed)."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did and what the cache now holds."""

    path: str
    rows: int
    views: int
    shards_total: int
    shards_built: int
    """In this run; the others were committed before."""
    rows_built: int
    seconds: float
    """Of this run's shards, without opening the source and the teacher."""
    bytes: int
    teacher_accuracy: float | None
    """Share of labelled rows, over all views, whose largest logit is the label."""
    tombstones: tuple[tuple[str, str], ...]
    """(key, reason) of samples that could not be decoded."""
    fidelity: dict[str, dict[str, float]]
    warnings: tuple[str, ...]

    @property
    def rows_per_second(self) -> float:
        """Views rendered, answered and committed in a second."""
        return self.rows_built / self.seconds if self.seconds else 0.0


def build(spec: BuildSpec, executor: Executor = "ray", progress: Progress | None = None) -> BuildReport:
    """Runs the teacher over every view that the cache does not hold yet, and seals the cache.

    Killed at any moment, the same call goes on; a sealed cache is left as it is.

    Args:
        spec: what to build, and where.
        executor: `ray` for one worker on each device, `serial` for a plain loop; both write the same bytes.
        progress: told after each shard.

    Raises:
        RequestError: the spec names something impossible; nothing was written.
        MismatchError: the folder holds a cache of something else.
        WorkError: a shard could not be made; what was committed stays.
    """
    if executor not in ("ray", "serial"):
        raise SpecError("executor", "must be ray or serial", executor, "Choose one of them.")
    root = Path(spec.cache)
    threads = torch.get_num_threads()
    # The number of threads can change the last bit of a logit: it is part of the identity and set everywhere.
    torch.set_num_threads(spec.compute.threads)
    try:
        opened = open_parts(spec)
        manifest = begin(root, opened)
        if manifest.state == "sealed":
            _clear_superseded(root, manifest)
            _Counter(progress, manifest, manifest.rows * manifest.views)
            return _report(root, manifest, 0, 0, 0.0)
        missing, done = _missing(root, manifest, _together(spec, manifest, executor))
        started = time.perf_counter()
        built = _run(root, opened, manifest, missing, executor, _Counter(progress, manifest, done))
        seconds = time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
    _require_fidelity(spec, manifest, root)
    sealed = seal(root, manifest)
    return _report(root, sealed, sum(len(work.views) for work in missing), built, seconds)


def _together(spec: BuildSpec, manifest: Manifest, executor: Executor) -> int:
    """How many views are made from one decoding: as told, or fewer where workers or memory would run out.

    A worker holds the rows of all these views until they are committed.
    """
    workers = 1 if executor == "serial" else worker_count(spec.compute)
    held = manifest.store.shard_rows * sum(part.row_bytes for group in manifest.groups(0) for part in group.parts)
    together = max(1, min(spec.compute.views_per_decode, manifest.views, _MOST_HELD // held))
    while together > 1 and -(-manifest.views // together) * manifest.grid.shards < 4 * workers:
        together -= 1
    return together


def _missing(root: Path, manifest: Manifest, together: int) -> tuple[list[Work], int]:
    """What is left to do, `together` views of the same rows at a time, and how many rows are done."""
    committed = {(receipt.view, receipt.shard) for receipt in read_receipts(root, manifest)}
    missing = []
    for first in range(0, manifest.views, together):
        for shard in range(manifest.grid.shards):
            views = range(first, min(first + together, manifest.views))
            left = tuple(view for view in views if (view, shard) not in committed)
            if left:
                missing.append(Work(left, shard))
    return missing, sum(_rows(manifest, shard) for _, shard in committed)


def _rows(manifest: Manifest, shard: int) -> int:
    start, stop = manifest.grid.span(shard)
    return stop - start


class _Counter:
    """Adds up rows as receipts come in, and tells whoever shows the progress."""

    def __init__(self, progress: Progress | None, manifest: Manifest, done: int) -> None:
        self.progress, self.total = progress, manifest.rows * manifest.views
        self.done, self.built = done, 0
        self._tell()

    def add(self, rows: int) -> None:
        self.done += rows
        self.built += rows
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, self.built)


def _run(
    root: Path,
    opened: Opened,
    manifest: Manifest,
    missing: list[Work],
    executor: Executor,
    counter: _Counter,
) -> int:
    try:
        with closing(_receipts(root, opened, manifest, missing, executor)) as receipts:
            for receipt in receipts:
                counter.add(_rows(manifest, receipt.shard))
    except BaseException:
        # Closing has stopped the workers, also after Ctrl-C: what they had half written goes too.
        remove_temporary(root)
        raise
    return counter.built


def _receipts(
    root: Path, opened: Opened, manifest: Manifest, missing: list[Work], executor: Executor
) -> Generator[Receipt, None, None]:
    if not missing:
        return
    if executor == "serial":
        job = open_job(root, manifest, opened)
        for work in missing:
            yield from run_work(job, work)
    else:
        from teacher_cache.precompute import run_on_ray

        yield from run_on_ray(root, manifest, opened.spec, missing)


def _require_fidelity(spec: BuildSpec, manifest: Manifest, root: Path) -> None:
    """Raises where the measured error of the logits is beyond what the configuration allows."""
    bound = spec.fidelity.max_kl
    if bound is None or "logits" not in manifest.fields:
        return
    found = add_up(manifest, read_receipts(root, manifest)).fidelity["logits"]
    worst = max(fidelity.TEMPERATURES, key=lambda temperature: found.get(f"kl_t{temperature}", 0.0))
    value = found.get(f"kl_t{worst}", 0.0)
    if value > bound:
        rule = f"mean KL(teacher ‖ decoded) at T = {worst} must be at most {bound:g}"
        kept = manifest.encodings["logits"].name
        hint = f"Keep more than {kept} does, in a new cache; or raise the bound: the same command then seals this one."
        raise BuildError("fidelity.max_kl", f"logits: {rule}", f"{value:.3g} over {found['rows']:.0f} rows", hint)


def seal(root: Path, manifest: Manifest) -> Manifest:
    """Turns the receipts of a complete cache into one table, and the manifest into its root.

    The order makes a kill harmless: tables under new names, then the manifest, then the receipts go.
    """
    receipts = read_receipts(root, manifest)
    beginning = sample_table.read_samples(root, manifest.samples)
    final = sample_table.with_receipts(beginning, manifest, receipts)
    records = [(receipt, record) for receipt in receipts for record in receipt.files]
    columns = {
        "view": [receipt.view for receipt, _ in records],
        "shard": [receipt.shard for receipt, _ in records],
        "path": [record.path for _, record in records],
        "size": [record.size for _, record in records],
        "digest": [record.digest for _, record in records],
    }
    table = sample_table.write_table(root, "receipts", columns)
    samples = sample_table.write_samples(root, final)
    sealed = manifest.model_copy(
        update={
            "state": "sealed",
            "samples": samples,
            "receipts": table,
            "totals": add_up(manifest, receipts),
        }
    )
    write_manifest(root, sealed)
    _clear_superseded(root, sealed)
    return sealed


def _clear_superseded(root: Path, manifest: Manifest) -> None:
    """Removes what a sealed manifest has taken the place of; a kill in the middle is made good by the next call."""
    kept = {manifest.samples.path, manifest.receipts.path if manifest.receipts else ""}
    for path in [*root.glob("samples-*.parquet"), *root.glob("receipts-*.parquet")]:
        if path.name not in kept:
            path.unlink()
    folder = root / "receipts"
    if folder.is_dir():
        for path in folder.glob("*.json"):
            path.unlink()
        folder.rmdir()


def _report(root: Path, manifest: Manifest, shards: int, rows: int, seconds: float) -> BuildReport:
    assert manifest.totals is not None, "a sealed manifest has totals"
    totals = manifest.totals
    table = sample_table.read_samples(root, manifest.samples)
    accuracy = totals.correct / totals.labelled if totals.labelled else None
    return BuildReport(
        path=str(root),
        rows=manifest.rows,
        views=manifest.views,
        shards_total=manifest.views * manifest.grid.shards,
        shards_built=shards,
        rows_built=rows,
        seconds=seconds,
        bytes=totals.bytes,
        teacher_accuracy=accuracy,
        tombstones=tuple((k, r) for k, r in zip(table.keys, table.reasons, strict=True) if r),
        fidelity=totals.fidelity,
        warnings=_warnings(manifest, accuracy),
    )


def _warnings(manifest: Manifest, accuracy: float | None) -> tuple[str, ...]:
    if accuracy is None or "logits" not in manifest.field_shapes:
        return ()
    chance = 1 / manifest.field_shapes["logits"][0]
    if accuracy >= chance + 0.1 * (1 - chance):
        return ()
    return (
        f"The teacher's accuracy on the labels is {accuracy:.1%}, near chance ({chance:.1%}). "
        "Check teacher.normalize (mean and std), the recipe's size, and the order of the classes.",
    )
