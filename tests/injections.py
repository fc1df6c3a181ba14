"""Damage of every kind to any file of a cache, one at a time, in place, and taken back.

An `Injector` knows a sound cache by heart. `damage` spoils something, seeded; `heal` puts back what was there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import teacher_cache as tc
from teacher_cache.errors import CacheError, CacheNotFoundError
from teacher_cache.receipts import receipt_of


@dataclass(frozen=True)
class Injection:
    """What was done."""

    kind: str
    name: str
    """The file that it was done to, below the root."""
    detail: str
    changed: bool
    """Whether a byte of the cache is another now, or something is there that was not."""
    places: frozenset[str]
    """What a report must name, one of them at least."""

    def __str__(self) -> str:
        return f"{self.kind} of {self.name} ({self.detail})"


@dataclass
class Injector:
    """Damages one cache."""

    root: Path
    donor: Path
    """A cache of the same spec over other data."""
    seed: int
    files: dict[str, bytes] = field(init=False)
    donated: dict[str, bytes] = field(init=False)
    _random: np.random.Generator = field(init=False)
    _touched: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.files, self.donated = read_all(self.root), read_all(self.donor)
        self._random = np.random.Generator(np.random.Philox(self.seed))
        self._weights = _weights(list(self.files))

    def damage(self) -> Injection:
        """One seeded injection."""
        kind = self._pick(list(KINDS))
        name = self._pick(list(self.files), self._weights)
        return KINDS[kind](self, name)

    def heal(self) -> None:
        """Puts back every byte; folders that were added go."""
        for name in self._touched:
            path = self.root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.is_symlink() or path.exists():
                path.unlink()
            if name in self.files:
                path.write_bytes(self.files[name])
        self._touched.clear()

    def _pick(self, items: list[Any], weights: Any = None) -> Any:
        return items[int(self._random.choice(len(items), p=weights))]

    def _number(self, below: int) -> int:
        return int(self._random.integers(below))

    def _write(self, name: str, data: bytes) -> None:
        self._touched.append(name)
        (self.root / name).write_bytes(data)

    def _clear(self, name: str) -> Path:
        self._touched.append(name)
        (self.root / name).unlink()
        return self.root / name

    def _done(self, kind: str, names: list[str], detail: str, changed: bool = True) -> Injection:
        return Injection(kind, names[0], detail, changed, frozenset(place for name in names for place in named(name)))

    # Each of what follows is one kind of injection.

    def flip(self, name: str) -> Injection:
        """One bit."""
        data = bytearray(self.files[name])
        bit = self._number(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        self._write(name, bytes(data))
        return self._done("flip", [name], f"bit {bit} of {8 * len(data)}")

    def truncate(self, name: str) -> Injection:
        """To any length."""
        length = self._number(len(self.files[name]))
        self._write(name, self.files[name][:length])
        return self._done("truncation", [name], f"to {length} of {len(self.files[name])} bytes")

    def append(self, name: str) -> Injection:
        """Up to 64 bytes, zeros or others."""
        count = 1 + self._number(64)
        more = bytes(count) if self._number(2) else self._random.bytes(count)
        self._write(name, self.files[name] + more)
        return self._done("growth", [name], f"by {more!r}")

    def zeros(self, name: str) -> Injection:
        """As a file system leaves what it lost: all of it, or a block."""
        data = bytearray(self.files[name])
        start = self._number(len(data)) if self._number(2) else 0
        data[start:] = bytes(len(data) - start)
        self._write(name, bytes(data))
        return self._done("zeroing", [name], f"from byte {start}", bytes(data) != self.files[name])

    def empty(self, name: str) -> Injection:
        """No byte is left."""
        self._write(name, b"")
        return self._done("emptying", [name], "0 bytes")

    def delete(self, name: str) -> Injection:
        """Gone."""
        self._clear(name)
        return self._done("deletion", [name], "")

    def swap(self, name: str) -> Injection:
        """Two files in each other's places: most often of the same size, where only the place tells."""
        other = self._other(name)
        self._write(name, self.files[other])
        self._write(other, self.files[name])
        return self._done("swap", [name, other], f"with {other}", self.files[name] != self.files[other])

    def copy(self, name: str) -> Injection:
        """One file over another."""
        other = self._other(name)
        self._write(name, self.files[other])
        return self._done("overwriting", [name], f"by {other}", self.files[name] != self.files[other])

    def foreign(self, name: str) -> Injection:
        """The file of another cache of the same spec."""
        stem = name.split("-")[0]
        theirs = self.donated.get(name) or next(data for other, data in self.donated.items() if other.startswith(stem))
        self._write(name, theirs)
        return self._done("replacement", [name], "by another cache's", theirs != self.files[name])

    def stray(self, name: str) -> Injection:
        """A file that nothing names, beside another; sometimes a link, to nowhere or into the cache."""
        place = (
            Path(name).parent / self._pick([".DS_Store", "0", "c", "notes.txt", "zarr.json.bak", "a.parquet"])
        ).as_posix()
        if place in self.files or (self.root / place).exists():
            place = f"{place}.{self._number(1000)}"
        self._touched.append(place)
        how = self._number(4)
        if how == 0:
            (self.root / place).symlink_to(self._pick(["nowhere", self.root / name, self.root]))
        else:
            (self.root / place).write_bytes(self.files[name] if how == 1 else self._random.bytes(self._number(9)))
        return self._done("stray", [place], "a link" if how == 0 else "a file")

    def stray_folder(self, name: str) -> Injection:
        """A folder that leads to no file, or to one."""
        place = (Path(name).parent / self._pick(["new", "v9999", "c.d"])).as_posix()
        self._touched.append(place)
        (self.root / place).mkdir()
        if self._number(2):
            (self.root / place / "x").write_bytes(b"")
            return Injection("stray folder", place, "with a file", True, frozenset([f"{place}/x"]))
        return Injection("stray folder", place, "empty", True, frozenset([f"{place}/"]))

    def folder(self, name: str) -> Injection:
        """A folder in a file's place, empty or not."""
        path = self._clear(name)
        path.mkdir()
        if self._number(2):
            (path / "x").write_bytes(b"x")
        return self._done("folder", [name], "in its place")

    def link(self, name: str) -> Injection:
        """A link in a file's place: to nowhere, to another file, or to a copy of itself, which changes no byte."""
        path = self._clear(name)
        how, other = self._number(3), self._other(name)
        copy = self.root.parent / f"{self.root.name}.elsewhere"
        copy.write_bytes(self.files[name])
        path.symlink_to(["nowhere", self.root / other, copy][how])
        changed = how == 0 or (how == 1 and self.files[other] != self.files[name])
        return self._done("link", [name], ["to nowhere", f"to {other}", "to a copy"][how], changed)

    def pipe(self, name: str) -> Injection:
        """A pipe in a data file's place: whoever opens it waits."""
        if not name.startswith("data/"):
            return self.empty(name)
        os.mkfifo(self._clear(name))
        return self._done("pipe", [name], "in its place")

    def file_for_folder(self, name: str) -> Injection:
        """A file in the place of a folder: all that was below it is gone."""
        folder = Path(name).parent.as_posix()
        if folder == ".":
            return self.delete(name)
        lost = [other for other in self.files if other.startswith(f"{folder}/")]
        shutil.rmtree(self.root / folder)
        (self.root / folder).write_bytes(b"")
        self._touched.append(folder)
        injection = self._done("file for a folder", [name], f"in the place of {folder}")
        self._restores(folder, lost)
        return injection

    def _restores(self, folder: str, lost: list[str]) -> None:
        def heal() -> None:
            (self.root / folder).unlink()
            for name in lost:
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                (self.root / name).write_bytes(self.files[name])

        self._touched.clear()
        self._special = heal

    _special: Callable[[], None] | None = None

    def _other(self, name: str) -> str:
        """Another file: of the same size, of the same folder, or any."""
        others = [other for other in self.files if other != name]
        same = [other for other in others if len(self.files[other]) == len(self.files[name])]
        other: str = self._pick(same if same and self._number(4) else others)
        return other


