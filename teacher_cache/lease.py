"""Who is at work on a cache: a lease for each builder, and claims, each of which only one builder can hold.

`builders/<id>.json` says who a builder is and until when it may be thought alive; it alone writes that file, and
renews it. A claim is a copy of it under the name of what is claimed: made at once or not at all, never
changed, so that no two builders can hold one name. A claim whose builder is gone is not removed and not
overwritten, which two could do at the same time: it is followed by another, whose name is made of its digest, and
the last of such a chain holds. None of this is part of the cache, and nothing of it is left once it is sealed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from teacher_cache.builder import HERE, Builder
from teacher_cache.errors import BuildError, TeacherCacheError
from teacher_cache.fingerprint import bytes_digest
from teacher_cache.signed import signed
from teacher_cache.storage import absolute
from teacher_cache.storage.files import is_temporary
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.root import Root

TERM = 60.0
"""Seconds for which a lease is good; renewed every third of it, so that clocks of hosts may differ by half of it."""
BUILDERS, CLAIMS = "builders", "claims"
LEAD = "lead"
"""The claim of the one builder that may begin, tidy up and seal."""

_TRIES = 100


def _read(root: Root, name: str) -> bytes | None:
    try:
        return root.read(name)
    except FileNotFoundError:
        return None


def _chain(root: Root, name: str) -> tuple[list[tuple[str, bytes]], str]:
    """The claims of one name, each following one whose builder is gone, and where the next would be."""
    found: list[tuple[str, bytes]] = []
    place = f"{CLAIMS}/{name}.json"
    while (data := _read(root, place)) is not None:
        found.append((place, data))
        place = f"{CLAIMS}/{name}.{bytes_digest(data)}.json"
    return found, place


def _holder(chain: list[tuple[str, bytes]]) -> Builder | None:
    return Builder.from_bytes(chain[-1][1]) if chain else None


def _now(root: Root, builder: Builder | None) -> Builder | None:
    """The lease of a builder as it is renewed now; None where it is gone."""
    if builder is None:
        return None
    now = Builder.from_bytes(_read(root, f"{BUILDERS}/{builder.id}.json"))
    return now if now is not None and now.alive else None


def at_work(root: Root) -> list[Builder]:
    """The builders that are at work on a cache."""
    found = (Builder.from_bytes(_read(root, name)) for name in root.names(f"{BUILDERS}/"))
    return sorted((one for one in found if one is not None and one.alive), key=lambda one: (one.since, one.id))


def claims(root: Root) -> dict[str, Builder]:
    """What is claimed by builders that are at work, and by whom."""
    names = {name.rpartition("/")[2].partition(".")[0] for name in root.names(f"{CLAIMS}/")}
    found = {name: _now(root, _holder(_chain(root, name)[0])) for name in sorted(names)}
    return {name: builder for name, builder in found.items() if builder is not None}


def is_lease(name: str) -> bool:
    """Whether a path below a cache's root belongs to a builder and not to the cache."""
    return name.startswith((f"{BUILDERS}/", f"{CLAIMS}/"))


def sweep(root: Root) -> None:
    """Removes from a sealed cache what builders that are gone have left: nothing is claimed there any more."""
    live, held = {builder.id for builder in at_work(root)}, set(claims(root))
    for folder in (CLAIMS, BUILDERS):
        for name in list(root.names(f"{folder}/")):
            # A dead builder's claim that a live one follows is the beginning of the live one's chain.
            followed = folder == CLAIMS and name.rpartition("/")[2].partition(".")[0] in held
            builder = Builder.from_bytes(_read(root, name))
            if not followed and (builder is None or builder.id not in live):
                root.remove(name)
    _remove_unfinished(root)
    for folder in (CLAIMS, BUILDERS):
        _remove_if_empty(root, folder)


def _remove_unfinished(root: Root) -> None:
    """Temporary files of claims and leases; another builder that is just writing one writes it again."""
    for folder in (CLAIMS, BUILDERS):
        if isinstance(root, LocalRoot):
            with contextlib.suppress(OSError):
                for path in (root.path / folder).glob("*.tmp"):
                    if is_temporary(path):
                        path.unlink(missing_ok=True)


def _remove_if_empty(root: Root, folder: str) -> None:
    if isinstance(root, LocalRoot):
        with contextlib.suppress(OSError):
            (root.path / folder).rmdir()


