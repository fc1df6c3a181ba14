"""One kept connection to a teacher's URL: a request out, an answer in."""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import httpx

from services.retries import Patience, Retries
from teacher_cache.errors import TeacherError

KEY_VARIABLE = "TEACHER_API_KEY"
_CONNECT = 10.0
"""Seconds in which a host that is there accepts a connection."""


@dataclass(frozen=True)
class Asked:
    """A request, but for where it goes."""

    method: str
    path: str
    """Below the teacher's root."""
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Address:
    """Where a teacher is, and who asks."""

    url: str
    """As the user gave it."""
    root: str
    headers: dict[str, str] = field(repr=False)

    @classmethod
    def of(cls, url: str, api_key: str | None, where: str = "teacher.model") -> Address:
        """Takes a URL apart.

        Args:
            url: `http://host:port/<teacher>`.
            api_key: bearer key; the variable TEACHER_API_KEY where None.
            where: who gave the URL, for messages.

        Raises:
            TeacherError: the URL names no teacher, or no header can carry the key.
        """
        base, _, name = url.rstrip("/").rpartition("/")
        if not name or not _host(base):
            hint = "For example http://127.0.0.1:8000/teacher."
            raise TeacherError(where, "must be http(s)://host:port/<teacher>", url, hint)
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            hint = "Check the configuration and TEACHER_API_KEY."
            raise TeacherError("teacher.api_key", "must be visible ASCII characters", "(hidden)", hint)
        return cls(url, f"{base}/v1/teachers/{name}", {"Authorization": f"Bearer {key}"} if key else {})


def client_options(address: Address, timeout: float, connections: int) -> dict[str, Any]:
    """What httpx's clients, sync and async, are made with."""
    return {
        "headers": address.headers,
        "timeout": httpx.Timeout(timeout, connect=min(timeout, _CONNECT), pool=None),
        "limits": httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
    }


class Connection:
    """Safe to use from several threads."""

    def __init__(self, address: Address, timeout: float, connections: int = 32) -> None:
        """Asks nothing yet.

        Args:
            address: whom to ask.
            timeout: seconds that one request may take.
            connections: requests that may be under way at once.
        """
        self.url, self._root = address.url, address.root
        self._http = httpx.Client(**client_options(address, timeout, connections))
        self.close = weakref.finalize(self, self._http.close)
        """Closes the connection; also done when this object is forgotten."""

    def once(self, asked: Asked) -> httpx.Response:
        """One try; raises `httpx.HTTPError` where no answer came, not all of it, or one that is no success."""
        answer = self._http.request(
            asked.method, self._root + asked.path, content=asked.body, headers=asked.headers, params=asked.options
        )
        # Nothing is redirected: a body that is paid for goes to whom it was meant for.
        return answer.raise_for_status()

    def send(self, asked: Asked, patience: Patience) -> bytes:
        """The body of a successful answer.

        Raises:
            ServiceError: refused, still busy after the last try, or not reached.
        """
        retries = Retries(self.url, patience)
        while True:
            try:
                return self.once(asked).content
            except httpx.HTTPError as error:
                seconds = retries.after(error)
            time.sleep(seconds)


def _host(base: str) -> str:
    """The host of a URL; empty where it is none."""
    try:
        parsed = httpx.URL(base)
    except httpx.InvalidURL:
        return ""
    return parsed.host if parsed.scheme in ("http", "https") else ""
