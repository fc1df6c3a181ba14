"""Poison: samples that kill the process that reads them, found by bisection and left out as tombstones.

A row that kills its worker in one view is a tombstone in every view, as one that cannot be decoded is: the sample
table has one status for a row. So that a cache does not depend on which view met the row first, every shard of its
range is made with the row left out of its micro-batch: those still to come from the start, and those that were
committed with it (it killed in a later view only) are made again. What is known lies in the receipts alone, so that
a build that is killed goes on with it, or finds it again: the rows that kill, each by itself, are a property of
source, recipe and teacher, and a build comes to their union over all views in whatever order it meets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from teacher_cache.errors import BuildError
from teacher_cache.receipts import Receipt

KILLED = "killed its worker"
"""The reason that a tombstone has which was found by bisection; part of the format."""

MOST = 8
"""Samples of one shard that may be poison; where there are more, it is rather the model or the machine."""

_HINT = "Run with --executor serial to see why; memory is the usual reason."


def left_out(receipt: Receipt) -> tuple[int, ...]:
    """The rows that a shard was made without because they kill."""
    return tuple(row for row, reason in receipt.tombstones if reason == KILLED)


def known_poison(receipts: Iterable[Receipt]) -> dict[int, tuple[int, ...]]:
    """By shard, the rows that kill in any of its views."""
    found: dict[int, set[int]] = {}
    for receipt in receipts:
        if rows := left_out(receipt):
            found.setdefault(receipt.shard, set()).update(rows)
    return {shard: tuple(sorted(rows)) for shard, rows in found.items()}


def is_current(receipt: Receipt, poison: Sequence[int]) -> bool:
    """Whether a shard was made without all these rows; otherwise it must be made again."""
    return {row for row, _ in receipt.tombstones}.issuperset(poison)


def committed(receipts: Sequence[Receipt], poison: Mapping[int, Sequence[int]]) -> set[tuple[int, int]]:
    """The (view, shard) pairs that need not be made again."""
    return {(item.view, item.shard) for item in receipts if is_current(item, poison.get(item.shard, ()))}


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
