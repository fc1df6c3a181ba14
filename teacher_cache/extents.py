"""What of a wish a cache does not hold yet: blocks of views × rows × fields, each of which becomes an addition."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from teacher_cache.addition import Extent
from teacher_cache.manifest import Manifest


def missing(manifest: Manifest | None, rows: int, views: int, teacher: str, fields: tuple[str, ...]) -> list[Extent]:
    """The blocks that are neither there nor being built, in the order in which they are to be made.

    Args:
        manifest: of the cache; None where there is none yet.
        rows: samples of the source.
        views: how many views of each are wanted.
        teacher: who is to answer.
        fields: what for.

    Returns:
        Blocks of one segment each; rows that the cache does not know are a segment of their own.
    """
    spans = [] if manifest is None else list(manifest.spans)
    known = 0 if manifest is None else manifest.rows
    if rows > known:
        spans.append((known, rows))
    return [extent for span in spans for extent in _of_segment(manifest, span, views, teacher, fields)]


def _of_segment(
    manifest: Manifest | None, span: tuple[int, int], views: int, teacher: str, fields: tuple[str, ...]
) -> Iterator[Extent]:
    first_row, stop_row = span
    there = [item.extent for item in manifest.additions if item.extent.first_row == first_row] if manifest else []

    def left(view: int) -> tuple[tuple[str, ...], bool]:
        """The fields that are missing in a view, and whether its proof is."""
        here = [extent for extent in there if view in extent.view_numbers]
        answered = {name for extent in here if extent.teacher == teacher for name in extent.fields}
        return tuple(sorted(set(fields) - answered)), not any(extent.proof for extent in here)

    for (wanted, proof), group in groupby(range(views), left):
        numbers = list(group)
        if wanted:
            yield Extent(
                first_row=first_row,
                rows=stop_row - first_row,
                first_view=numbers[0],
                views=len(numbers),
                teacher=teacher,
                fields=wanted,
                proof=proof,
            )