@dataclass(frozen=True)
class Hold:
    """What a worker in another process needs to know whether its builder still holds a claim."""

    root: Root
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
        chain, _ = _chain(self.root, name)
        holder = _holder(chain)
        if holder is not None and holder.id == self.id:
            return
        if not chain:
            rule = "this build no longer has its lease: its files are gone (unmounted, removed, or moved?)"
            raise BuildError(self.root.url, rule, f"no claim to {name}", _LOST)
        rule = "this build has lost its lease: it was not renewed in time (suspended, a clock that jumped?)"
        raise BuildError(self.root.url, rule, f"{name} is held by {holder or 'another'}", _LOST)


_LOST = "Nothing is damaged: what is committed stays. See `teacher-cache status PATH`, then run the same command again."


class Lease:
    """This builder's lease, renewed by a thread while it is open; and its claims, given back when it closes."""

    def __init__(self, root: Root, joined: bool = False, exclusive: bool = False) -> None:
        self.root, self._term = root, TERM
        self.me = Builder.here(joined, exclusive)
        self.hold = Hold(absolute(root), self.me.id)
        self.held: dict[str, str] = {}
        """What is claimed, and by which file."""
        self._name = f"{BUILDERS}/{self.me.id}.json"
        self._bytes = b""
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        HERE.add(self.me.id)
        try:
            self._renew()
            self._thread.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _renew(self) -> None:
        """Writes the lease anew."""
        with self._lock:
            if self._closed.is_set():
                return
            self._bytes = signed(asdict(self.me) | {"until": time.time() + self._term})
            _while_folders_vanish(lambda: self.root.write(self._name, self._bytes))

    def _renew_for_ever(self) -> None:
        while not self._closed.wait(self._term / 3):
            # A full disk may have room again before the lease runs out; if not, another builder takes over, and
            # `require` says so.
            with contextlib.suppress(OSError, TeacherCacheError):
                self._renew()

    def claim(self, name: str) -> Builder | None:
        """Claims a name. None if it is ours now (or was before); else the builder that holds it.

        Raises:
            BuildError: the cache's folder cannot be written.
        """
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
        raise BuildError(place, "cannot be claimed", f"{_TRIES} attempts", "Run the same command again.")

    def _take(self, name: str, place: str) -> None:
        """Puts our lease in a place that was free; what turns out to be in no chain is taken back."""
        if not self.root.exists(self._name):
            # Somebody took us for dead.
            self._renew()
        # Noted first: Ctrl-C right behind it must not leave it there.
        self.held[name] = place
        try:
            created = _while_folders_vanish(lambda: self.root.create(place, self._bytes))
        except TeacherCacheError:
            # It may be there all the same: then it is ours.
            with contextlib.suppress(OSError, TeacherCacheError):
                if _read(self.root, place) == self._bytes:
                    self.root.remove(place)
            del self.held[name]
            raise
        if not created:
            del self.held[name]
            return
        chain, _ = _chain(self.root, name)
        if all(path != place for path, _ in chain):
            del self.held[name]
            self.root.remove(place)

    def require(self) -> None:
        """Raises `BuildError` where anything that this builder claimed is no longer its own."""
        for name in tuple(self.held):
            self.hold.require(name)

    def release(self, name: str) -> None:
        """Gives a claim back; one that was lost is left to whoever has it."""
        ours = self.held.get(name)
        builder = Builder.from_bytes(_read(self.root, ours)) if ours is not None else None
        if ours is not None and builder is not None and builder.id == self.me.id:
            places = [place for place, _ in _chain(self.root, name)[0]]
            if places and places[-1] == ours:
                # The first of the chain first: without it nobody can follow the others.
                for place in places:
                    self.root.remove(place)
            elif ours not in places:
                self.root.remove(ours)
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
        with contextlib.suppress(OSError, TeacherCacheError):
            for name in tuple(self.held):
                self.release(name)
            self.root.remove(self._name)
        _remove_unfinished(self.root)
        _remove_if_empty(self.root, CLAIMS)
        _remove_if_empty(self.root, BUILDERS)


@contextlib.contextmanager
def alone(root: Root, rule: str) -> Iterator[None]:
    """While no builder is at work, and none begins.

    Raises:
        BuildError: one is at work; says by which rule that is wrong.
    """
    with Lease(root, exclusive=True) as lease:
        leader = lease.claim(LEAD)
        other = leader or next((one for one in at_work(root) if one.id != lease.me.id), None)
        if other is not None:
            hint = "Wait until it is done, or stop it; then run the same command again."
            raise BuildError(root.url, rule, other, hint)
        yield


def _while_folders_vanish(work: Callable[[], Any]) -> Any:
    """Does something again whose folder another builder has taken away, empty, as it left."""
    for left in reversed(range(_TRIES)):
        try:
            return work()
        except BuildError as error:
            if not left or not isinstance(error.__cause__, FileNotFoundError):
                raise
    raise AssertionError("the last attempt returns or raises")
