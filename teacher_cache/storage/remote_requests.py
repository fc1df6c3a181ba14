"""Requests to an S3 bucket: repeated where that may help, and refused in plain words where it does not."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from teacher_cache.errors import BuildError, CorruptionError, SpecError
from teacher_cache.storage.files import RESTORE
from teacher_cache.storage.remote_errors import Fault

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 8.0
"""Seconds; doubled from the first to the longest, and a random part of it (half to all) is waited."""
CONNECTIONS = 32
"""Of one process; more threads than that wait for each other."""


@dataclass
class Requests:
    """Sends requests for one root. Thread-safe; picklable, without its connections; usable behind a fork."""

    url: str
    """`s3://bucket/prefix`; for messages."""
    bucket: str
    tries: int
    """How often a request is sent before it is given up."""
    timeout: float
    """Seconds without a byte, in or out."""
    _held: list[tuple[int, Any]] = field(default_factory=list, repr=False, compare=False)
    """Process and its s3fs file system. A parent's is kept and not used: closing it would end its connections."""

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_held": []}

    def send(self, method: str, rule: str, name: str = "", **arguments: object) -> dict[str, Any]:
        """One request without a body in its answer.

        Args:
            method: a method of botocore's S3 client.
            rule: what cannot be done if it fails ("cannot be written").
            name: the file, for messages.
            arguments: the method's own; the bucket is added.
        """
        return self.repeat(lambda: self.call(method, **arguments), rule, name)

    def call(self, method: str, **arguments: object) -> dict[str, Any]:
        """The same, sent once: for use in an attempt of `repeat`."""
        answer: dict[str, Any] = self._files().call_s3(method, Bucket=self.bucket, **arguments)
        return answer

    def body(self, answer: dict[str, Any], use: Callable[[bytes], object], step: int = 1 << 20) -> None:
        """Hands the body of an answer on, piece by piece."""
        from fsspec.asyn import sync

        try:
            while piece := sync(self._files().loop, answer["Body"].read, step):
                use(piece)
        finally:
            self.drop(answer)

    def drop(self, answer: dict[str, Any]) -> None:
        """Closes an answer whose body nobody wants."""
        self._files().loop.call_soon_threadsafe(answer["Body"].close)

    def repeat(self, attempt: Callable[[], T], rule: str, name: str = "") -> T:
        """Attempts something until it succeeds, or it is clear that it does not.

        Raises:
            AbsentError: there is no such file.
            PresentError: there is one already.
            CorruptionError: what arrives stays different from what was written.
            BuildError: anything else that the store or the network refuses.
        """
        # A generator seeded from the system: forked workers share the state of the global one, and would all come
        # back at the same time.
        draw = random.SystemRandom()
        for left in reversed(range(self.tries)):
            try:
                return attempt()
            except Exception as error:
                fault = Fault.of(error)
                if fault is None:
                    raise
                if not fault.transient or not left:
                    raise self._refusal(fault, rule, name, error, self.tries - left) from error
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self.tries - left - 1))
            time.sleep(pause * draw.uniform(0.5, 1))
        raise AssertionError(f"{self.tries=} is positive")

    def _refusal(
        self, fault: Fault, rule: str, name: str, error: Exception, tries: int
    ) -> BuildError | CorruptionError:
        place = f"{self.url}/{name}" if name else self.url
        if fault.code == "TornError":
            # As what else is wrong with a file: by its name below the root.
            return CorruptionError(name or place, "arrives as it was written", str(error), RESTORE)
        return fault.refusal(place, self.url + self._endpoint(), rule, tries)

    def _endpoint(self) -> str:
        """The endpoint's host, where the environment names one; without what may stand before the `@`."""
        given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return f" at {urlsplit(given).netloc.rpartition('@')[2] or 'an endpoint that is no URL'}" if given else ""

    def _files(self) -> Any:
        """This process's s3fs file system. Two threads may each make one at first; the last stays."""
        for process, files in reversed(self._held):
            if process == os.getpid():
                return files
        try:
            import s3fs
        except ImportError as error:
            hint = "Run: pip install 'teacher-cache[remote]'"
            raise SpecError("cache", "s3:// needs the package s3fs", self.url, hint) from error
        files = self.repeat(lambda: self._connect(s3fs.S3FileSystem), "cannot be used")
        self._held.append((os.getpid(), files))
        return files

    def _connect(self, kind: Callable[..., Any]) -> Any:
        config = {
            "connect_timeout": min(5.0, self.timeout),
            "read_timeout": self.timeout,
            "max_pool_connections": CONNECTIONS,
            # `repeat` alone counts the attempts: botocore's and s3fs's would multiply, and know nothing of bodies.
            "retries": {"mode": "standard", "total_max_attempts": 1},
        }
        from aiobotocore.session import AioSession

        session = AioSession()
        session.register_component("data_loader", _loader())
        files = kind(config_kwargs=config, session=session, use_listings_cache=False, skip_instance_cache=True)
        files.retries = 1
        try:
            files.connect()
        except ValueError as error:
            fault = Fault("ValueError", False)
            raise self._refusal(fault, "cannot be used", "", error, 1) from error
        return files


@functools.cache
def _loader() -> Any:
    """Botocore's description of S3, read once per process: 70 ms of every connection's 80."""
    from botocore.loaders import create_loader

    return create_loader()
