"""The journal of a paid teacher: each answer is written before it is used, each try is counted before it leaves.

A question is a whole micro-batch, named by the digest of its exact bytes: the rows of a micro-batch are independent
only up to the last bit, which can follow the place in it, so an answer is good for this layout and no other. It is
kept for each field; k and temperature are applied afterwards and are no part of it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from sqlite3 import Connection
from typing import NamedTuple

from services.account import Account
from services.answer_table import AnswerTable, Fields
from services.journal_file import JournalFile
from teacher_cache.builder import HERE, Builder
from teacher_cache.service_spec import BudgetSpec


class Ticket(NamedTuple):
    """A try that is counted: it may leave."""

    id: int


class Journal:
    """One process's part in the journal of one teacher; safe to use from several threads."""

    def __init__(self, folder: Path, teacher: str, budget: BudgetSpec, seconds: float) -> None:
        """Opens it.

        Args:
            folder: where it lies, and other builders' too.
            teacher: digest of the teacher, with all else that decides bits.
            budget: the most that may be counted.
            seconds: after which a try of a process that cannot be looked at is thought lost.

        Raises:
            BuildError: the folder or the file cannot be used.
        """
        self._file = JournalFile(folder)
        self._answers = AnswerTable(self._file, teacher)
        self._teacher, self._budget, self._seconds = teacher, budget, seconds
        self._me = Builder.here(joined=True)
        with self._file.changing() as db:
            db.execute("INSERT OR IGNORE INTO accounts (teacher) VALUES (?)", (teacher,))
            mine = (self._me.id, json.dumps(asdict(self._me)), time.time())
            db.execute("INSERT INTO writers VALUES (?, ?, ?)", mine)
        HERE.add(self._me.id)

    def close(self) -> None:
        """Closes the file; tries that are under way are lost to it."""
        HERE.discard(self._me.id)
        self._file.close()

    def find(self, question: bytes, fields: Sequence[str]) -> Fields:
        """The answers that are there, of these fields; one that is damaged is not."""
        return self._answers.find(question, fields)

    def leave(self, question: bytes, fields: Sequence[str], images: int) -> Ticket | None:
        """Counts a try. None where the answers are there by now, or while it must wait: for whoever is asking this
        very question, or holds the last room.

        Raises:
            BudgetError: there is no room for it, and nothing under way that could make some.
        """
        with self._file.changing() as db:
            others = self._under_way(db)
            # Looked for under the lock: whoever asked may have been answered since.
            if question in others or self._answers.has(db, question, fields):
                return None
            reason = self._read(db).beyond(self._budget, images)
            if reason is None:
                self._count(db, 1, images)
                now = time.time()
                db.execute("UPDATE writers SET seen = ? WHERE id = ?", (now, self._me.id))
                row = (self._teacher, question, images, self._me.id, now + self._seconds)
                added = db.execute(
                    "INSERT INTO tries (teacher, question, images, writer, until) VALUES (?, ?, ?, ?, ?)", row
                )
                assert added.lastrowid is not None, "it was inserted"
                return Ticket(added.lastrowid)
        # What is under way may be refused, and make room; and nobody stops a build whose answers are still to come.
        if others:
            return None
        raise reason

    def answered(self, ticket: Ticket, question: bytes, answers: Fields) -> Fields:
        """Keeps an answer, for good when this returns; what was kept first is what is given."""
        with self._file.changing() as db:
            self._answers.put(db, question, answers)
            db.execute("DELETE FROM tries WHERE id = ?", ticket)
        return {**answers, **self.find(question, tuple(answers))}

    def refused(self, ticket: Ticket) -> None:
        """It was certainly not answered: it costs nothing."""
        with self._file.changing() as db:
            (images,) = db.execute("SELECT images FROM tries WHERE id = ?", ticket).fetchone()
            db.execute("DELETE FROM tries WHERE id = ?", ticket)
            self._count(db, -1, -images)

    def lost(self, ticket: Ticket) -> None:
        """It may have been answered and paid for: it stays counted."""
        with self._file.changing() as db:
            self._lose(db, ticket.id)

    def account(self) -> Account:
        """What was asked for until now; tries of processes that are gone are lost."""
        with self._file.changing() as db:
            self._under_way(db)
            return self._read(db)

    def _read(self, db: Connection) -> Account:
        columns = "requests, images, lost_requests, lost_images, damaged"
        return Account(*db.execute(f"SELECT {columns} FROM accounts WHERE teacher = ?", (self._teacher,)).fetchone())

    def forget(self, patience: float = 3.0) -> bool:
        """Removes the answers, unless others are at work who may need theirs; the account stays.

        Args:
            patience: seconds in which workers that were told to stop may end.
        """
        limit = time.monotonic() + patience
        while True:
            with self._file.changing() as db:
                alone = not self._others(db)
                if alone:
                    gone = db.execute("DELETE FROM answers WHERE teacher = ?", (self._teacher,)).rowcount
            if alone or time.monotonic() > limit:
                break
            time.sleep(0.05)
        if alone and gone:
            self._file.shrink()
        return alone

    def _others(self, db: Connection) -> bool:
        """Whether another process has this journal open; those that are gone are struck off."""
        for id_, body, seen in db.execute("SELECT id, builder, seen FROM writers").fetchall():
            if id_ == self._me.id:
                continue
            if self._is_alive(body, seen + self._seconds):
                return True
            db.execute("DELETE FROM writers WHERE id = ?", (id_,))
        return False

    def _under_way(self, db: Connection) -> set[bytes]:
        """The questions that processes are asking which are alive. Tries of others are lost."""
        query = (
            "SELECT tries.id, question, until, builder FROM tries LEFT JOIN writers ON writer = writers.id "
            "WHERE teacher = ?"
        )
        alive = set()
        for id_, question, until, body in db.execute(query, (self._teacher,)).fetchall():
            if body is not None and self._is_alive(body, until):
                alive.add(question)
            else:
                self._lose(db, id_)
        return alive

    def _is_alive(self, body: str, until: float) -> bool:
        builder = Builder(**json.loads(body))
        # Only processes of this machine can be looked at; of others (another container) a time must do.
        here = builder.machine == self._me.machine
        return replace(builder, until=math.inf if here else until).alive

    def _lose(self, db: Connection, id_: int) -> None:
        lose = (
            "UPDATE accounts SET lost_requests = lost_requests + 1, lost_images = lost_images + "
            "(SELECT images FROM tries WHERE id = ?) WHERE teacher = ?"
        )
        db.execute(lose, (id_, self._teacher))
        db.execute("DELETE FROM tries WHERE id = ?", (id_,))

    def _count(self, db: Connection, requests: int, images: int) -> None:
        change = "UPDATE accounts SET requests = requests + ?, images = images + ? WHERE teacher = ?"
        db.execute(change, (requests, images, self._teacher))
