"""Whether the audit's lines are all there, unchanged and in their order, and if not, where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.audit import head_of
from services.audit_lines import NOTHING, Place, read_line
from teacher_cache.errors import SpecError


@dataclass(frozen=True)
class Break:
    """Where the chain does not hold."""

    file: Path
    line: int
    """From 1; one more than the last where lines are missing at the end."""
    rule: str
    found: str


@dataclass(frozen=True)
class Verdict:
    """What was found in one file or several."""

    lines: int
    end: str
    """Hash of the last line. Kept elsewhere, it shows later whether anything was rewritten since."""
    breaks: tuple[Break, ...]


@dataclass
class _Chain:
    """What the next line has to follow."""

    sequence: int | None
    """Number of the line before; None where only its hash is known."""
    hash: str | None
    """None after a line that is not to be trusted."""


def verify(files: Sequence[Path], after: str | None = None, head: str | None = None) -> Verdict:
    """Reads the files, the oldest first, as one chain.

    Args:
        files: at least one.
        after: hash of the line before the first; without it, the chain must begin with the first line of all.
        head: hash of the last line; without it, that which the last file's `.head` states.

    Raises:
        SpecError: a file cannot be read, or nothing says where the chain ends.
    """
    chain = _Chain(0, NOTHING) if after is None else _Chain(None, after)
    breaks, lines, number = [], 0, 0
    end = _end(files[-1]) if head is None else head
    for file in files:
        number = 0
        for data in _lines(file):
            lines, number = lines + 1, number + 1
            breaks += [Break(file, number, rule, found) for rule, found in _judge(data, chain)]
    if chain.hash != end:
        found = f"{chain.hash or 'a line that was altered'}"
        breaks.append(Break(files[-1], number + 1, f"the chain must end with {end}", found))
    return Verdict(lines, chain.hash or "", tuple(breaks))


def _judge(data: bytes, chain: _Chain) -> Iterator[tuple[str, str]]:
    """What is wrong with the next line; moves the chain on to it."""
    line = read_line(data)
    if line is None:
        yield "must be as it was written", "cut" if not data.endswith(b"\n") else "altered"
        chain.sequence, chain.hash = None if chain.sequence is None else chain.sequence + 1, None
        return
    expected = line.sequence if chain.sequence is None else chain.sequence + 1
    if line.sequence != expected:
        yield f"must be number {expected}", f"{line.sequence}: lines were removed, inserted or swapped"
    elif chain.hash is not None and line.previous != chain.hash:
        yield f"must follow {chain.hash}", f"{line.previous}: the line before was replaced"
    chain.sequence, chain.hash = line.sequence, line.hash


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            yield from opened
    except OSError as error:
        raise SpecError("file", f"cannot be read: {error.strerror}", file, "Check the path.") from None


def _end(last: Path) -> str:
    path = head_of(last)
    place = Place.from_bytes(path.read_bytes()) if path.exists() else None
    if place is None:
        hint = "Give the files up to the last one, which has it, or --head HASH as an earlier verify printed it."
        raise SpecError("head", "must say where the chain ends", path, hint)
    return place.hash
