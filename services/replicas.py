"""Several places where one teacher is served: whoever is up is asked, and who comes back is asked again."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import httpx

from services.prediction import CARD, read_card
from services.retries import Patience, refusal, retry_after, status_of
from services.same_teacher import require_replica
from services.schemas import TeacherCard
from services.transport import Asked, Connection

_FIRST_REST, _LONGEST_REST = 0.5, 30.0
"""Seconds for which a replica that failed is not asked while another is up; doubled each time."""


@dataclass(eq=False)
class Replica:
    """One of them, and how it has been lately."""

    connection: Connection
    compared: bool = False
    """Whether it has shown its card since it was last away."""
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    """On the monotonic clock."""


class Replicas:
    """Safe to use from several threads."""

    def __init__(self, connections: list[Connection]) -> None:
        """Asks nothing yet; `first_card` is first."""
        self._all = [Replica(connection) for connection in connections]
        self._card: TeacherCard | None = None
        self._lock = threading.Lock()
        self._next = 0

    def first_card(self, patience: Patience) -> TeacherCard:
        """The card of the first replica that can be reached, with which all others will be compared.

        Raises:
            ServiceError: one refuses, or none can be reached.
        """
        for replica in self._all[:-1]:
            try:
                data = replica.connection.once(CARD).content
            except httpx.HTTPError as error:
                if isinstance(error, httpx.HTTPStatusError) and not _is_away(error):
                    raise refusal(replica.connection.url, error.response) from error
                self._rest(replica)
            else:
                return self._first(replica, data)
        last = self._all[-1]
        return self._first(last, last.connection.send(CARD, patience))

    def _first(self, replica: Replica, data: bytes) -> TeacherCard:
        self._card = read_card(replica.connection.url, data)
        replica.compared = True
        return self._card

    def ready(self) -> Replica:
        """One that is up, in turn, and has shown that it is the same teacher.

        Raises:
            httpx.HTTPError: it is away, or refuses; another is next.
            ServiceError: it is another teacher, or no teacher service.
        """
        replica = self._choose()
        if not replica.compared:
            url = replica.connection.url
            assert self._card is not None, "first_card was first"
            require_replica(self._card, read_card(url, self.once(replica, CARD).content), url)
            replica.compared = True
        return replica

    def is_one_up(self) -> bool:
        """Whether another try need not wait."""
        return any(replica.rests_until <= time.monotonic() for replica in self._all)

    def once(self, replica: Replica, asked: Asked) -> httpx.Response:
        """One try there; `httpx.HTTPError` where it fails: the next one is made elsewhere."""
        try:
            answer = replica.connection.once(asked)
        except httpx.HTTPError as error:
            if _is_away(error):
                self._rest(replica, retry_after(error) or 0.0)
            raise
        replica.failures = 0
        return answer

    def close(self) -> None:
        """Closes the connections."""
        for replica in self._all:
            replica.connection.close()

    def _choose(self) -> Replica:
        with self._lock:
            now = time.monotonic()
            turn = self._all[self._next :] + self._all[: self._next]
            self._next = (self._next + 1) % len(self._all)
            # Where none is up, the one that should be back first.
            return min(turn, key=lambda replica: max(replica.rests_until, now))

    def _rest(self, replica: Replica, least: float = 0.0) -> None:
        with self._lock:
            replica.failures += 1
            replica.compared = False
            seconds = max(least, min(_FIRST_REST * 2.0 ** (replica.failures - 1), _LONGEST_REST))
            replica.rests_until = time.monotonic() + seconds


def _is_away(error: httpx.HTTPError) -> bool:
    """Whether another one may do better: it cannot be reached, broke off, or has no room."""
    status = status_of(error)
    return status is None or status >= 500
