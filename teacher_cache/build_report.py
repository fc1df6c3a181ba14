"""What a build did and what the cache then holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from teacher_cache import samples as sample_table
from teacher_cache.manifest import Manifest


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


def report_of(root: Path, manifest: Manifest, shards: int, rows: int, seconds: float) -> BuildReport:
    """The report of a sealed cache, of which a run has made so many shards and rows in so many seconds."""
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
    chance = 1 / manifest.field_shapes["logits"][-1]
    if accuracy >= chance + 0.1 * (1 - chance):
        return ()
    return (
        f"The teacher's accuracy on the labels is {accuracy:.1%}, near chance ({chance:.1%}). "
        "Check teacher.normalize (mean and std), the recipe's size, and the order of the classes.",
    )
