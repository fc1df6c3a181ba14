"""What a build did and what the cache then holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from teacher_cache.begin import Beginning
from teacher_cache.encodings import fidelity
from teacher_cache.plan import Prospect
from teacher_cache.samples import Samples
from teacher_cache.spec import is_logits
from teacher_cache.storage.root import Root
from teacher_cache.teachers.base import Bill


@dataclass(frozen=True)
class BuildReport:
    """What a build did and what the cache now holds."""

    path: str
    rows: int
    views: int
    shards_total: int
    """Of the additions by this teacher that hold fields of the configuration."""
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
    paid: dict[str, int | str] | None = None
    """Of a teacher over HTTP: requests and images that all builds with this journal have asked for, and their price."""

    @property
    def rows_per_second(self) -> float:
        """Views rendered, answered and committed in a second."""
        return self.rows_built / self.seconds if self.seconds else 0.0


def report_of(root: Root, beginning: Beginning, shards: int, rows: int, seconds: float) -> BuildReport:
    """The report of what a configuration asked for, of which a run has made so many shards and rows."""
    manifest, seen = beginning.found, beginning.seen
    assert manifest is not None, "it was built"
    mine = [item for item in seen.by_teacher() if set(item.fields) & set(seen.fields)]
    totals = [item.totals for item in mine if item.totals is not None]
    labelled = sum(item.labelled for item in totals)
    accuracy = sum(item.correct for item in totals) / labelled if labelled else None
    return BuildReport(
        path=root.url,
        rows=manifest.rows,
        views=manifest.views,
        shards_total=sum(item.extent.views * item.grid.shards for item in mine),
        shards_built=shards,
        rows_built=rows,
        seconds=seconds,
        bytes=sum(item.bytes for item in totals),
        teacher_accuracy=accuracy,
        tombstones=Samples(root, manifest).tombstones,
        fidelity={
            field: fidelity.merged(item.fidelity[field] for item in totals if field in item.fidelity)
            for field in seen.fields
        },
        warnings=_warnings(seen, accuracy),
    )


def with_bill(report: BuildReport, bill: Bill | None) -> BuildReport:
    """The same report, with what whoever pays should know."""
    if bill is None:
        return report
    paid: dict[str, int | str] = {"requests": bill.requests, "images": bill.images}
    if bill.spent is not None:
        paid["spent"] = bill.spent
    return replace(report, paid=paid, warnings=(*report.warnings, *bill.notes))


def _warnings(seen: Prospect, accuracy: float | None) -> tuple[str, ...]:
    shape = next((shape for field, shape in seen.shapes.items() if is_logits(field)), None)
    if accuracy is None or shape is None:
        return ()
    chance = 1 / shape[-1]
    if accuracy >= chance + 0.1 * (1 - chance):
        return ()
    return (
        f"The teacher's accuracy on the labels is {accuracy:.1%}, near chance ({chance:.1%}). "
        "Check teacher.normalize (mean and std), the recipe's size, and the order of the classes.",
    )
