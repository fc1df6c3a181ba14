"""What of a question by image the cache answers, and which micro-batches the model is to be asked about.

An answer does not depend on what the cache held at that moment, but for the error of its encoding: images are cut at
multiples of the micro-batch from the request's own start, whichever of them the model is asked about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from services import held, wire
from services.library import Library
from services.options import Wanted
from services.status import Part, Plan, Question, Status
from services.teachers import ServedTeacher


def plan_images(served: ServedTeacher, images_BCHW: Tensor, wanted: Wanted, *, cached: bool) -> Plan:
    """A plan for images that were sent.

    Args:
        served: the teacher.
        images_BCHW: uint8 [N, C, H, W].
        wanted: what is made of its answers.
        cached: whether the cache may answer.
    """
    parts, encodings = _by_pixels(served.library, images_BCHW, wanted) if served.library and cached else ([], {})
    there = {place for part in parts for place in part.places}
    questions = []
    for start in range(0, len(images_BCHW), served.micro_batch):
        piece = images_BCHW[start : start + served.micro_batch]
        rows = [row for row in range(len(piece)) if start + row not in there]
        if rows:
            questions.append(Question(piece, [start + row for row in rows], rows, wire.identity_of(piece)))
    return Plan(len(images_BCHW), parts, questions, {}, encodings)


def _by_pixels(library: Library, images_BCHW: Tensor, wanted: Wanted) -> tuple[list[Part], dict[str, str]]:
    library.refresh()
    chosen = held.choose(library.held, wanted, exact=False)
    if chosen is None:
        return [], {}
    by_view: dict[int, dict[int, int]] = defaultdict(dict)
    for number, place in enumerate(library.find(images_BCHW)):
        if place is not None:
            by_view[place.view][number] = place.row
    return read_held(library, chosen, wanted, by_view)


def read_held(
    library: Library, chosen: held.Chosen, wanted: Wanted, by_view: Mapping[int, Mapping[int, int]]
) -> tuple[list[Part], dict[str, str]]:
    """The items (by view, number to row) of which the cache holds every field."""
    parts = []
    for view, rows in by_view.items():
        held_rows = [library.cache.holds(way.name, view, list(rows.values())) for way in chosen.values()]
        there = np.logical_and.reduce(held_rows).tolist()
        places = [number for number, here in zip(rows, there, strict=True) if here]
        if places:
            tensors = held.read(library.cache, chosen, wanted, view, [rows[place] for place in places])
            parts.append(Part(places, tensors, Status.CACHED))
    return parts, {field: way.encoding.name for field, way in chosen.items()} if parts else {}
