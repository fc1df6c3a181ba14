"""The proof that a view is the one that the teacher saw, and what is said when it is not.

Every row's pixel digest is kept. A digest says that pixels differ, not how far: for that, a few views are kept
whole when a cache is begun, and rendered again when a digest disagrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.addition import TableRef
from teacher_cache.errors import TeacherCacheError, ViewMismatch
from teacher_cache.manifest import library_versions
from teacher_cache.storage.root import Root
from teacher_cache.tables import read_columns, write_table
from teacher_cache.views import Views

if TYPE_CHECKING:
    from teacher_cache.reader import Cache

Tolerance = Literal["exact", "rounding"]
"""`exact` stops at any difference. `rounding` goes on where the recipe has operations that round and the reference
views have moved by one level of 255 and no more, as other processors and releases round; that a row's view is its own
then rests on its source bytes and its stored parameters, both of which are checked, and no longer on its digest."""

REFERENCES = {"view": int, "row": int, "pixels": bytes}
"""The columns of the table of reference views."""

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


def write_references(root: Root, rows: list[int], views: list[int], pixels: list[Tensor]) -> TableRef:
    """Keeps one view of each of some rows whole, in a table whose name is made of its digest."""
    columns = {"view": views, "row": rows, "pixels": [view.cpu().numpy().tobytes() for view in pixels]}
    return write_table(root, "references", columns)


def measure(cache: Cache) -> Difference:
    """Renders the reference views from their stored parameters and compares every value.

    References whose shard is not committed yet have no stored parameters, and are left out.
    """
    if cache.manifest.references is None:
        return Difference(0, 0, 0, 0)
    table = read_columns(cache.root, cache.manifest.references, REFERENCES)
    found = []
    for view, row, pixels in zip(table["view"], table["row"], table["pixels"], strict=True):
        # A row may have become a tombstone in the meantime.
        if cache.proves(view, [row])[0]:
            now = cache.render_views(view, [row]).pixels_BCHW[0].numpy()
            found.append(np.abs(now.astype(np.int16) - np.frombuffer(pixels, np.uint8).reshape(now.shape)))
    if not found:
        return Difference(0, 0, 0, 0)
    levels = np.stack(found)
    return Difference(len(found), levels.size, int((levels > 0).sum()), int(levels.max()))


def check(cache: Cache, view: int, rows: NDArray[np.int64], rendered: Views, tolerance: Tolerance) -> None:
    """Compares views with the digests of what the teacher saw.

    Raises:
        ViewMismatch: naming the first sample that differs, the view, the recipe, both library versions, and how
            far pixels have moved.
    """
    differs = rendered.digests() != cache.digests(view, rows)
    if not differs.any():
        return
    moved, unmeasured = _moved(cache)
    if tolerance == "rounding" and moved.is_rounding and cache.recipe.rounds:
        return
    row = int(rows[int(differs.argmax())])
    place = f"sample {cache.samples.key(row)}, view {view}, recipe {cache.manifest.first.identity.view}"
    found = f"{int(differs.sum())} of {len(rows)} rows differ; {unmeasured or moved}"
    advice = _advice(moved, cache.recipe.rounds)
    hint = f"Built with {cache.manifest.first.versions}, now {library_versions()}: {_why(cache, view, row)}. {advice}"
    raise ViewMismatch(place, "must be the pixels that the teacher saw", found, hint)


def _moved(cache: Cache) -> tuple[Difference, str]:
    """How far the reference views have moved, or why nobody can say: the mismatch itself must be told anyway."""
    try:
        return cache.moved, ""
    except TeacherCacheError as error:
        return Difference(0, 0, 0, 0), f"the reference views cannot be measured by: {error}"


def _why(cache: Cache, view: int, row: int) -> str:
    try:
        stored, drawn = cache.params(view, [row]), cache.draw(view, [row])
    except TeacherCacheError as error:
        return f"its parameters cannot be drawn again ({error})"
    if (stored == drawn).all():
        return "the same parameters give other pixels"
    return f"the parameters drawn now differ too ({drawn[0].tolist()}, stored {stored[0].tolist()})"


def _advice(moved: Difference, rounds: bool) -> str:
    if not rounds:
        return "Nothing in this recipe rounds, so no library is to blame: these are not the rows' views."
    if moved.is_rounding:
        return "Use the versions of the build, or ask for `tolerance: rounding`."
    if moved.views and not moved.differing:
        return (
            "The reference views are as they were: these are not the rows' views, or an operation that no reference "
            "view went through has changed. Use the versions of the build."
        )
    return "Use the versions of the build."
