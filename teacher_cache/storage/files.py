"""Files that appear whole or not at all, and what is remembered of each."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import CacheError, CacheNotFoundError, StorageError

UNREADABLE = "The file is there: check its permissions, the mount, and the limit of open files (ulimit -n)."
RESTORE = "`teacher-cache verify PATH` shows the extent, `teacher-cache repair PATH` computes what is bad again."


@dataclass(frozen=True)
class FileRecord:
    """What a receipt says of one file: enough to know it again, and that it stands in its own place."""

    path: str
    """Below the cache's root, with forward slashes."""
    size: int
    """Bytes."""
    digest: str
    """Binds the content to the path. Zarr: of the path and of every chunk's checksum, so that a reader can trust
    a chunk without reading the others. Parquet: of the path and of all bytes. Never a CRC-32C of a whole Zarr
    shard: a CRC over data that ends with its own CRC is a constant."""


def crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """CRC-32C (Castagnoli) of some bytes, or of a contiguous array of them, which is not copied."""
    return int(google_crc32c.value(data))


def write_atomic(root: Path, relative: str, data: bytes) -> None:
    """Temporary name, write, fsync, rename, fsync the folder: afterwards the file is whole and stays.

    Raises:
        StorageError: the folder cannot be written (full, read-only, gone); nothing visible has changed.
    """
    final = root / relative
    temporary = _temporary(final)
    try:
        make_folder(final.parent)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
        sync_folder(final.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise file_error(final, root, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_together(root: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """The files of one shard, as `write_atomic` writes each, and each folder synced once.

    All are written and synced under temporary names before the first gets its own; all of them stay, whole, when this
    returns. After a failure or a crash some may be there, each of them whole: what makes them count is a receipt that
    is written after this.

    Args:
        root: the cache.
        files: path below the root, in a folder there, and content of each; asked for one at a time, and not kept.

    Raises:
        StorageError: a folder cannot be written (full, read-only, gone).
    """
    written: list[tuple[Path, Path]] = []
    unsynced: set[Path] = set()
    final = root
    try:
        with contextlib.ExitStack() as opened:
            handles = []
            for relative, data in files:
                final = root / relative
                make_folder(final.parent.parent)
                _make(final.parent)
                # The folder's own name too, new or not: whoever made it may have been killed before it was synced.
                unsynced |= {final.parent, final.parent.parent}
                written.append((_temporary(final), final))
                handles.append(_begin(opened.enter_context(written[-1][0].open("xb")), data))
            for handle in handles:
                os.fsync(handle)
        for temporary, final in written:
            temporary.replace(final)
        for folder in sorted(unsynced):
            sync_folder(folder)
    except BaseException as error:
        for temporary, _ in written:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise file_error(final, root, error) from error
        raise


def _temporary(final: Path) -> Path:
    return final.with_name(f"{final.name}.{uuid.uuid4().hex}.tmp")


def _begin(file: BinaryIO, data: bytes) -> int:
    """Writes a file and has the system start to store it, so that a journal takes many files in one commit."""
    file.write(data)
    file.flush()
    if hasattr(os, "posix_fadvise"):
        # Linux starts to write what is dirty, at once and without waiting, before it looks for pages to drop.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file.fileno()


_RACES = 20
_GONE = "the folder is gone", "Is the disk still mounted? Bring it back"
_BROKEN = "the disk or its mount fails", "Check it (dmesg, mount)"
_FORBIDDEN = "permission is denied", "Change the permissions"
_LONG = "the limit on a file's size is reached", "Raise it (ulimit -f), or choose another file system"
_OPEN = "too many files are open", "Raise the limit (ulimit -n)"
_IN_THE_WAY = "a file stands where a folder should be", "Name another folder, or move the file away"
_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free space (df -h and df -i show what is left)"),
    errno.EDQUOT: ("your quota is used up", "Free space, or have the quota raised"),
    errno.EROFS: ("the file system is read-only", "Mount it writable, or name another folder"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EFBIG: _LONG,
    errno.EMFILE: _OPEN,
    errno.ENFILE: _OPEN,
    errno.ENOENT: _GONE,
    errno.ESTALE: _GONE,
    errno.ENODEV: _GONE,
    errno.ENXIO: _GONE,
    errno.ENOTCONN: _GONE,
    errno.EHOSTDOWN: _GONE,
    errno.EIO: _BROKEN,
    errno.ETIMEDOUT: _BROKEN,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
}
"""What an error number means to whoever runs a build, and what to do about it."""
_ABSENT = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR}
"""One file is missing: that is damage, and no fault of the disk."""


def file_error(path: Path, root: Path, error: OSError, rule: str = "cannot be written") -> StorageError:
    """What to say of a file of a cache that the operating system refuses."""
    known = _REASONS.get(error.errno or 0)
    reason, todo = known or ("the operating system refuses", "Correct that")
    hint = f"{todo}, then run the same command again: it goes on. Nothing that is committed is damaged."
    return StorageError(str(path), f"{rule}: {reason} ({error.strerror or error})", root, hint)


@contextlib.contextmanager
def file_errors(root: Path) -> Iterator[None]:
    """Turns what the operating system refuses below a cache's root into a `StorageError` that says what to do."""
    try:
        yield
    except CacheError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and (isinstance(error, CacheNotFoundError) or cause.errno not in _ABSENT):
            raise file_error(root / error.field, root, cause, "cannot be read") from error
        raise
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        if path is None or not path.absolute().is_relative_to(root.absolute()):
            raise
        raise file_error(path, root, error, "cannot be used") from error


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it; each new name is synced into its parent, or a crash could lose it."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    _make(folder)
    sync_folder(folder.parent)


def _make(folder: Path) -> None:
    """Makes one folder, or finds it there."""
    for _ in range(_RACES):
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            # Somebody may have had it and removed it in between; what stays in the way is no folder.
            if folder.exists():
                raise
        else:
            return
    folder.mkdir(exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename in this folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_temporary(path: Path) -> bool:
    """Whether a name is one that `write_atomic` makes: `<name>.<32 hexadecimal digits>.tmp`."""
    return re.fullmatch(r".+\.[0-9a-f]{32}\.tmp", path.name) is not None


def final_name(temporary: str) -> str:
    """The name that a temporary file would get."""
    return temporary[: -len(".tmp") - 33]
