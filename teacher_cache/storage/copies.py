"""Copies, on this machine, of the files of a remote cache."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import multiprocessing.util
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.errors import CorruptionError
from teacher_cache.storage.files import RESTORE, file_error, make_folder, sync_folder


@dataclass(frozen=True)
class Copies:
    """Fetched once, under a temporary name, and kept for whoever comes next. Any number of processes may share one
    folder: the first fetches, the others wait for it."""

    folder: Path | None
    """None: a temporary folder of each process, which ends with it."""

    def path(self, url: str, name: str, size: int, check: str, fetch: Callable[[Path], int]) -> Path:
        """The copy of a file.

        Args:
            url: the cache.
            name: the file.
            size: bytes that the copy must have; one that has another number is made again.
            check: what identifies the content: a cache that was built anew at the same place has other copies.
            fetch: writes the content to a file and returns its size; if that is wrong, need not write.

        Raises:
            CorruptionError: the size is wrong twice.
            BuildError: the folder cannot be written.
        """
        folder, place = self._place(url, name, size, check)
        try:
            if _has(place, size):
                return place
            make_folder(folder)
            with _alone(place):
                if not _has(place, size):
                    _make(place, name, size, fetch)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise file_error(place, folder, error) from error
        return place

    def forget(self, url: str, name: str, size: int, check: str) -> bool:
        """Removes a copy, for whoever shares the folder; whether there was one. Whoever has it mapped keeps it."""
        folder, place = self._place(url, name, size, check)
        try:
            place.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise file_error(place, folder, error, "cannot be removed") from error
        return True

    def _place(self, url: str, name: str, size: int, check: str) -> tuple[Path, Path]:
        folder = self.folder or _folder_of(os.getpid())
        identity = hashlib.sha256("\n".join((url, name, str(size), check)).encode()).hexdigest()[:32]
        return folder, folder / f"{identity}-{name.rpartition('/')[2][-40:]}"


def _has(place: Path, size: int) -> bool:
    try:
        return place.stat().st_size == size
    except FileNotFoundError:
        return False


def _make(place: Path, name: str, size: int, fetch: Callable[[Path], int]) -> None:
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
    found = -1
    try:
        for _ in range(2):
            found = fetch(temporary)
            if found == size:
                temporary.replace(place)
                sync_folder(place.parent)
                return
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    raise CorruptionError(name, f"must have {size} bytes", found, RESTORE)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keeps other threads and processes of this machine from fetching the same file at the same time. Where the
    file system has no locks, or the lock's file was just removed, two may: each copy is whole."""
    lock = place.with_name(f"{place.name}.lock")
    with lock.open("wb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)


@functools.cache
def _folder_of(process: int) -> Path:
    """The temporary folder of a process: not its parent's, which may end first."""
    folder = Path(tempfile.mkdtemp(prefix="teacher-cache-"))
    # Unlike `atexit`, this also runs in the processes that `multiprocessing` forks.
    multiprocessing.util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=0)
    return folder
