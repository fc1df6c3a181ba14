"""Who is at work on a cache: a lease for each builder, and claims, each of which only one builder can hold.

`builders/<id>.json` says who a builder is and until when it may be thought alive; it alone writes that file, and
renews it. A claim is a hard link to it under the name of what is claimed: made at once or not at all, never
changed, so that no two builders can hold one name. A claim whose builder is gone is not removed and not
overwritten, which two could do at the same time: it is followed by another, whose name is made of its digest, and
the last of such a chain holds. None of this is part of the cache, and nothing of it is left once it is sealed.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from teacher_cache.builder import HERE, Builder
from teacher_cache.errors import BuildError
from teacher_cache.fingerprint import bytes_digest
from teacher_cache.signed import signed
from teacher_cache.storage.files import file_error, make_folder

TERM = 60.0
"""Seconds for which a lease is good; renewed every third of it, so that clocks of hosts may differ by half of it."""
BUILDERS, CLAIMS = "builders", "claims"
LEAD = "lead"
"""The claim of the one builder that may begin, tidy up and seal."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_TRIES = 100


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _chain(root: Path, name: str) -> tuple[list[tuple[Path, bytes]], Path]:
    """The claims of one name, each following one whose builder is gone, and where the next would be."""
    found: list[tuple[Path, bytes]] = []
    place = root / CLAIMS / f"{name}.json"
    while (data := _read(place)) is not None:
        found.append((place, data))
        place = root / CLAIMS / f"{name}.{bytes_digest(data)}.json"
    return found, place


def _holder(chain: list[tuple[Path, bytes]]) -> Builder | None:
    return Builder.from_bytes(chain[-1][1]) if chain else None


def _now(root: Path, builder: Builder | None) -> Builder | None:
    """The lease of a builder as it is renewed now; None where it is gone."""
    if builder is None:
        return None
    now = Builder.from_bytes(_read(root / BUILDERS / f"{builder.id}.json"))
    return now if now is not None and now.alive else None


def at_work(root: Path) -> list[Builder]:
    """The builders that are at work on a cache."""
    found = (Builder.from_bytes(_read(path)) for path in sorted((root / BUILDERS).glob("*.json")))
    return sorted((one for one in found if one is not None and one.alive), key=lambda one: (one.since, one.id))


def claims(root: Path) -> dict[str, Builder]:
    """What is claimed by builders that are at work, and by whom."""
    names = {path.name.partition(".")[0] for path in (root / CLAIMS).glob("*.json")}
    found = {name: _now(root, _holder(_chain(root, name)[0])) for name in sorted(names)}
    return {name: builder for name, builder in found.items() if builder is not None}


def is_lease(name: str) -> bool:
    """Whether a path below a cache's root belongs to a builder and not to the cache."""
    return name.startswith((f"{BUILDERS}/", f"{CLAIMS}/"))


def sweep(root: Path) -> None:
    """Removes from a sealed cache what builders that are gone have left: nothing is claimed there any more."""
    live = {builder.id for builder in at_work(root)}
    for folder in (root / CLAIMS, root / BUILDERS):
        for path in folder.iterdir() if folder.is_dir() else ():
            builder = Builder.from_bytes(_read(path))
            if builder is None or builder.id not in live:
                path.unlink(missing_ok=True)
        _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@dataclass(frozen=True)
class Hold:
    """What a worker in another process needs to know whether its builder still holds a claim."""

    root: Path
    id: str

    def owns(self, name: str) -> bool:
        """Whether the claim is still this builder's."""
        holder = _holder(_chain(self.root, name)[0])
        return holder is not None and holder.id == self.id

    def require(self, name: str) -> None:
        """Nothing happens while the claim is held.

        Raises:
            BuildError: another builder has taken it over, or the cache's folder is gone.
        """
        try:
            chain, _ = _chain(self.root, name)
        except OSError as error:
            raise file_error(self.root / CLAIMS, self.root, error) from error
        holder = _holder(chain)
        if holder is not None and holder.id == self.id:
            return
        if not chain:
            rule = "this build no longer has its lease: its files are gone (unmounted, removed, or moved?)"
            raise BuildError(str(self.root), rule, f"no claim to {name}", _LOST)
        rule = "this build has lost its lease: it was not renewed in time (suspended, a clock that jumped?)"
        raise BuildError(str(self.root), rule, f"{name} is held by {holder or 'another'}", _LOST)


_LOST = "Nothing is damaged: what is committed stays. See `teacher-cache status PATH`, then run the same command again."


