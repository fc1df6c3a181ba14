"""All that a server knows about who asks: the keys, what they have spent, and the audit."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from services.audit import Audit
from services.identity import Caller, Doorkeeper
from services.schemas import UsageReport
from services.scribe import Scribe
from services.settings import Settings
from services.state_folder import StateFolder
from services.usage import SECOND, Ticket, Usage
from services.usage_file import UsageFile

T = TypeVar("T")


@dataclass
class Visit:
    """One request, as the books see it. No text in it was chosen by a stranger, but for a well-formed request id."""

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


class Unrecorded(Exception):  # noqa: N818 - told to the client as a problem
    """The books could not be written, so the answer must not leave."""


class Books:
    """Opened once for each server; its threads run between `start` and `close`."""

    def __init__(self, settings: Settings, clock: Callable[[], int] = time.time_ns) -> None:
        """Takes the folder; without one, everything is in memory and there is no audit.

        Args:
            settings: where the folder is.
            clock: nanoseconds of Unix time.

        Raises:
            SpecError: the folder is another server's, cannot be used, or has no keys where some are needed.
        """
        self._clock = clock
        folder = None if settings.state is None else StateFolder(settings.state)
        with contextlib.ExitStack() as opened:
            if folder is not None:
                opened.enter_context(folder.locked("server", wait=False))
            self.doorkeeper = Doorkeeper(settings, folder)
            file = UsageFile(None if folder is None else folder.usage)
            opened.callback(file.close)
            self._usage = Usage(file)
            self._scribes = [Scribe("usage", self._usage)]
            self._audit = None if folder is None else Audit(folder.audit)
            if self._audit is not None:
                opened.callback(self._audit.close)
                self._scribes.append(Scribe("audit", self._audit))
            self._opened = opened.pop_all()

    def start(self) -> None:
        """Starts the threads."""
        for scribe in self._scribes:
            scribe.start()

    def close(self) -> None:
        """Ends the threads once they have written what waits, and gives the folder back; may be called twice."""
        for scribe in self._scribes:
            scribe.stop()
        self._opened.close()

    @property
    def now(self) -> datetime:
        """The time that counts, in UTC."""
        return datetime.fromtimestamp(self._clock() / SECOND, UTC)

    async def reserve(self, visit: Visit, ticket: Ticket) -> None:
        """Sets aside what a request needs, until it is recorded or released.

        Raises:
            OverBudget: a budget has no room.
        """
        # Before it is asked for: if this is cancelled, `release` follows the reservation in the queue.
        visit.ticket = ticket
        await self._usage_does(lambda: self._usage.reserve(ticket, self._clock()), durable=False)

    def release(self, visit: Visit) -> None:
        """Gives back what was reserved and not recorded as answered."""
        ticket, visit.ticket = visit.ticket, None
        if ticket is not None:
            self._scribes[0].submit(lambda: self._usage.release(ticket), durable=False)

    async def record(self, visit: Visit, status: int) -> None:
        """Before an answer leaves: what it costs is paid, or given back, and the audit has its line.

        Raises:
            Unrecorded: the disk did not take it; then nothing may leave.
        """
        try:
            ticket = visit.ticket
            if ticket is not None and status < 400:
                await self._usage_does(lambda: self._usage.settle(ticket), durable=True)
                visit.ticket = None
            self.release(visit)
            if self._audit is not None and (visit.listed or status >= 400):
                facts, append = _facts(visit, status, self.now), self._audit.append
                await asyncio.wrap_future(self._scribes[1].submit(lambda: append(facts), durable=True))
        except (OSError, sqlite3.Error) as error:
            raise Unrecorded(repr(error)) from error

    async def report(self, caller: Caller) -> UsageReport:
        """What a key has used and has left."""
        return await self._usage_does(
            lambda: self._usage.report(caller.name, caller.policy, self._clock()), durable=False
        )

    async def _usage_does(self, work: Callable[[], T], *, durable: bool) -> T:
        return await asyncio.wrap_future(self._scribes[0].submit(work, durable=durable))


def _facts(visit: Visit, status: int, now: datetime) -> dict[str, Any]:
    return {
        "time": now.isoformat(timespec="milliseconds"),
        "request_id": visit.request_id,
        "key": None if visit.caller is None else visit.caller.name,
        "route": visit.route,
        "teacher": visit.teacher,
        "images": visit.images,
        "outputs": list(visit.outputs),
        "decision": "answered" if status < 400 else "refused" if status < 500 or status == 503 else "failed",
        "status": status,
        "limit": visit.limit,
    }
