"""What of a question by name the cache answers, and which micro-batches the model is to be asked about.

A sample is computed in the micro-batch in which a build computes it: so it has the bits of a precompute job whoever
asks, its neighbours are there, too, when they are asked for, and a build can take the answers over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from services import held, wire
from services.library import Library, MicroBatch
from services.naming import Named
from services.options import Wanted
from services.planning import read_held
from services.problems import Problem
from services.status import Part, Plan, Question, Status
from services.teachers import ServedTeacher
from teacher_cache.teachers.base import padded


def plan_named(served: ServedTeacher, named: Named, wanted: Wanted, *, cached: bool, most: int) -> Plan:
    """A plan for samples that were named.

    Args:
        served: the teacher; it has a library.
        named: keys, views, and the digests that these must have.
        wanted: what is made of its answers.
        cached: whether the cache may answer.
        most: images that the model may be asked about for one request.

    Raises:
        Problem: 413 where the samples lie in too many micro-batches, 422 where there are too many for one.
        CacheError: the cache or the data set is not what was built.
    """
    if named.whole and len(named.keys) > served.micro_batch:
        rule = f"must be at most one micro-batch, {served.micro_batch}"
        raise Problem(422, "keys", rule, len(named.keys), "Leave out `whole`, or ask for fewer.")
    planner = _Planner(served, named)
    if cached:
        planner.read(wanted)
    questions = planner.whole() if named.whole else planner.in_their_batches(most)
    items = served.micro_batch if named.whole else len(named.keys)
    return Plan(items, planner.parts, questions, planner.unanswered, planner.encodings)


class _Planner:
    """One question on its way to a plan."""

    def __init__(self, served: ServedTeacher, named: Named) -> None:
        assert served.library is not None, "the route has looked"
        self._library: Library = served.library
        self._served, self._named = served, named
        self._library.refresh()
        self._rows, self.unanswered = known_rows(self._library, named)
        self.parts: list[Part] = []
        self.encodings: dict[str, str] = {}

    def read(self, wanted: Wanted) -> None:
        """Takes what the cache holds."""
        chosen = held.choose(self._library.held, wanted, exact=self._named.whole)
        if chosen is None or (self._named.whole and not self._is_micro_batch()):
            return
        by_view: dict[int, dict[int, int]] = defaultdict(dict)
        for place in self._left():
            by_view[self._named.view_of_each[place]][place] = self._rows[place]
        parts, encodings = read_held(self._library, chosen, wanted, by_view)
        if self._named.whole and sum(len(part.places) for part in parts) < len(self._rows):
            # The bits of one micro-batch come from one place.
            return
        for part in parts:
            rows = np.array([self._rows[place] for place in part.places])
            self._compare(part.places, self._library.digests(self._named.view_of_each[part.places[0]], rows))
        self.parts, self.encodings = [self._without_unanswered(part) for part in parts], encodings

    def _is_micro_batch(self) -> bool:
        """Whether the samples are, in their order, one whole micro-batch of a build, with no fillings."""
        if self.unanswered or len(self._rows) != self._served.micro_batch:
            return False
        around = self._library.micro_batch_of(self._named.view_of_each[0], self._rows[0])
        return self._rows == list(range(around.start, around.stop))

    def in_their_batches(self, most: int) -> list[Question]:
        """Each micro-batch of the build in which some of the samples lie that are left."""
        batches: dict[MicroBatch, list[int]] = defaultdict(list)
        for place in self._left():
            batch = self._library.micro_batch_of(self._named.view_of_each[place], self._rows[place])
            batches[batch].append(place)
        allowed = max(1, most // self._served.micro_batch)
        if len(batches) > allowed:
            rule = f"must lie in at most {allowed} micro-batches of the build"
            raise Problem(413, "keys", rule, len(batches), "Ask for neighbours together, or send several requests.")
        found = [
            self._question(batch.view, range(batch.start, batch.stop), places) for batch, places in batches.items()
        ]
        return [question for question in found if question is not None]

    def whole(self) -> list[Question]:
        """The samples as one micro-batch, whose fillings are items, too; nothing where one of them is missing."""
        left, everything = self._left(), range(self._served.micro_batch)
        if not left and not self.unanswered:
            return []
        # The others would move up into the places of those that are missing.
        question = None if self.unanswered else self._question(self._named.view_of_each[0], self._rows, left)
        if question is None or self.unanswered:
            self.unanswered |= {place: Status.ABSENT for place in everything if place not in self.unanswered}
            return []
        return [Question(question.images_BCHW, everything, everything, question.identity)]

    def _left(self) -> list[int]:
        there = {place for part in self.parts for place in part.places} | self.unanswered.keys()
        return [place for place in range(len(self._rows)) if place not in there]

    def _question(self, view: int, together: Sequence[int], places: list[int]) -> Question | None:
        """One micro-batch with its fillings; None where nothing of it is wanted any more."""
        rendered = self._library.render(view, together, self._served.view_shape)
        where = {row: number for number, row in enumerate(rendered.rows.tolist())}
        self.unanswered |= {place: Status.BROKEN for place in places if self._rows[place] not in where}
        here = [place for place in places if place not in self.unanswered]
        self._compare(here, [rendered.digests[where[self._rows[place]]] for place in here])
        here = [place for place in here if place not in self.unanswered]
        if not here:
            return None
        images_BCHW = padded(rendered.views_BCHW, self._served.micro_batch)
        rows = [where[self._rows[place]] for place in here]
        return Question(images_BCHW, here, rows, wire.identity_of(images_BCHW))

    def _compare(self, places: Sequence[int], digests: Iterable[np.uint64]) -> None:
        if self._named.digests is None:
            return
        for place, digest in zip(places, digests, strict=True):
            if int(self._named.digests[place], 16) != int(digest):
                self.unanswered[place] = Status.DIFFERS

    def _without_unanswered(self, part: Part) -> Part:
        stay = [index for index, place in enumerate(part.places) if place not in self.unanswered]
        tensors = {name: value[stay] for name, value in part.tensors.items()}
        return Part([part.places[index] for index in stay], tensors, part.status)


def known_rows(library: Library, named: Named) -> tuple[list[int], dict[int, Status]]:
    """The row of each key, and why some have no answer."""
    rows, unanswered = library.rows_of(named.keys), dict[int, Status]()
    broken = library.broken(rows)
    for place, (row, view) in enumerate(zip(rows.tolist(), named.view_of_each, strict=True)):
        if row < 0 or not library.has_view(view):
            unanswered[place] = Status.UNKNOWN
        elif broken[place]:
            unanswered[place] = Status.BROKEN
    return rows.tolist(), unanswered


def look_up(served: ServedTeacher, named: Named, wanted: Wanted, *, most: int) -> list[Status | None]:
    """What `plan_named` would find, for each key: CACHED, why there is no answer, or None where it is computed.

    Views that the cache does not hold are made only where digests are to be compared with theirs.
    """
    planner = _Planner(served, named)
    planner.read(wanted)
    if named.digests is not None:
        planner.in_their_batches(most)
    found = planner.unanswered | {place: part.status for part in planner.parts for place in part.places}
    return [found.get(place) for place in range(len(named.keys))]
