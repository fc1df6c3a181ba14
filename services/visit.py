"""What is known of one request: what the books, the log and the metrics are written from."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.identity import Caller
from services.timing import Spent
from services.usage import Ticket

UNROUTED = "(none)"
"""Stands for every path that is not one of the service's."""


@dataclass
class Visit:
    """One request. No text in it was chosen by a stranger, but for a well-formed request id."""

    request_id: str
    caller: Caller | None = None
    """None before the key is known, and at the probes."""
    route: str | None = None
    teacher: str | None = None
    images: int = 0
    outputs: tuple[str, ...] = ()
    limit: str | None = None
    """That of the policy which refused it."""
    ticket: Ticket | None = None
    """Reserved, and not yet settled."""
    listed: bool = True
    """Whether its answer has a line in the audit; a refusal always has."""
    method: str = ""
    """`other` where it is not one of HTTP's own."""
    status: int | None = None
    """None until an answer begins to leave."""
    bytes_in: int = 0
    """Of the body, as much of it as was read."""
    bytes_out: int = 0
    cache_hits: int = 0
    """Images that the cache answered."""
    cache_misses: int = 0
    """Images that it was asked for and did not have."""
    spent: Spent = field(default_factory=Spent)

    @property
    def answered(self) -> bool:
        """Whether it got what it asked for."""
        return self.status is not None and self.status < 400


__all__ = ["UNROUTED", "Visit"]
