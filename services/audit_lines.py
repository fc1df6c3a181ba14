"""The lines of the audit: canonical JSON, each with its own SHA-256 and that of the line before."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teacher_cache.fingerprint import canonical_json

NOTHING = "0" * 64
"""What the first line of all names as the line before."""
_HEAD = re.compile(rb"([0-9]{20}) ([0-9a-f]{64}) ([0-9]{20})\n")


@dataclass(frozen=True)
class Place:
    """The last line of a chain."""

    sequence: int = 0
    """Its number; the first has 1."""
    hash: str = NOTHING
    size: int = 0
    """Bytes of its file up to it."""

    def to_bytes(self) -> bytes:
        """Always as long, so that it can be overwritten in one go."""
        return f"{self.sequence:020} {self.hash} {self.size:020}\n".encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Place | None:
        """None where it is not one."""
        found = _HEAD.fullmatch(data)
        return cls(int(found[1]), found[2].decode(), int(found[3])) if found else None


@dataclass(frozen=True)
class Line:
    """A line that is what it says of itself."""

    sequence: int
    previous: str
    hash: str


def line_after(place: Place, facts: Mapping[str, Any]) -> tuple[bytes, Place]:
    """The next line, and its place."""
    body = {**facts, "sequence": place.sequence + 1, "previous": place.hash}
    found = hashlib.sha256(canonical_json(body)).hexdigest()
    data = canonical_json({**body, "hash": found}) + b"\n"
    return data, Place(place.sequence + 1, found, place.size + len(data))


def read_line(data: bytes) -> Line | None:
    """A line with its line feed; None where it is not, byte for byte, what `line_after` has made."""
    try:
        body = json.loads(data)
        del body["hash"]
        found = hashlib.sha256(canonical_json(body)).hexdigest()
        # The bytes are compared: JSON that parses to the same values is still not what was written.
        same = canonical_json({**body, "hash": found}) + b"\n" == data
        line = Line(body["sequence"], body["previous"], found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return line if same and type(line.sequence) is int and type(line.previous) is str else None
