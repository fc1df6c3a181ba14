"""One kept connection to a teacher's URL: asks, waits when told to, and turns problems into `ServiceError`."""

from __future__ import annotations

import os
import time
import weakref
from typing import Any

import httpx

from teacher_cache.errors import ServiceError, TeacherError

KEY_VARIABLE = "TEACHER_API_KEY"
_BUSY = (429, 503)
_LONGEST_WAIT = 30.0


class Connection:
    """Safe to use from several threads."""

    def __init__(self, url: str, api_key: str | None, timeout: float, attempts: int) -> None:
        """Asks nothing yet.

        Args:
            url: `http://host:port/<teacher>`.
            api_key: bearer key; the variable TEACHER_API_KEY where None.
            timeout: seconds that one request may take.
            attempts: tries while the service answers 429 or 503.

        Raises:
            TeacherError: the URL names no teacher, or no header can carry the key.
        """
        base, _, name = url.rstrip("/").rpartition("/")
        if not name or not _host(base):
            hint = "For example http://127.0.0.1:8000/teacher."
            raise TeacherError("teacher.model", "must be http(s)://host:port/<teacher>", url, hint)
        self.url, self._attempts = url, attempts
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            hint = "Check the configuration and TEACHER_API_KEY."
            raise TeacherError("teacher.api_key", "must be visible ASCII characters", "(hidden)", hint)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._root = f"{base}/v1/teachers/{name}"
        self._http = httpx.Client(headers=headers, timeout=timeout)
        self.close = weakref.finalize(self, self._http.close)
        """Closes the connection; also done when this object is forgotten."""

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        options: dict[str, Any] | None = None,
    ) -> bytes:
        """The body of a successful answer.

        Raises:
            ServiceError: refused, still busy after the last attempt, or not reached.
        """
        for attempt in range(1, self._attempts + 1):
            try:
                answer = self._http.request(method, self._root + path, content=body, headers=headers, params=options)
            except httpx.TimeoutException as error:
                hint = "Allow more time, or ask for fewer images."
                raise ServiceError(self.url, "did not answer in time", repr(error), hint) from error
            except httpx.HTTPError as error:
                hint = "Is the service running there? Start it: teacher-serve CONFIG."
                raise ServiceError(self.url, "could not be reached", repr(error), hint) from error
            if answer.is_success:
                return answer.content
            if answer.status_code not in _BUSY or attempt == self._attempts:
                break
            time.sleep(_wait(answer, attempt))
        raise _refusal(self.url, answer)


def _host(base: str) -> str:
    """The host of a URL; empty where it is none."""
    try:
        parsed = httpx.URL(base)
    except httpx.InvalidURL:
        return ""
    return parsed.host if parsed.scheme in ("http", "https") else ""


def _wait(answer: httpx.Response, attempt: int) -> float:
    """Seconds until the next try: what the service asks for, else twice as long each time."""
    asked = answer.headers.get("retry-after", "")
    return min(float(asked) if asked.isdigit() else 0.1 * 2**attempt, _LONGEST_WAIT)


def _refusal(url: str, answer: httpx.Response) -> ServiceError:
    """The problem in the answer, as the product's own error."""
    try:
        problem = answer.json()
        field, rule, value, hint = (str(problem[name]) for name in ("field", "rule", "value", "hint"))
    except (ValueError, KeyError, TypeError):
        hint = "Check the URL: is it a teacher-serve?"
        return ServiceError(url, "must answer success or a problem", answer.status_code, hint)
    return ServiceError(f"{field} (HTTP {answer.status_code} from {url})", rule, value, hint)
