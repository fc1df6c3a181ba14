"""Named keys in a file: their HMAC-SHA256 under the server's secret, never the keys themselves."""

from __future__ import annotations

import hmac
import json
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field, StringConstraints, model_validator

from services.policy import Policy
from services.state_folder import StateFolder, write_private
from teacher_cache.errors import SpecError
from teacher_cache.spec import Strict, parse

KeyName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
_LOCK = "keys"
_PREFIX = "ts_"
"""By it a key is known where it should not be, in a log or a repository."""


class Key(Strict):
    """One key. The file says this of it and no more."""

    hmac_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    created: AwareDatetime
    revoked: AwareDatetime | None = None
    policy: Policy = Policy()

    def state(self, now: datetime) -> str:
        """`valid`, `revoked` or `expired`."""
        if self.revoked is not None:
            return "revoked"
        expires = self.policy.expires
        return "expired" if expires is not None and now >= expires else "valid"


class KeyFile(Strict):
    """`keys.json`."""

    format: Literal[1] = 1
    keys: dict[KeyName, Key] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _distinct(self) -> KeyFile:
        first: dict[str, str] = {}
        for name, key in self.keys.items():
            # A copied entry would let a key live on that was revoked under its other name.
            other = first.setdefault(key.hmac_sha256, name)
            if other != name:
                raise SpecError("keys", f"must differ; this one is also {other}", name, "Make a key for each name.")
        return self


def digest(secret: bytes, key: bytes) -> str:
    """What is kept of a key: HMAC-SHA256, 64 hexadecimal digits."""
    return hmac.digest(secret, key, "sha256").hex()


def read(path: Path) -> KeyFile:
    """The keys of a file; none where there is no file.

    Raises:
        SpecError: it is not such a file.
    """
    hint = f"Correct {path}, or restore it from a copy."
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return KeyFile()
    except OSError as error:
        raise SpecError("keys", f"cannot be read: {error.strerror}", path, hint) from None
    except (ValueError, RecursionError):
        raise SpecError("keys", "must be JSON", path, hint) from None
    return parse(KeyFile, data, str(path))


def add(folder: StateFolder, name: str, policy: Policy) -> str:
    """Makes a key and gives it back: the only time that it is seen.

    Raises:
        SpecError: the name is malformed or was used before, by a revoked key too.
    """
    with folder.locked(_LOCK, wait=True):
        secret = folder.read_secret(make=True)
        found = read(folder.keys)
        if name in found.keys:
            hint = "Choose another: usage and audit know a key by its name, so a name is not used twice."
            raise SpecError("name", "must be new", name, hint)
        key = _PREFIX + secrets.token_urlsafe(32)
        entry = Key(hmac_sha256=digest(secret, key.encode()), created=_now(), policy=policy)
        _write(folder, {**found.keys, name: entry})
    return key


def revoke(folder: StateFolder, name: str) -> bool:
    """Ends a key for good; False where that was done before.

    Raises:
        SpecError: there is no key of this name.
    """
    with folder.locked(_LOCK, wait=True):
        found = read(folder.keys)
        if name not in found.keys:
            known = ", ".join(found.keys) or "none"
            raise SpecError("name", "must be one of the keys", name, f"There are: {known}.")
        entry = found.keys[name]
        if entry.revoked is not None:
            return False
        _write(folder, {**found.keys, name: entry.model_copy(update={"revoked": _now()})})
    return True


def listed(folder: StateFolder, now: datetime) -> list[dict[str, Any]]:
    """Names, states and limits; nothing that a key could be known by.

    Raises:
        SpecError: the file cannot be read.
    """
    found = read(folder.keys).keys
    described = {name: key.model_dump(mode="json", exclude={"hmac_sha256"}) for name, key in found.items()}
    return [{"name": name, "state": found[name].state(now), **body} for name, body in described.items()]


def secret_of(folder: StateFolder) -> bytes:
    """The secret, made where the folder is new."""
    with folder.locked(_LOCK, wait=True):
        return folder.read_secret(make=True)


def _write(folder: StateFolder, keys: dict[str, Key]) -> None:
    # Checked before it is written: a bad name must not leave a file that nobody can read.
    body = parse(KeyFile, {"keys": keys}, "the command line")
    text = json.dumps(body.model_dump(mode="json", exclude_defaults=True) | {"format": 1}, indent=2)
    write_private(folder.keys, f"{text}\n".encode())


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
