"""What was spent, in SQLite: one row for each key, one for each of its days, one for each image where that counts."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.errors import SpecError

_VERSION = 1
_SCHEMA = f"""
BEGIN;
CREATE TABLE totals (key TEXT PRIMARY KEY, requests INTEGER NOT NULL, images INTEGER NOT NULL,
    distinct_images INTEGER NOT NULL, paid_off INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE days (key TEXT, day TEXT, images INTEGER NOT NULL, PRIMARY KEY (key, day)) WITHOUT ROWID;
CREATE TABLE seen (key TEXT, digest BLOB, PRIMARY KEY (key, digest)) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_SPEND_TOTAL = """INSERT INTO totals VALUES (?, 1, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + 1,
    images = images + excluded.images, distinct_images = distinct_images + excluded.distinct_images,
    paid_off = excluded.paid_off"""
_SPEND_DAY = "INSERT INTO days VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET images = images + excluded.images"


@dataclass(frozen=True)
class Totals:
    """Of one key, for ever."""

    requests: int = 0
    images: int = 0
    distinct_images: int = 0
    paid_off: int = 0
    """When the pace's debt is paid off, in nanoseconds of Unix time."""


class UsageFile:
    """Reads see what was spent and not yet committed. One thread at a time."""

    def __init__(self, path: Path | None) -> None:
        """Opens the file, or makes it; None keeps everything in memory.

        Raises:
            SpecError: it is not such a file, or cannot be written.
        """
        hint = "Restore it from a copy; without it, everybody's budget is whole again."
        try:
            if path is not None:
                # SQLite gives the files that it makes beside this one the same mode.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            # The thread that opens it is not the one that goes on with it.
            self._database = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            # A commit waits for the disk, so that what was paid stays paid when the power fails.
            self._database.execute("PRAGMA synchronous = FULL")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise SpecError("state", f"must hold a usable usage.sqlite: {error}", path, hint) from None
        if version not in (0, _VERSION):
            self.close()
            raise SpecError("state", f"must hold a usage.sqlite of version {_VERSION}", version, hint)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def commit(self) -> None:
        """What was spent is on the disk."""
        if self._database.in_transaction:
            self._database.execute("COMMIT")

    def rollback(self) -> None:
        """What was spent since the last commit is not."""
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")

    def spend(self, key: str, day: str, images: int, digests: Iterable[bytes], paid_off: int) -> None:
        """Adds one answered request."""
        if not self._database.in_transaction:
            self._database.execute("BEGIN IMMEDIATE")
        before = self._database.total_changes
        self._database.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", ((key, one) for one in digests))
        new = self._database.total_changes - before
        self._database.execute(_SPEND_TOTAL, (key, images, new, paid_off))
        self._database.execute(_SPEND_DAY, (key, day, images))

    def totals(self, key: str) -> Totals:
        """Zeros for a key that was never answered."""
        query = "SELECT requests, images, distinct_images, paid_off FROM totals WHERE key = ?"
        row = self._database.execute(query, (key,)).fetchone()
        return Totals(*row) if row else Totals()

    def images_of(self, key: str, day: str) -> int:
        """Images of one day."""
        row = self._database.execute("SELECT images FROM days WHERE key = ? AND day = ?", (key, day)).fetchone()
        return int(row[0]) if row else 0

    def seen(self, key: str, digests: Iterable[bytes]) -> set[bytes]:
        """Which of these images the key was answered before."""
        query = "SELECT 1 FROM seen WHERE key = ? AND digest = ?"
        return {one for one in digests if self._database.execute(query, (key, one)).fetchone()}
