"""The file of a journal: an SQLite database that any number of processes of one host may write, killed at any moment.

SQLite in WAL mode, because what is asked of it is what it is made for: a commit is there whole or not at all after
SIGKILL and after a power failure, counters change under a lock that dies with its process, and an index on disk keeps
memory small. Files of our own, one for each writer, would need all three again. Its limit is one host: processes
of several must not share the file over a network.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from teacher_cache.errors import BuildError
from teacher_cache.storage.files import make_folder, sync_folder

NAME = "answers.sqlite3"
VERSION = 1
_PATIENCE = 60.0
"""Seconds that one process waits for others, each of which holds the lock for one commit."""
_SCHEMA = """
CREATE TABLE answers (
    teacher TEXT NOT NULL, question BLOB NOT NULL, field TEXT NOT NULL, data BLOB NOT NULL, checksum INTEGER NOT NULL,
    UNIQUE (teacher, question, field));
CREATE TABLE tries (
    id INTEGER PRIMARY KEY, teacher TEXT NOT NULL, question BLOB NOT NULL, images INTEGER NOT NULL,
    writer TEXT NOT NULL, until REAL NOT NULL);
CREATE INDEX tries_of ON tries (teacher, question);
CREATE TABLE accounts (
    teacher TEXT PRIMARY KEY, requests INTEGER NOT NULL DEFAULT 0, images INTEGER NOT NULL DEFAULT 0,
    lost_requests INTEGER NOT NULL DEFAULT 0, lost_images INTEGER NOT NULL DEFAULT 0,
    damaged INTEGER NOT NULL DEFAULT 0);
CREATE TABLE writers (id TEXT PRIMARY KEY, builder TEXT NOT NULL, seen REAL NOT NULL);
"""


class JournalFile:
    """One process's connection; safe to use from several threads, not behind a fork."""

    def __init__(self, folder: Path) -> None:
        """Opens the journal in a folder, and makes both where there are none.

        Raises:
            BuildError: the folder cannot be written, or the file is no journal of this version.
        """
        self.path = folder / NAME
        self._lock = threading.RLock()
        try:
            make_folder(folder)
        except OSError as error:
            hint = "Name another folder: teacher.journal."
            raise BuildError(str(folder), f"cannot be made: {error.strerror}", "teacher.journal", hint) from error
        with self._explained():
            self._db = sqlite3.connect(self.path, _PATIENCE, isolation_level=None, check_same_thread=False)
            self.close = weakref.finalize(self, self._db.close)
            """Closes the file; also done when this object is forgotten."""
            self._prepare()
        sync_folder(folder)

    def _prepare(self) -> None:
        self._use_wal()
        # Every commit is on the disk before an answer is used, or a request leaves.
        self._db.execute("PRAGMA synchronous = FULL")
        with self.changing() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                hint = "Name another folder (teacher.journal), or use the version that wrote it."
                raise BuildError(str(self.path), f"must be a journal of version {VERSION}", version, hint)

    def _use_wal(self) -> None:
        """Two that open a new file at once get in each other's way here, and SQLite does not wait by itself."""
        limit = time.monotonic() + _PATIENCE
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > limit:
                    raise
                time.sleep(0.01)

    @contextlib.contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: no other writer in between; durable when this ends, and undone by an exception."""
        with self._lock, self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """What is committed now."""
        with self._lock, self._explained():
            yield self._db

    def shrink(self) -> None:
        """Gives the room of what was deleted back to the disk."""
        with self._lock, self._explained():
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            hint = "Free space, or correct the permissions; then run the same command again: nothing paid is lost."
            raise BuildError(str(self.path), f"the journal cannot be used: {error}", "teacher.journal", hint) from error
        except sqlite3.DatabaseError as error:
            hint = (
                f"Save what is there (sqlite3 {self.path} .recover), or move the folder away: what only it holds is "
                "asked for again."
            )
            raise BuildError(str(self.path), f"the journal is damaged: {error}", "teacher.journal", hint) from error
