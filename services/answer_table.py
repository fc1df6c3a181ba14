"""The answers of one teacher in a journal's file: found and put by question, each under a checksum of its place."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from sqlite3 import Connection

from torch import Tensor

from services import wire
from services.journal_file import JournalFile
from teacher_cache.storage import crc32c

_log = logging.getLogger("services")
Fields = dict[str, Tensor]


class AnswerTable:
    """As safe to share as the file is."""

    def __init__(self, file: JournalFile, teacher: str, pools: Mapping[str, str] = {}) -> None:
        """Reads nothing yet.

        Args:
            file: where they lie, and other teachers' too.
            teacher: digest of the teacher, with all else that decides bits.
            pools: `none` or `mean`, by field; a field that is not named is not pooled. What is pooled otherwise is
                another answer.
        """
        self._file, self._teacher, self._pools = file, teacher, pools

    def find(self, question: bytes, fields: Sequence[str]) -> Fields:
        """The answers that are there, of these fields; one that is damaged is not."""
        found = {}
        for name in fields:
            with self._file.reading() as db:
                # Cast: what is damaged may have become a text.
                query = (
                    "SELECT CAST(data AS BLOB), checksum FROM answers WHERE teacher = ? AND question = ? AND field = ?"
                )
                row = db.execute(query, (self._teacher, question, self._stored(name))).fetchone()
            if row is not None and row[1] == self._checksum(question, name, row[0]):
                found[name] = wire.unpack_tensors(row[0])[name]
            elif row is not None:
                self._forget_damaged(question, name)
        return found

    def has(self, db: Connection, question: bytes, fields: Sequence[str]) -> bool:
        """Whether all of these fields are there, damaged or not."""
        query = "SELECT field FROM answers WHERE teacher = ? AND question = ?"
        found = {name for (name,) in db.execute(query, (self._teacher, question))}
        return found.issuperset(map(self._stored, fields))

    def _stored(self, field: str) -> str:
        return field if self._pools.get(field, "none") == "none" else f"{field} ({self._pools[field]})"

    def put(self, db: Connection, question: bytes, answers: Fields, *, again: bool = False) -> None:
        """Writes answers, in the caller's transaction.

        Args:
            db: where that is open.
            question: 32 bytes that name it.
            answers: by field.
            again: take the place of what is there; otherwise the first answer stays.
        """
        change = "INSERT OR REPLACE" if again else "INSERT OR IGNORE"
        for name, values in answers.items():
            data = wire.pack_tensors({name: values})
            row = (self._teacher, question, self._stored(name), data, self._checksum(question, name, data))
            db.execute(f"{change} INTO answers VALUES (?, ?, ?, ?, ?)", row)

    def _checksum(self, question: bytes, field: str, data: bytes) -> int:
        return crc32c(b"\0".join([self._teacher.encode(), question, self._stored(field).encode(), data]))

    def _forget_damaged(self, question: bytes, field: str) -> None:
        _log.warning("%s: a kept answer is damaged and is asked for again (%s)", self._file.path, field)
        with self._file.changing() as db:
            gone = "DELETE FROM answers WHERE teacher = ? AND question = ? AND field = ?"
            if db.execute(gone, (self._teacher, question, self._stored(field))).rowcount:
                db.execute("UPDATE accounts SET damaged = damaged + 1 WHERE teacher = ?", (self._teacher,))
