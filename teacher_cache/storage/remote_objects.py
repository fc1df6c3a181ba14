"""Objects of an S3 bucket, whole: put and looked at again, fetched and checked against what was put.

Every object carries, as metadata, the CRC-32C of its content and a mark of its writer. By the first a reader knows
that all of it arrived, by the second a writer whose answer was lost knows its own file. Objects without them (copied
there by another program) are checked by their length alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from teacher_cache.errors import BuildError
from teacher_cache.storage.files import crc32c
from teacher_cache.storage.remote_errors import AbsentError, Fault, TornError
from teacher_cache.storage.remote_requests import Requests

LARGEST = 5 << 30
"""Bytes of one PUT, the only kind of upload whose condition and digest every store knows."""
READ, WRITE = "cannot be read", "cannot be written"


@dataclass(frozen=True)
class Objects:
    """The objects below a prefix. Thread-safe and picklable, as its requests are."""

    requests: Requests
    prefix: str
    """Empty, or ends with a slash."""

    def get(self, name: str) -> tuple[bytes, dict[str, Any]]:
        """Content and headers; `FileNotFoundError` where there is none."""

        def attempt() -> tuple[bytes, dict[str, Any]]:
            answer = self.requests.call("get_object", Key=self.prefix + name)
            pieces: list[bytes] = []
            self.requests.body(answer, pieces.append)
            data = b"".join(pieces)
            _require_whole(answer, len(data), crc32c(data))
            return data, answer

        try:
            return self.requests.repeat(attempt, READ, name)
        except AbsentError as error:
            raise self._missing(name) from error

    def fetch(self, name: str, size: int, to: Path) -> int:
        """Writes an object to a file of this machine; returns its size, and does nothing else if that is wrong."""

        def attempt() -> int:
            answer = self.requests.call("get_object", Key=self.prefix + name)
            found = int(answer["ContentLength"])
            if found != size:
                self.requests.drop(answer)
                return found
            checksum = google_crc32c.Checksum()
            with to.open("wb") as file:

                def keep(piece: bytes) -> None:
                    file.write(piece)
                    checksum.update(piece)

                self.requests.body(answer, keep)
                _require_whole(answer, file.tell(), int.from_bytes(checksum.digest(), "big"))
                file.flush()
                os.fsync(file.fileno())
            return found

        try:
            return self.requests.repeat(attempt, READ, name)
        except AbsentError as error:
            raise self._missing(name) from error

    def head(self, name: str) -> dict[str, Any] | None:
        """Headers; None where the object, or the whole bucket, is missing."""
        try:
            return self.requests.send("head_object", READ, name, Key=self.prefix + name)
        except AbsentError:
            return None

    def put(self, name: str, data: bytes, writer: str, **condition: str) -> None:
        """Stores an object, and looks at what was stored.

        Raises:
            PresentError: the condition does not hold.
            BuildError: the store refuses it, or stores something else.
        """
        root = self.requests.url
        if len(data) > LARGEST:
            raise Fault("EntityTooLarge", False, True).refusal(f"{root}/{name}", root, WRITE, 1)
        marks = {"crc32c": f"{crc32c(data):08x}", "writer": writer}
        key = self.prefix + name
        answer = self.requests.send("put_object", WRITE, name, Key=key, Body=data, Metadata=marks, **condition)
        self.require_stored(name, data, answer.get("ETag", ""))

    def require_stored(self, name: str, data: bytes, etag: str) -> None:
        """The ETag is the MD5 of what the store received, unless it encrypts with a key: then it is read back."""
        if etag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest():
            return
        found, answer = self.get(name)
        # Another ETag is another writer's, who came after us.
        if found != data and answer.get("ETag", "") == etag:
            hint = "Run the same command again; if it stays so, the store is not to be trusted."
            place = f"{self.requests.url}/{name}"
            raise BuildError(place, "is stored as it was sent", f"{len(found)} other bytes", hint)

    def _missing(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.requests.url}/{name}")


def _require_whole(answer: dict[str, Any], size: int, checksum: int) -> None:
    found, wanted = f"{checksum:08x}", answer["Metadata"].get("crc32c")
    if size != answer["ContentLength"] or (wanted or found) != found:
        raise TornError(f"{size} bytes with CRC-32C {found} instead of {answer['ContentLength']} with {wanted}")
