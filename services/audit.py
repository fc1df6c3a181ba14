"""The audit: who asked what, and what became of it. Append-only lines, each of which names the one before.

A line is on the disk (fsync, one for all that wait together) before its answer leaves; the probes have none. To
rotate, move the file away, running or not: the next line begins a new file, and the chain goes on. `audit.head`, of
one fixed size and overwritten in place, says where the chain ends, so that lines missing at the end are noticed. It
may be a few lines behind after a crash; what follows it then is taken over at the next start where it fits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.audit_lines import Place, line_after, read_line
from services.state_folder import write_private
from teacher_cache.errors import SpecError
from teacher_cache.storage.files import sync_folder

_HINT = "`teacher-serve audit verify FILE` says where. Move all audit files away to begin a new chain."


def head_of(path: Path) -> Path:
    """Where it is kept how far a file goes."""
    return path.with_suffix(".head")


class Audit:
    """Not thread-safe: a `Scribe` calls it."""

    def __init__(self, path: Path) -> None:
        """Goes on where the chain ends.

        Raises:
            SpecError: the files do not fit each other, or cannot be written.
        """
        self._path = path
        self._lines: list[bytes] = []
        self._torn = False
        try:
            self._kept = self._next = _end(path)
            self._head = os.open(head_of(path), os.O_WRONLY)
            self._file = _open(path)
            os.ftruncate(self._file, self._kept.size)
            os.pwrite(self._head, self._kept.to_bytes(), 0)
        except OSError as error:
            raise SpecError("state", f"must hold a writable audit: {error.strerror}", path, "Check it.") from None

    def close(self) -> None:
        """Closes the files."""
        os.close(self._file)
        os.close(self._head)

    def append(self, facts: Mapping[str, Any]) -> None:
        """A line, kept with the next commit. No payloads and no keys, and no text that a stranger chose."""
        line, self._next = line_after(self._next, facts)
        self._lines.append(line)

    def commit(self) -> None:
        """Its lines are on the disk."""
        if self._torn:
            os.ftruncate(self._file, self._kept.size)
            self._torn = False
        self._follow_rotation()
        data = b"".join(self._lines)
        if os.write(self._file, data) != len(data):
            raise OSError("the disk took a part of the lines only")
        os.fsync(self._file)
        os.pwrite(self._head, self._next.to_bytes(), 0)
        self._kept, self._lines = self._next, []

    def rollback(self) -> None:
        """The lines since the last commit are forgotten; what is left of them in the file goes with the next one."""
        self._next, self._lines, self._torn = self._kept, [], True

    def _follow_rotation(self) -> None:
        """A file that was moved away is left as it is; the lines that wait begin a new one."""
        if self._path.exists() and os.path.samestat(self._path.stat(), os.fstat(self._file)):
            return
        new = _open(self._path)
        os.close(self._file)
        self._file, before = new, self._kept.size
        self._kept = replace(self._kept, size=0)
        self._next = replace(self._next, size=self._next.size - before)


def _end(path: Path) -> Place:
    """Where the chain ends: what the head says, and whole lines behind it that a crash has left."""
    head, size = head_of(path), path.stat().st_size if path.exists() else 0
    if not head.exists():
        if size:
            raise SpecError("state", "must hold the head of its audit", head, _HINT)
        write_private(head, Place().to_bytes())
    place = Place.from_bytes(head.read_bytes())
    if place is None:
        raise SpecError("state", "must hold a whole head of its audit", head, _HINT)
    if not size:
        return replace(place, size=0)
    if size < place.size:
        raise SpecError("state", f"must hold all of its audit, {place.size} bytes", f"{path}: {size} bytes", _HINT)
    with path.open("rb") as file:
        file.seek(place.size)
        for data in file:
            if not data.endswith(b"\n"):
                break
            line = read_line(data)
            if line is None or (line.sequence, line.previous) != (place.sequence + 1, place.hash):
                raise SpecError("state", "must hold an audit whose end fits its head", path, _HINT)
            place = Place(line.sequence, line.hash, place.size + len(data))
    return place


def _open(path: Path) -> int:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    sync_folder(path.parent)
    return handle
