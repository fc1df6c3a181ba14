"""A cache at a prefix of an S3 bucket."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.errors import BuildError, SpecError
from teacher_cache.storage.copies import Copies
from teacher_cache.storage.files import is_temporary
from teacher_cache.storage.remote_errors import AbsentError, Fault, PresentError
from teacher_cache.storage.remote_objects import Objects
from teacher_cache.storage.remote_requests import Requests
from teacher_cache.storage.root import Root, check_name

_TRIAL = ".conditional"
"""How the names begin that `create` tries the store with."""


@dataclass
class RemoteRoot:
    """`s3://bucket/prefix`; see `Root`. The bucket must list and read what was written before (S3 does)."""

    url: str
    """`s3://bucket/prefix`."""
    copies: Path | None = None
    """Folder for copies; None: a temporary one of each process."""
    tries: int = 8
    """How often a request is sent before it is given up: 8 are about 10 seconds of pauses."""
    timeout: float = 30.0
    """Seconds without a byte, in or out."""

    def __post_init__(self) -> None:
        bucket, _, prefix = self.url.removeprefix("s3://").rstrip("/").partition("/")
        if not bucket or bucket in (".", "..") or "?" in self.url or self.tries < 1:
            hint = "Endpoint and credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...)."
            raise SpecError("cache", "is s3://bucket/prefix", self.url, hint)
        self.url = self.url.rstrip("/")
        # A worker may run in another folder.
        self.copies = self.copies and self.copies.absolute()
        self._requests = Requests(self.url, bucket, self.tries, self.timeout)
        self._objects = Objects(self._requests, check_name(self.url, prefix) + "/" if prefix else "")
        self._copies = Copies(self.copies)
        self._bucket_seen = self._conditional = False

    def read(self, name: str) -> bytes:
        """All bytes of a file; `FileNotFoundError` where there is none."""
        data, _ = self._objects.get(check_name(self.url, name))
        return data

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        answer = self._head(name)
        return int(answer["ContentLength"]) if answer is not None else None

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._head(name) is not None

    def write(self, name: str, data: bytes) -> None:
        """One PUT, and a look at what was stored."""
        self._objects.put(check_name(self.url, name), data, uuid.uuid4().hex)

    def write_together(self, files: Iterable[tuple[str, bytes]]) -> None:
        """One put after the other."""
        for name, data in files:
            self.write(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """A PUT with `If-None-Match: *`. That the store heeds it is tried once, with a file of its own."""
        self._require_conditional()
        writer = uuid.uuid4().hex
        try:
            self._objects.put(check_name(self.url, name), data, writer, IfNoneMatch="*")
        except PresentError:
            # Refused by the first of our own attempts, whose answer was lost?
            held = self._head(name)
            if held is None or held["Metadata"].get("writer") != writer:
                return False
            self._objects.require_stored(name, data, held.get("ETag", ""))
        return True

    def remove(self, name: str) -> None:
        """Removes a file."""
        key = self._objects.prefix + check_name(self.url, name)
        # Some stores say of a missing file that it is missing.
        with contextlib.suppress(AbsentError):
            self._requests.send("delete_object", "cannot be removed", name, Key=key)

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names that begin with a prefix, sorted here: not every store lists in the order of the bytes."""
        yield from sorted(name for name in self._listed(prefix) if not is_temporary(Path(name)))

    def unfinished(self) -> list[str]:
        """Trials of `create` that a kill has ended; everything else is there whole or not at all."""
        return sorted(name for name in self._listed(_TRIAL) if is_temporary(Path(name)))

    def _listed(self, prefix: str) -> set[str]:
        root = self._objects.prefix
        keys: list[str] = []
        more: dict[str, str] = {}
        while True:
            answer = self._requests.send("list_objects_v2", "cannot be listed", prefix, Prefix=root + prefix, **more)
            keys += [entry["Key"] for entry in answer.get("Contents", [])]
            if not answer.get("IsTruncated"):
                break
            more = {"ContinuationToken": answer["NextContinuationToken"]}
        return {key.removeprefix(root) for key in keys if not key.endswith("/")}

    def local(self, name: str, size: int, check: str) -> Path:
        """A copy on this machine, fetched where there is none yet."""
        checked = check_name(self.url, name)
        return self._copies.path(self.url, checked, size, check, lambda to: self._objects.fetch(checked, size, to))

    def forget(self, name: str, size: int, check: str) -> bool:
        """Removes the copy."""
        return self._copies.forget(self.url, check_name(self.url, name), size, check)

    @contextlib.contextmanager
    def fresh(self) -> Iterator[Root]:
        """Over the same connections, with copies of its own."""
        with tempfile.TemporaryDirectory(prefix="teacher-cache-") as folder:
            other = copy.copy(self)
            other._copies = Copies(Path(folder))
            yield other

    def _head(self, name: str) -> dict[str, Any] | None:
        found = self._objects.head(check_name(self.url, name))
        if found is None:
            self._require_bucket()
        return found

    def _require_bucket(self) -> None:
        """A HEAD does not tell a missing file from a missing bucket: asked once, behind the first that is missing."""
        if self._bucket_seen:
            return
        try:
            self._requests.send("head_bucket", "cannot be used")
        except AbsentError as error:
            raise Fault("NoSuchBucket", False).refusal(self.url, self.url, "cannot be used", 1) from error
        self._bucket_seen = True

    def _require_conditional(self) -> None:
        """Two creations of one file: the second must be refused, or `create` would be no safer than `write`."""
        # A builder that tidies up may take the file away between the two: then they are tried again.
        self._conditional = self._conditional or any(self._refuses_second() for _ in range(3))
        if not self._conditional:
            rule = "the store creates a file only where there is none (a PUT with If-None-Match: *)"
            hint = "Two builders could overwrite each other there. Update the store, or build into a folder."
            raise BuildError(self.url, rule, "it overwrites", hint)

    def _refuses_second(self) -> bool:
        name = f"{_TRIAL}.{uuid.uuid4().hex}.tmp"
        try:
            for _ in range(2):
                self._objects.put(name, b"", "probe", IfNoneMatch="*")
        except PresentError:
            return True
        finally:
            self.remove(name)
        return False
