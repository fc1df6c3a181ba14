"""`report`: one self-contained HTML file that says what a cache is, how faithful it is, and what it looks like."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from teacher_cache.addition import Totals
from teacher_cache.encodings import Encoding, TopKLogits, row_bytes
from teacher_cache.errors import MismatchError, RequestError
from teacher_cache.reader import Cache, open_cache
from teacher_cache.report_comparison import Comparison, read_comparison
from teacher_cache.report_gallery import MAX_PIXELS, GalleryRow, gallery
from teacher_cache.report_plots import Plot, entropy_plot, mass_plot, training_plots
from teacher_cache.report_rows import Picks, measure, pick
from teacher_cache.spec import SourceSpec
from teacher_cache.storage import write_atomic
from teacher_cache.storage.root import require_here

SAMPLED_ROWS = 2000
GALLERY_ROWS = 12
GALLERY_VIEWS = 4


@dataclass(frozen=True)
class _Encoded:
    """One line of the fidelity table."""

    field: str
    shape: str
    encoding: str
    bytes: int
    measured: dict[str, float]


def write_report(
    cache_path: str | Path,
    html_path: str | Path,
    comparison: str | Path | None = None,
    source: SourceSpec | None = None,
) -> Path:
    """Writes one HTML file that needs nothing outside itself; the same cache gives the same bytes.

    Args:
        cache_path: its folder, or `s3://bucket/prefix`; an unfinished cache is shown as far as it is committed.
        html_path: where to write, on this machine also where the cache is not; replaced if it is there.
        comparison: a JSON file that `student-train compare` wrote.
        source: where the data set is now, if not where the manifest says.

    Returns:
        The path that was written.

    Raises:
        SpecError: the comparison is not such a file, or the page's path is a URL.
        CacheError: there is no cache, or it cannot be trusted.
        BuildError: the page cannot be written.
    """
    path = require_here("html", html_path)
    compared = None if comparison is None else read_comparison(comparison)
    page = _page(open_cache(cache_path, source), compared)
    write_atomic(path.parent, path.name, page.encode())
    return path


def _page(cache: Cache, comparison: Comparison | None) -> str:
    picks = pick(cache, SAMPLED_ROWS)
    soft = measure(cache, picks)
    shown, trouble = _gallery(cache, picks)
    totals = cache.totals
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = _size
    environment.filters["small"] = lambda value: format(value, ".3g")
    template = environment.from_string(files("teacher_cache").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        cache=cache,
        manifest=cache.manifest,
        spec=cache.spec,
        totals=totals,
        progress=_progress(cache),
        identity=_identity(cache),
        recipe=json.dumps(cache.manifest.first.recipe, indent=2, ensure_ascii=False),
        encoded=_encoded(cache, totals),
        proof_bytes=sum(part.row_bytes for part in cache.manifest.first.proof_group(0).parts),
        plots=[] if soft is None else [entropy_plot(soft), mass_plot(soft)],
        sampled=len(picks.rows),
        gallery=shown,
        gallery_views=GALLERY_VIEWS,
        gallery_trouble=trouble,
        max_pixels=MAX_PIXELS,
        tombstones=cache.samples.tombstones,
        comparison=comparison,
        training=_training(comparison),
    )


def _training(comparison: Comparison | None) -> list[Plot]:
    return [] if comparison is None else training_plots(comparison)


def _gallery(cache: Cache, picks: Picks) -> tuple[list[GalleryRow], str | None]:
    """The gallery, or what the page says in its place where the data set is not what the teacher saw."""
    try:
        return gallery(cache, picks.rows[:GALLERY_ROWS].tolist(), GALLERY_VIEWS), None
    except (RequestError, MismatchError) as error:
        return [], str(error)


def _progress(cache: Cache) -> tuple[int, int]:
    """(rows committed, rows planned), over all views."""
    spans = (index.addition.span(shard) for index in cache.indices for _, shard in index.places())
    planned = sum(index.addition.rows * index.addition.extent.views for index in cache.indices)
    return sum(stop - start for start, stop in spans), planned


def _identity(cache: Cache) -> list[tuple[str, str]]:
    manifest = cache.manifest
    fingerprints = [("Whole cache", manifest.whole)]
    for number, addition in enumerate(manifest.additions):
        of = f" (addition {number})" if number else ""
        fingerprints += [(name.capitalize() + of, value) for name, value in addition.identity.model_dump().items()]
    return fingerprints


def _encoded(cache: Cache, totals: Totals) -> list[_Encoded]:
    encodings = {field: cache.encoding_of(field) for field in cache.fields}
    return [
        _Encoded(
            field,
            " × ".join(str(size) for size in cache.shape_of(field)),
            _described(encoding),
            row_bytes(encoding),
            totals.fidelity.get(field, {}),
        )
        for field, encoding in sorted(encodings.items(), key=lambda item: (item[0] != "logits", item[0]))
    ]


def _described(encoding: Encoding) -> str:
    return f"top_k, k = {encoding.k}" if isinstance(encoding, TopKLogits) else encoding.name


def _size(count: Any) -> str:
    """Bytes for people: `12.3 kB`, powers of 1000."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
