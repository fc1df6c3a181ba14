"""The proof that a view is the one that the teacher saw, and what is said when it is not.

Every row's pixel digest is kept. A digest says that pixels differ, not how far: for that, a few views are kept
whole when a cache is begun, and rendered again when a digest disagrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import ViewMismatch
from teacher_cache.fingerprint import bytes_digest
from teacher_cache.manifest import TableRef, library_versions
from teacher_cache.samples import read_checked
from teacher_cache.storage import write_atomic
from teacher_cache.storage.parquet_tables import read_table, table_bytes
from teacher_cache.views import Views

if TYPE_CHECKING:
    from teacher_cache.reader import Cache

Tolerance = Literal["exact", "rounding"]
"""`exact` stops at any difference; `rounding` goes on where reference views differ by at most one level of 255, as
other processors and releases round."""

_MOST = 8
_MOST_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Difference:
    """How far views that are rendered now are from those that were kept."""

    views: int
    """How many were compared."""
    pixels: int
    """How many values there are in them."""
    differing: int
    """How many values differ."""
    largest: int
    """The largest difference, in levels of 255."""

    @property
    def is_rounding(self) -> bool:
        """Whether something has moved, and nothing by more than one level: as another library or processor rounds."""
        return self.largest == 1

    def __str__(self) -> str:
        if not self.views:
            return "the cache keeps no reference views to measure by"
        share = f"{self.differing:,} of {self.pixels:,} values ({self.differing / self.pixels:.2%})"
        return f"on {self.views} reference views {share} differ, by at most {self.largest} of 255"


def reference_count(view_shape: tuple[int, int, int]) -> int:
    """How many views a cache keeps whole: eight, or as many as take 2 MiB, but one at least."""
    channels, height, width = view_shape
    return max(1, min(_MOST, _MOST_BYTES // (channels * height * width)))


def write_references(root: Path, rows: list[int], views: Views) -> TableRef:
    """Keeps view 0 of some rows whole, in a table whose name is made of its digest."""
    pixels = views.pixels_BCHW.cpu().numpy()
    data = table_bytes({"view": [0] * len(rows), "row": rows, "pixels": [view.tobytes() for view in pixels]})
    digest = bytes_digest(data)
    path = f"references-{digest[:12]}.parquet"
    write_atomic(root, path, data)
    return TableRef(path=path, digest=digest)


def measure(cache: Cache) -> Difference:
    """Renders the reference views from their stored parameters and compares every value.

    References whose shard is not committed yet have no stored parameters, and are left out.
    """
    if cache.manifest.references is None:
        return Difference(0, 0, 0, 0)
    table = read_table(read_checked(cache.path, cache.manifest.references))
    committed = [place for place, row in enumerate(table["row"]) if cache.is_committed(0, row)]
    if not committed:
        return Difference(0, 0, 0, 0)
    now = cache.render_views(0, [table["row"][place] for place in committed]).pixels_BCHW.numpy()
    then = np.stack([np.frombuffer(table["pixels"][place], np.uint8) for place in committed]).reshape(now.shape)
    levels = np.abs(now.astype(np.int16) - then)
    return Difference(len(committed), levels.size, int((levels > 0).sum()), int(levels.max()))


def check(cache: Cache, view: int, rows: NDArray[np.int64], rendered: Views, tolerance: Tolerance) -> None:
    """Compares views with the digests of what the teacher saw.

    Raises:
        ViewMismatch: naming the first sample that differs, the view, the recipe, both library versions, and how
            far pixels have moved.
    """
    differs = rendered.digests() != cache.digests(view, rows)
    if not differs.any():
        return
    moved = measure(cache)
    if tolerance == "rounding" and moved.is_rounding:
        return
    row = int(rows[int(differs.argmax())])
    place = f"sample {cache.samples.keys[row]}, view {view}, recipe {cache.manifest.identity.view}"
    found = f"{int(differs.sum())} of {len(rows)} rows differ; {moved}"
    hint = f"Built with {cache.manifest.versions}, now {library_versions()}: {_why(cache, view, row)}. {_advice(moved)}"
    raise ViewMismatch(place, "must be the pixels that the teacher saw", found, hint)


def _why(cache: Cache, view: int, row: int) -> str:
    stored, drawn = cache.params(view, [row]), cache.draw(view, [row])
    if (stored == drawn).all():
        return "the same parameters give other pixels"
    return f"the parameters drawn now differ too ({drawn[0].tolist()}, stored {stored[0].tolist()})"


def _advice(moved: Difference) -> str:
    if moved.is_rounding:
        return "Use the versions of the build, or ask for `tolerance: rounding`."
    if moved.views and not moved.differing:
        return "The reference views are as they were, so no library is to blame: these are not the rows' views."
    return "Use the versions of the build."
