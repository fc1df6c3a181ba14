"""Who asks: nobody comes in without a key, except to the two probes and the files of the page."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from services import keys
from services.keys import Key
from services.page import PATHS
from services.policy import Policy
from services.problems import Problem
from services.settings import Settings, is_loopback
from services.state_folder import StateFolder
from teacher_cache.errors import SpecError

_log = logging.getLogger("services")

OPEN_PATHS = frozenset({"/livez", "/readyz"})
"""The two probes: they say nothing about a teacher. The files of the page do not either: a browser fetches them
before it can be given a key."""
ENVIRONMENT, NOBODY = "TEACHER_API_KEY", "(no key)"
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
"""What a Host header calls this machine."""
"""Names that no key in a file can have: of the environment's key, and of whoever asks a server without any."""


@dataclass(frozen=True)
class Caller:
    """Who asks, and what they may."""

    name: str
    policy: Policy


class Doorkeeper:
    """Knows the keys. A change of the file counts from the next request on; used on the event loop only."""

    def __init__(self, settings: Settings, folder: StateFolder | None) -> None:
        """Reads the keys.

        Raises:
            SpecError: they cannot be read, or there are none behind an address beyond loopback.
        """
        self.open_paths = OPEN_PATHS | (PATHS if settings.page else frozenset())
        """Where nobody is asked for a key, and nothing is recorded."""
        self._folder, self._changing = folder, asyncio.Lock()
        self._secret = secrets.token_bytes(32) if folder is None else keys.secret_of(folder)
        given = settings.api_key
        self._environment = None if given is None else keys.digest(self._secret, given.get_secret_value().encode())
        self._version: object = self._stamp()
        self._keys: Mapping[str, Key] | None = {} if folder is None else keys.read(folder.keys).keys
        valid = [key for key in self._keys.values() if key.state(datetime.now(UTC)) == "valid"]
        if given is None and not valid and not is_loopback(settings.host):
            hint = "Make one: teacher-serve keys add NAME --state FOLDER."
            raise SpecError("host", "needs a valid key unless it is a loopback address", settings.host, hint)

    async def identify(self, path: str, authorization: bytes, host: str) -> Caller | None:
        """Who sends this header; None at the probes and for the page's files.

        Args:
            path: as the router sees it; unknown paths are refused like known ones, so that nothing can be probed.
            authorization: the header's raw bytes, empty where there is none.
            host: the header of that name.

        Raises:
            Problem: 421 where anybody may ask, and the request was meant for another machine; 401, the same for a
                missing, malformed, wrong and revoked key; 503 while the file cannot be read.
        """
        if path in self.open_paths:
            return None
        if self._folder is None and self._environment is None:
            if host_name(host) not in LOCAL_NAMES:
                # A page elsewhere whose name was made to mean this machine (DNS rebinding) would ask through a browser.
                hint = "Ask at 127.0.0.1, or have the server take keys: TEACHER_API_KEY, or --state FOLDER."
                raise Problem(421, "Host", "must be this machine's own name where no key is asked for", "another", hint)
            return Caller(NOBODY, Policy())
        if self._stamp() != self._version:
            async with self._changing:
                await self._reload()
        caller = self._find(authorization)
        if caller is None:
            if self._keys is None:
                hint = "Whoever runs this server has to repair the file."
                raise Problem(503, "keys", "must be readable", "a broken file", hint, {"Retry-After": "10"})
            hint = "Send `Authorization: Bearer <key>`."
            headers = {"WWW-Authenticate": "Bearer"}
            raise Problem(401, "Authorization", "must carry this server's key", "(hidden)", hint, headers)
        return caller

    def _find(self, authorization: bytes) -> Caller | None:
        scheme, _, given = authorization.partition(b" ")
        found = keys.digest(self._secret, given.strip())
        caller = None
        # All are compared, each in time that does not depend on where it differs, even where the scheme is wrong.
        if self._environment is not None and hmac.compare_digest(found, self._environment):
            caller = Caller(ENVIRONMENT, Policy())
        for name, key in (self._keys or {}).items():
            if hmac.compare_digest(found, key.hmac_sha256) and key.revoked is None:
                caller = Caller(name, key.policy)
        return caller if scheme.lower() == b"bearer" else None

    def _stamp(self) -> object:
        """Changes whenever the file is replaced: it never is while its successor has the same inode."""
        if self._folder is None:
            return None
        try:
            found = self._folder.keys.stat()
        except OSError as error:
            return error.errno
        return found.st_ino, found.st_mtime_ns, found.st_size

    async def _reload(self) -> None:
        version = self._stamp()
        if self._folder is None or version == self._version:
            return
        try:
            self._keys = (await asyncio.to_thread(keys.read, self._folder.keys)).keys
        except SpecError as error:
            # Not the keys of before: one of them may have been revoked.
            _log.error("no key of the file is taken: %s", error)
            self._keys = None
        self._version = version


def host_name(host: str) -> str:
    """A Host header without its port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host
