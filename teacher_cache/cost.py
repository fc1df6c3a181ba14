"""What a build will cost, measured on a few micro-batches of the real teacher, before anything is written."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from teacher_cache.addition import Addition
from teacher_cache.encodings import row_bytes
from teacher_cache.encodings.calibration import Calibration
from teacher_cache.paid import closed_after, with_journal
from teacher_cache.plan import (
    Opened,
    draft,
    first_views,
    named_source,
    open_parts,
    prospect,
    whole_extent,
    worker_count,
)
from teacher_cache.spec import BuildSpec
from teacher_cache.teachers import RemoteTeacher, ask_whole


@dataclass(frozen=True)
class Cost:
    """An estimate; every figure follows from the two measured times."""

    rows: int
    """Samples times views."""
    bytes_per_row: int
    """Of all fields and the view's proof, without padding and checksums; where rows differ, the most one can take."""
    bytes: int
    teacher_seconds_per_row: float
    render_seconds_per_row: float
    """Reading, decoding and rendering, on one core."""
    devices: int
    """Workers that this machine would run."""
    field_bytes: dict[str, int]
    """Bytes of one row, by field; the view's proof under `view`."""
    warnings: tuple[str, ...]
    calibration: Calibration | None
    """How the encoding was chosen, where that was left open."""

    def hours(self, devices: int) -> float:
        """Wall-clock hours on so many devices like the measured one."""
        return self.rows * (self.teacher_seconds_per_row + self.render_seconds_per_row) / devices / 3600

    def payback_epochs(self, views: int) -> float:
        """After how many student epochs the build has cost less than running the teacher in every one."""
        each = self.teacher_seconds_per_row + self.render_seconds_per_row
        return views * each / self.teacher_seconds_per_row


def estimate(spec: BuildSpec, micro_batches: int = 3) -> Cost:
    """Times the real teacher on real views, one warm-up and then a few micro-batches, and writes no cache.

    Answers that are paid for go into the journal all the same: the build will want them, too.

    Args:
        spec: the build that is being planned.
        micro_batches: how many to time; the fastest counts, because what disturbs only ever adds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.compute.threads)
    try:
        opened = open_parts(with_journal(spec))
        with closed_after(opened.teacher):
            seen = prospect(opened, named_source(opened.source, None))
            addition = draft(seen, whole_extent(seen)).addition
            size: int = addition.spec["teacher"]["micro_batch"]
            teacher_seconds, render_seconds = _time(opened, size, micro_batches)
    finally:
        torch.set_num_threads(threads)
    by_field = _field_bytes(addition)
    rows = addition.rows * addition.extent.views
    return Cost(
        rows=rows,
        bytes_per_row=sum(by_field.values()),
        bytes=rows * sum(by_field.values()),
        teacher_seconds_per_row=teacher_seconds,
        render_seconds_per_row=render_seconds,
        devices=worker_count(spec.compute),
        field_bytes=by_field,
        warnings=_warnings(spec),
        calibration=addition.calibration,
    )


def _time(opened: Opened, size: int, micro_batches: int) -> tuple[float, float]:
    rows, _ = first_views(opened, size)
    started = time.perf_counter()
    views = opened.view_of(rows, 0)
    render = time.perf_counter() - started
    seconds = []
    # A remote teacher is asked once: its answers cost, and no second one comes any faster from a journal.
    times = 1 if isinstance(opened.teacher, RemoteTeacher) else micro_batches + 1
    for _ in range(times):
        started = time.perf_counter()
        # Copying the answer back is what waits for a GPU to finish.
        for value in ask_whole(opened.teacher, views.pixels_BCHW, size).values():
            value.cpu()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:] or seconds) / size, render / len(rows)


def _field_bytes(addition: Addition) -> dict[str, int]:
    fields = {name: row_bytes(encoding) for name, encoding in addition.encodings.items()}
    return {**fields, "view": sum(part.row_bytes for part in addition.proof_group(0).parts)}


def _warnings(spec: BuildSpec) -> tuple[str, ...]:
    warnings = []
    if "://" in spec.teacher.model:
        warnings.append(
            "The teacher is behind a URL: its time is that of one question, or of a look into the journal where it was "
            "asked before; black images that fill up a micro-batch are asked for, too."
        )
    if spec.store.shard_rows % spec.teacher.micro_batch:
        warnings.append(
            f"store.shard_rows ({spec.store.shard_rows}) is not a multiple of teacher.micro_batch "
            f"({spec.teacher.micro_batch}): the last micro-batch of every shard is padded."
        )
    return tuple(warnings)
