"""A cache in a folder of this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.errors import CacheError, CorruptionError
from teacher_cache.storage.files import (
    RESTORE,
    UNREADABLE,
    file_error,
    is_temporary,
    make_folder,
    sync_folder,
    write_atomic,
    write_together,
)
from teacher_cache.storage.root import Root, check_name

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
"""How a file system says that it has no hard links."""
_MISSING = FileNotFoundError, NotADirectoryError, IsADirectoryError


@dataclass(frozen=True)
class LocalRoot:
    """A folder; see `Root`. Sure for processes of one host; of several, as far as their common file system is."""

    path: Path
    """The folder; need not be there."""

    @property
    def url(self) -> str:
        """The folder, as the user gave it."""
        return str(self.path)

    def read(self, name: str) -> bytes:
        """All bytes of a file; `FileNotFoundError` where there is none."""
        place = self._place(name)
        try:
            with open(place, "rb", opener=_without_waiting) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise CorruptionError(name, "must be a file", "something else", RESTORE)
                return file.read()
        except _MISSING as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place)) from error
        except OSError as error:
            raise CacheError(name, "cannot be read", error, UNREADABLE) from error

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        place = self._place(name)
        try:
            return place.stat().st_size if not place.is_dir() else None
        except _MISSING:
            return None
        except OSError as error:
            raise file_error(place, self.path, error, "cannot be read") from error

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    def write(self, name: str, data: bytes) -> None:
        """`write_atomic`: temporary name, fsync, rename, fsync of the folder."""
        write_atomic(self.path, check_name(self.url, name), data)

    def write_together(self, files: Iterable[tuple[str, bytes]]) -> None:
        """`files.write_together`: each folder is synced once for all of its files."""
        write_together(self.path, ((check_name(self.url, name), data) for name, data in files))

    def create(self, name: str, data: bytes) -> bool:
        """A temporary file gets its name by a hard link, which is made once or not at all.

        On a file system without hard links the file is created in place instead: by one writer only, too, but a
        reader may see it before it is whole.
        """
        place = self._place(name)
        temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
        try:
            make_folder(place.parent)
            _write_new(temporary, data)
            created = _link(temporary, place, data)
            sync_folder(place.parent)
        except OSError as error:
            raise file_error(place, self.path, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return created

    def remove(self, name: str) -> None:
        """Removes a file; its folder stays."""
        place = self._place(name)
        try:
            place.unlink()
        except _MISSING:
            return
        except OSError as error:
            raise file_error(place, self.path, error, "cannot be removed") from error

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names that begin with a prefix, sorted."""
        folder, slash, _ = prefix.rpartition("/")
        start = self.path / check_name(self.url, folder) if folder else self.path
        found: list[str] = []
        try:
            for at, folders, files in os.walk(start, onerror=_refuse):
                inside = os.path.relpath(at, start)
                below = folder + slash + ("" if inside == "." else f"{inside}/".replace(os.sep, "/"))
                # A cache has a folder for each view of each field: those that cannot match are not walked through.
                folders[:] = [one for one in folders if _may_meet(f"{below}{one}/", prefix)]
                found += [name for name in map(below.__add__, files) if name.startswith(prefix)]
        except OSError as error:
            raise file_error(start, self.path, error, "cannot be listed") from error
        yield from sorted(name for name in found if not is_temporary(Path(name)))

    def unfinished(self) -> list[str]:
        """What `write_atomic` and its like were writing."""
        found = [path for path in self.path.rglob("*.tmp") if is_temporary(path)]
        return [path.relative_to(self.path).as_posix() for path in found]

    def local(self, name: str, size: int, check: str) -> Path:
        """The file itself."""
        place = self._place(name)
        found = self.size(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))
        if found != size:
            raise CorruptionError(name, f"must have {size} bytes", found, RESTORE)
        return place

    def forget(self, name: str, size: int, check: str) -> bool:
        """False: there are no copies."""
        return False

    def fresh(self) -> contextlib.nullcontext[Root]:
        """Itself."""
        return contextlib.nullcontext(self)

    def _place(self, name: str) -> Path:
        return self.path / check_name(self.url, name)


def absolute(root: Root) -> Root:
    """The same root for a process that runs in another folder."""
    return LocalRoot(root.path.absolute()) if isinstance(root, LocalRoot) else root


def _may_meet(folder: str, prefix: str) -> bool:
    """Whether names below a folder may begin with a prefix."""
    return folder.startswith(prefix) or prefix.startswith(folder)


def _refuse(error: OSError) -> None:
    # Nothing is there yet, or a builder took an empty folder away as it left.
    if not isinstance(error, _MISSING):
        raise error


def _without_waiting(path: str, flags: int) -> int:
    # Whoever opens a pipe for reading waits for a writer, and in a file's place none ever comes.
    return os.open(path, flags | os.O_NONBLOCK)


def _write_new(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: Path, place: Path, data: bytes) -> bool:
    """Whether this call has made the name."""
    try:
        place.hardlink_to(temporary)
    except FileExistsError:
        # NFS repeats a request whose answer was lost; the second finds what the first has made.
        return temporary.stat().st_nlink > 1
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            _write_new(place, data)
        except FileExistsError:
            return False
        except OSError:
            place.unlink(missing_ok=True)
            raise
    return True
