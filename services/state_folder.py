"""The folder in which a server keeps its keys, what they have used, and the audit. For its owner's eyes only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.errors import SpecError
from teacher_cache.storage.files import sync_folder

_OTHERS = 0o077


@dataclass(frozen=True)
class StateFolder:
    """Where each part lies; nothing is made before it is needed."""

    path: Path

    @property
    def keys(self) -> Path:
        """Names, digests and policies; may be edited by hand."""
        return self.path / "keys.json"

    @property
    def secret(self) -> Path:
        """What keys are hashed under."""
        return self.path / "secret"

    @property
    def usage(self) -> Path:
        """The counters, SQLite."""
        return self.path / "usage.sqlite"

    @property
    def audit(self) -> Path:
        """The lines that are being written."""
        return self.path / "audit.jsonl"

    @property
    def admin_token(self) -> Path:
        """What shows at the admin port that somebody may read this folder; a new one at each start."""
        return self.path / "admin.token"

    @contextlib.contextmanager
    def locked(self, name: str, *, wait: bool) -> Iterator[None]:
        """Makes the folder, and holds a lock of this name in it; a process that dies lets go.

        Raises:
            SpecError: the folder cannot be written, or the lock is held and `wait` is false.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self.path / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SpecError("state", f"must be a writable folder: {error.strerror}", self.path, "Check it.") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                hint = "Stop the other server, or give this one a folder of its own."
                raise SpecError("state", "must not be another server's", self.path, hint) from None
            yield
        finally:
            os.close(handle)

    def read_secret(self, *, make: bool) -> bytes:
        """The secret; a new one where there are no keys either. Call it with the lock of the keys.

        Raises:
            SpecError: others may read it, or it is gone while there are keys.
        """
        try:
            mode = self.secret.stat().st_mode
            text = self.secret.read_text().strip()
        except OSError:
            if not make or self.keys.exists():
                hint = "Restore it from a copy, or remove keys.json and give everybody a new key."
                raise SpecError("state", "must hold the secret of its keys", self.secret, hint) from None
            text = os.urandom(32).hex()
            write_private(self.secret, f"{text}\n".encode())
            return bytes.fromhex(text)
        if mode & _OTHERS:
            raise SpecError("state", "must have a secret that only its owner reads", self.secret, "chmod 600 it.")
        if len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise SpecError("state", "must have 64 hexadecimal digits as its secret", self.secret, "Restore it.")
        return bytes.fromhex(text)


def write_private(path: Path, data: bytes) -> None:
    """Replaces a file whole or not at all, readable by its owner only, and makes it survive a power failure.

    Raises:
        SpecError: the folder cannot be written.
    """
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise SpecError("state", f"cannot be written: {error.strerror}", path, "Is the disk full?") from None
