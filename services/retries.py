"""Whether a question is asked again, and when: one set of rules for the sync client, the async one and a build.

429 is about us: the service has told when our budget has room again, so we wait exactly so long, and where it has
not told, or longer than our patience, we give up. 503 is about them: we come back later and later, at moments drawn
at random, so that a service that recovers is not met by everybody at once. What fails on the way (not reached, cut
off, too late, or a gateway's 502 and 504) is tried again a few times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from teacher_cache.errors import ServiceError

_GATEWAY = (502, 504)
_NEVER_ARRIVED = (httpx.ConnectError, httpx.ConnectTimeout)


@dataclass(frozen=True)
class Patience:
    """How long one question is asked again."""

    attempts: int = 8
    """Tries in all, the first included."""
    faults: int = 4
    """Of them those that may fail on the way."""
    seconds: float = 600.0
    """Waited between all of them together."""
    first: float = 0.1
    """Seconds after the first fault or 503 without Retry-After; twice as long after each further one."""
    longest: float = 30.0
    """Seconds that are never exceeded by such doubling."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.faults < 1 or self.seconds < 0 or not 0 < self.first <= self.longest:
            raise ValueError(f"impossible: {self}")


class Retries:
    """The tries of one question."""

    def __init__(self, url: str, patience: Patience, draw: Callable[[], float] = random.random) -> None:
        """Nothing has been tried yet.

        Args:
            url: whom it is about, for messages.
            patience: when to give up.
            draw: uniform in [0, 1); jitter needs no seed, for it decides no byte.
        """
        self._url, self._patience, self._draw = url, patience, draw
        self._started = time.monotonic()
        self._attempts = self._faults = self._busy = 0
        self._waited = 0.0

    def after(self, error: httpx.HTTPError) -> float:
        """Seconds to wait after a try that failed, on its way or with an answer that is no success.

        Raises:
            ServiceError: it is not made again.
        """
        self._attempts += 1
        status = status_of(error)
        seconds: float | None = None
        if status == 429:
            seconds = retry_after(error)
        elif status == 503:
            self._busy += 1
            seconds = max(retry_after(error) or 0.0, self._backed_off(self._busy))
        elif status is None or status in _GATEWAY:
            self._faults += 1
            seconds = self._backed_off(self._faults) if self._faults < self._patience.faults else None
        too_often = self._attempts >= self._patience.attempts
        if seconds is None or too_often or self._waited + seconds > self._patience.seconds:
            raise self._given_up(error, seconds) from error
        self._waited += seconds
        return seconds

    def _given_up(self, error: httpx.HTTPError, seconds: float | None) -> ServiceError:
        tried = f"; {self._attempts} tries in {time.monotonic() - self._started:.1f} s"
        if isinstance(error, httpx.HTTPStatusError):
            if status_of(error) == 429 and seconds is None:
                tried = "; it does not say when to come back"
            elif seconds is not None and seconds > self._patience.seconds:
                tried = f"; come back in {seconds:g} s, and our patience is {self._patience.seconds:g} s"
            return refusal(self._url, error.response, tried if self._is_repeated(error) else "")
        if isinstance(error, httpx.TimeoutException):
            hint = "Allow more time, or ask for fewer images."
            return ServiceError(self._url, "did not answer in time", f"{error!r}{tried}", hint)
        rule = "could not be reached" if never_arrived(error) else "broke off its answer"
        hint = "Is the service running there? Start it: teacher-serve CONFIG."
        return ServiceError(self._url, rule, f"{error!r}{tried}", hint)

    def _is_repeated(self, error: httpx.HTTPError) -> bool:
        return status_of(error) in (429, 503, *_GATEWAY)

    def _backed_off(self, count: int) -> float:
        """Between a half and the whole of a time that doubles."""
        whole = min(self._patience.first * 2.0 ** (count - 1), self._patience.longest)
        return whole * (0.5 + self._draw() / 2)


def status_of(error: httpx.HTTPError) -> int | None:
    """The status of the answer that is no success; None where there was no answer, or not all of it."""
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None


def never_arrived(error: httpx.HTTPError) -> bool:
    """Whether a request that failed so has certainly not reached anybody."""
    return isinstance(error, _NEVER_ARRIVED)


def perhaps_paid(error: httpx.HTTPError) -> bool:
    """Whether the work may have been done all the same: the answer was lost, or a gateway or a defect hides it."""
    status = status_of(error)
    return not never_arrived(error) if status is None else status >= 500 and status != 503


def retry_after(error: httpx.HTTPError) -> float | None:
    """Seconds, from a number or a date (RFC 9110, 10.2.3); None where nothing, or nonsense, is said."""
    asked = error.response.headers.get("retry-after", "").strip() if isinstance(error, httpx.HTTPStatusError) else ""
    if asked.isascii() and asked.isdigit():
        return float(asked)
    try:
        when = parsedate_to_datetime(asked)
    except (TypeError, ValueError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def refusal(url: str, answer: httpx.Response, tried: str = "") -> ServiceError:
    """The problem in an answer, as the product's own error."""
    try:
        problem = answer.json()
        field, rule, value, hint = (str(problem[name]) for name in ("field", "rule", "value", "hint"))
    except (ValueError, KeyError, TypeError):
        hint = "Check the URL: is it a teacher-serve?"
        return ServiceError(url, "must answer success or a problem", f"{answer.status_code}{tried}", hint)
    return ServiceError(f"{field} (HTTP {answer.status_code} from {url})", rule, f"{value}{tried}", hint)
