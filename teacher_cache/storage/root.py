"""Where a cache is: a folder of this machine, or a prefix in an object store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from teacher_cache.errors import CacheError, SpecError
from teacher_cache.storage.files import final_name


@runtime_checkable
class Root(Protocol):
    """A folder or a prefix of an object store, as a flat set of files with names.

    Obligations of an implementation:

    - Picklable, and small when pickled; neither connections nor secrets are carried along. Usable behind a fork.
    - Thread-safe: any method may run in any number of threads, processes and hosts at once.
    - Names are relative, with forward slashes; no empty part, no `.` and no `..`. A name is never also the folder
      of another. Folders are made when needed, and are never listed.
    - A file is seen whole or not at all, and whoever comes after a `write`, a `create` or a `remove` sees it.
    - What is missing is a `FileNotFoundError`. What the disk or the store refuses is a `BuildError` that names the
      place, the rule, the value and what to do; whatever may help is sent again first, a bounded number of times.
    - A `write` or `create` that raises may have happened: the answer can be lost on its way. It is whole then too.
      In an object store it may even appear late, behind what came after it: a request that was given up can still
      arrive. Write a name again only where an older content of it does no harm.
    """

    @property
    def url(self) -> str:
        """What the user gave; for messages."""
        ...

    def read(self, name: str) -> bytes:
        """All bytes of a file.

        Raises:
            FileNotFoundError: there is none.
            CorruptionError: what arrives differs from what was written, again and again.
        """
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces it: whole or not at all, and for good when this returns."""
        ...

    def write_together(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Writes several files, each whole or not at all; all of them are there for good when this returns."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file where there is none; of all that try, exactly one gets True.

        Raises:
            BuildError: as for `write`; also where the store cannot keep this promise.
        """
        ...

    def remove(self, name: str) -> None:
        """Removes a file; that there is none is fine."""
        ...

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names that begin with a prefix (any text, not only a folder), sorted by code points.

        Names of unfinished writes (`storage.files.is_temporary`) are left out. What is written or removed while
        the list is made may or may not be in it; everything else is.
        """
        ...

    def unfinished(self) -> list[str]:
        """The temporary names that `names` leaves out: of writers that are gone, or at work just now."""
        ...

    def local(self, name: str, size: int, check: str) -> Path:
        """A file of this machine with this content, to be mapped into memory; nobody may change it.

        Args:
            name: the file.
            size: bytes that it must have.
            check: what identifies the content (`FileRecord.digest`). It tells copies apart and is not computed here:
                the reader's own checksums do that.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptionError: it has another size, also when it was fetched again.
        """
        ...

    def forget(self, name: str, size: int, check: str) -> bool:
        """Drops what `local` gave, where that is a copy that may have been damaged here: the next `local` fetches
        anew. Whether there was one."""
        ...

    def fresh(self) -> AbstractContextManager[Root]:
        """The same place for whoever must see what is there now: its `local` knows no older copy, and what it
        fetched is gone at the end."""
        ...


def check_name(url: str, name: str) -> str:
    """The name, if it stays below its root.

    Raises:
        CacheError: it does not.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        rule = "a file's name is a relative path with forward slashes, without `.` and `..`"
        raise CacheError(url, rule, repr(name), "Is this manifest from somebody you trust? Build the cache again.")
    return name


def remove_unfinished(root: Root, kept: Callable[[str], bool] = lambda _name: False) -> int:
    """Removes what a killed writer left under temporary names; returns how many files.

    Only names that our writers make: the folder may be someone's home, named by mistake.

    Args:
        root: the cache.
        kept: told the name that a temporary file would get; true where its writer is at work. Asked after all of
            them were found: a writer that claims a file later has no hand in these.
    """
    removed = [name for name in root.unfinished() if not kept(final_name(name))]
    for name in removed:
        root.remove(name)
    return len(removed)


def require_here(field: str, path: str | Path) -> Path:
    """A path of this machine.

    Args:
        field: who gave it, for messages.
        path: may be a URL that has gone through `Path` already, which takes one of its slashes away.

    Raises:
        SpecError: it is a URL.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
        raise SpecError(field, "is a file of this machine", path, "Name one, and copy it from there.")
    return Path(path)


def open_root(path_or_url: str | Path, copies: Path | None = None) -> Root:
    """Says where a cache is; nothing is read, and nothing needs to be there.

    Args:
        path_or_url: a folder, or `s3://bucket/prefix`. Endpoint and credentials come from the usual environment
            (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_PROFILE`, ...).
        copies: folder for copies of a remote cache's files, kept for the next process. None: a temporary folder of
            each process. Ignored for a local cache, whose files are used where they are.

    Raises:
        SpecError: a URL of another kind, or without a bucket.
    """
    text = str(path_or_url)
    protocol, separator, _ = text.partition("://")
    if isinstance(path_or_url, Path) or not separator:
        from teacher_cache.storage.local_root import LocalRoot

        return LocalRoot(Path(path_or_url))
    if protocol != "s3":
        hint = "Others do not promise that only one of several builders can create a file. Use s3:// or a folder."
        raise SpecError("cache", "a cache is in a folder or at s3://bucket/prefix", text, hint)
    from teacher_cache.storage.remote_root import RemoteRoot

    return RemoteRoot(text, copies)