def heal(injector: Injector) -> None:
    """Takes back the last injection."""
    if injector._special is not None:
        injector._special()
        injector._special = None
    injector.heal()


KINDS: dict[str, Callable[[Injector, str], Injection]] = {
    name: getattr(Injector, name)
    for name in (
        *("flip", "truncate", "append", "zeros", "empty", "delete", "swap", "copy", "foreign"),
        *("stray", "stray_folder", "folder", "link", "pipe", "file_for_folder"),
    )
}


def _weights(names: list[str]) -> Any:
    """Every file counts, and those that there are few of (manifest, tables, receipts) count more."""
    weights = np.array([1.0 if name.startswith("data/") else 4.0 for name in names])
    return weights / weights.sum()


def named(name: str) -> set[str]:
    """The places under which a report may speak of a file."""
    places = {name}
    if receipt := receipt_of(name):
        places.add(f"view {receipt[0]}, shard {receipt[1]}")
    return places


def read_all(root: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


Rows = dict[tuple[Any, ...], Any]


def rows_of(cache: tc.Cache, alive: Any = None) -> Rows:
    """All that can be read of a cache, shard by shard; of what cannot be read the error's type.

    Args:
        cache: an open cache.
        alive: which rows to read, [N]; those that the cache calls alive where not given.
    """
    found: Rows = {("keys",): _or_error(lambda: list(cache.samples.keys))}
    found["alive",] = alive = cache.alive if alive is None else alive
    dead = np.flatnonzero(~alive)
    found["dead",] = [_bytes(lambda: cache.columns("logits", 0, [row])) for row in dead]  # noqa: B023
    found["labels",] = _or_error(lambda: None if cache.labels is None else cache.labels.tolist())
    grid = cache.manifest.first.grid
    for view in range(cache.views):
        for shard in range(grid.shards):
            rows = np.flatnonzero(alive)
            rows = rows[rows // grid.shard_rows == shard]
            found[view, shard, "digest"] = _bytes(lambda: {"": cache.digests(view, rows)})  # noqa: B023
            found[view, shard, "params"] = _bytes(lambda: {"": cache.params(view, rows)})  # noqa: B023
            for name in cache.fields:
                found[view, shard, name] = _bytes(lambda: cache.columns(name, view, rows))  # noqa: B023
    return found


def _or_error(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except CacheError as error:
        return type(error)


def _bytes(read: Callable[[], dict[str, Any]]) -> Any:
    return _or_error(lambda: {part: values.tobytes() for part, values in read().items()})


def missed(injection: Injection, root: Path, sound: Rows, before: set[str]) -> str | None:
    """What an injection shows that must not be; None where it was found, and nothing wrong can be read.

    Args:
        injection: what was done.
        root: the cache.
        sound: `rows_of` it before.
        before: the places that a report named before: the holes of a cache that is being built.
    """
    try:
        report = tc.verify(root)
    except CacheNotFoundError:
        return None if injection.name == "manifest.json" else "verify finds no cache"
    places = {problem.place for problem in report.problems} - before
    if bool(places) != injection.changed:
        return f"verify names {places}"
    if injection.changed and not places & injection.places:
        return f"verify names {places}, and not one of {set(injection.places)}"
    if injection.kind == "pipe":
        # A reader would wait at it, as any program does: verify tells.
        return None
    try:
        cache = tc.open(root)
    except CacheError:
        return None if injection.changed else "a sound cache is not opened"
    found = rows_of(cache, sound["alive",])
    if not all(isinstance(error, type) for error in found["dead",]):
        return "a tombstone is read"
    for key in found.keys() - {("alive",), ("dead",)}:
        value = found[key]
        refused = isinstance(value, type) and issubclass(value, CacheError)
        if value != sound[key] and not (refused and injection.changed):
            return f"{key} reads otherwise"
    return None
