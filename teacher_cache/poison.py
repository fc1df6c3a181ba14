"""Poison: samples that kill the process that reads them, found by bisection and left out as tombstones.

A row that kills its worker in one view is a tombstone in every view, as one that cannot be decoded is: the sample
table has one status for a row. So that a cache does not depend on which view met the row first, every shard of its
range is made with the row left out of its micro-batch: those still to come from the start, and those that were
committed with it (it killed in a later view only) are made again. What is known is noted beside the receipts until the
addition is sealed, so that a build that is killed goes on with it, or finds it again: the rows that kill, each by
itself, are a property of source, recipe and teacher, and a build comes to their union over all views in whatever order
it meets them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from teacher_cache.addition import Addition
from teacher_cache.errors import BuildError, CorruptionError
from teacher_cache.receipts import Receipt
from teacher_cache.signed import checked, signed
from teacher_cache.storage.root import Root

KILLED = "killed its worker"
"""The reason that a tombstone has which was found by bisection; part of the format."""

MOST = 8
"""Samples of one shard that may be poison; where there are more, it is rather the model or the machine."""

_HINT = "Run with --executor serial to see why; memory is the usual reason."


FOLDER = "poison"
_NAME = re.compile(FOLDER + r"/v(\d{4,})-s(\d{6,})\.json")


def note_poison(root: Root, addition: Addition, view: int, shard: int, rows: Sequence[int]) -> None:
    """Notes which rows of a shard were found to kill, when its work in this view (and others) was looked into."""
    body = {"identity": addition.identity.whole, "view": view, "shard": shard, "rows": sorted(rows)}
    root.write(f"{FOLDER}/v{view:04d}-s{shard:06d}.json", signed(body))


def known_poison(root: Root, addition: Addition) -> dict[int, tuple[int, ...]]:
    """By shard, the rows that kill in any of its views.

    Raises:
        CorruptionError: a note is not what was written.
    """
    found: dict[int, set[int]] = {}
    for name in root.names(f"{FOLDER}/"):
        if not is_note(name):
            continue
        body = checked(root.read(name), name)
        start, stop = addition.span(body["shard"])
        if body["identity"] != addition.identity.whole or any(not start <= row < stop for row in body["rows"]):
            raise CorruptionError(name, "must be of this cache and of its shard", body, "Remove it: it is found again.")
        found.setdefault(body["shard"], set()).update(body["rows"])
    return {shard: tuple(sorted(rows)) for shard, rows in found.items()}


def is_note(name: str) -> bool:
    """Whether a path below a cache's root is such a note."""
    return _NAME.fullmatch(name) is not None


def is_current(receipt: Receipt, poison: Sequence[int]) -> bool:
    """Whether a shard was made without all these rows; otherwise it must be made again."""
    return {row for row, _ in receipt.tombstones}.issuperset(poison)


def find_poison(
    place: str, rows: Sequence[int], kills: Callable[[Sequence[int]], bool], attempts: int
) -> tuple[int, ...]:
    """Bisects rows that killed a worker together, down to single samples that kill by themselves.

    Needs at most 1 + (MOST + 1) · (2 · ⌈log₂ rows⌉ + attempts) probes.

    Args:
        place: names the shard in errors.
        rows: those whose shard has killed its worker `attempts` times.
        kills: does with these rows of the shard all that the build does, short of committing, in a process of its
            own; True where that died.
        attempts: a sample is poison only if it kills alone so many times, because a worker may die for other reasons.

    Raises:
        BuildError: no sample is to blame: the worker dies without any, or two halves survive that died together;
            or more than `MOST`, or all of them, are.
    """
    died = f"killed its worker {attempts} times"
    if kills(()):
        raise BuildError(place, died, "dies without a sample too", _HINT)
    found: list[int] = []
    suspects = [list(rows)]
    while suspects:
        suspect = suspects.pop()
        if len(suspect) == 1:
            if not all(kills(suspect) for _ in range(attempts - 1)):
                raise BuildError(place, died, f"row {suspect[0]} alone kills now and then only", _HINT)
            found += suspect
            if len(found) > MOST:
                rule = f"{died}, and more than {MOST} of its samples do so alone"
                raise BuildError(place, rule, f"rows {sorted(found)}", _HINT)
            continue
        middle = len(suspect) // 2
        deadly = [half for half in (suspect[:middle], suspect[middle:]) if kills(half)]
        if not deadly:
            survived = f"rows {suspect[0]}..{suspect[-1]} die together, and neither half alone"
            raise BuildError(place, f"{died}, and no single sample does", survived, _HINT)
        suspects += reversed(deadly)
    if len(found) == len(rows) > 1:
        raise BuildError(place, f"{died}, and every one of its samples does so alone", f"rows {found}", _HINT)
    return tuple(sorted(found))