class Lease:
    """This builder's lease, renewed by a thread while it is open; and its claims, given back when it closes."""

    def __init__(self, root: Path, joined: bool = False) -> None:
        self.root, self._term = root, TERM
        self.me = Builder.here(joined)
        self.hold = Hold(root.absolute(), self.me.id)
        self.held: dict[str, Path] = {}
        """What is claimed, and by which link."""
        self._path = root / BUILDERS / f"{self.me.id}.json"
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        HERE.add(self.me.id)
        try:
            make_folder(self.root)
            self._renew()
            self._thread.start()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise file_error(self._path, self.root, error) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _renew(self) -> None:
        """Writes the lease anew. No flush to the disk: after a power failure no builder is alive."""
        with self._lock:
            if self._closed.is_set():
                return
            following = self._path.with_suffix(".next")
            for left in reversed(range(_TRIES)):
                try:
                    for folder in (self._path.parent, self.root / CLAIMS):
                        folder.mkdir(exist_ok=True)
                    following.write_bytes(signed(asdict(self.me) | {"until": time.time() + self._term}))
                    following.replace(self._path)
                    return
                except FileNotFoundError:
                    # Another builder takes empty folders away as it leaves.
                    if not left or not self.root.is_dir():
                        raise

    def _renew_for_ever(self) -> None:
        while not self._closed.wait(self._term / 3):
            # A full disk may have room again before the lease runs out; if not, another builder takes over, and
            # `require` says so.
            with contextlib.suppress(OSError):
                self._renew()

    def claim(self, name: str) -> Builder | None:
        """Claims a name. None if it is ours now (or was before); else the builder that holds it.

        Raises:
            BuildError: the cache's folder cannot be written.
        """
        place = self.root / CLAIMS / f"{name}.json"
        try:
            for _ in range(_TRIES):
                chain, place = _chain(self.root, name)
                holder = _holder(chain)
                if holder is not None and holder.id == self.me.id:
                    self.held[name] = chain[-1][0]
                    return None
                live = _now(self.root, holder)
                if live is not None:
                    return live
                self._take(name, place)
        except OSError as error:
            raise file_error(place, self.root, error) from error
        raise BuildError(str(place), "cannot be claimed", f"{_TRIES} attempts", "Run the same command again.")

    def _take(self, name: str, place: Path) -> None:
        """Links our lease to a place that was free; what turns out to be in no chain is taken back."""
        # Noted first: Ctrl-C right behind the link must not leave it there.
        self.held[name] = place
        try:
            _link(self._path, place)
        except OSError as error:
            del self.held[name]
            if isinstance(error, FileExistsError):
                return
            # Another builder took the empty folders away as it left, or took us for dead.
            if not isinstance(error, FileNotFoundError) or not self.root.is_dir():
                raise
            self._renew()
            return
        chain, _ = _chain(self.root, name)
        if all(path != place for path, _ in chain):
            del self.held[name]
            place.unlink(missing_ok=True)

    def require(self) -> None:
        """Raises `BuildError` where anything that this builder claimed is no longer its own."""
        for name in tuple(self.held):
            self.hold.require(name)

    def release(self, name: str) -> None:
        """Gives a claim back; one that was lost is left to whoever has it."""
        ours = self.held.get(name)
        builder = Builder.from_bytes(_read(ours)) if ours is not None else None
        if ours is not None and builder is not None and builder.id == self.me.id:
            places = [path for path, _ in _chain(self.root, name)[0]]
            if places and places[-1] == ours:
                # The first of the chain first: without it nobody can follow the others.
                for path in places:
                    path.unlink(missing_ok=True)
            elif ours not in places:
                ours.unlink(missing_ok=True)
        # Forgotten last: Ctrl-C in the middle must not leave it there.
        self.held.pop(name, None)

    def _close(self) -> None:
        """Gives everything back, as far as the disk lets us: what stays is known to be ours, and we are gone."""
        with self._lock:
            self._closed.set()
        try:
            self._give_back()
        except BaseException:
            # Ctrl-C while leaving: once more.
            self._give_back()
            raise
        finally:
            HERE.discard(self.me.id)

    def _give_back(self) -> None:
        with contextlib.suppress(OSError):
            for name in tuple(self.held):
                self.release(name)
            for path in (self._path, self._path.with_suffix(".next")):
                path.unlink(missing_ok=True)
        _remove_if_empty(self.root / CLAIMS)
        _remove_if_empty(self._path.parent)


def _link(existing: Path, place: Path) -> None:
    try:
        place.hardlink_to(existing)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with place.open("xb") as file:
            file.write(existing.read_bytes())
