"""Files that appear whole or not at all, and what is remembered of each."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from teacher_cache.errors import BuildError

UNREADABLE = "The file is there: check its permissions, the mount, and the limit of open files (ulimit -n)."


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


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of some bytes."""
    return int(google_crc32c.value(bytes(data)))


def write_atomic(root: Path, relative: str, data: bytes) -> None:
    """Temporary name, write, fsync, rename, fsync the folder: afterwards the file is whole and stays.

    Raises:
        BuildError: the folder cannot be written (full, read-only, gone); nothing visible has changed.
    """
    final = root / relative
    temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        _make_folder(final.parent)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
        sync_folder(final.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        hint = "Free space or change the permissions, then run the same command again: it goes on."
        raise BuildError(str(final), f"cannot be written: {error.strerror or error}", root, hint) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it; each new name is synced into its parent, or a crash could lose it."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


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


def remove_temporary(root: Path) -> int:
    """Removes what a killed writer left under temporary names; returns how many files.

    Only names that `write_atomic` makes: the folder may be someone's home, named by mistake.
    """
    leftovers = [path for path in root.rglob("*.tmp") if is_temporary(path)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
