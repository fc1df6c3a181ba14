"""The answers of one teacher in a journal's file: found and put by question, each under a checksum of its place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from sqlite3 import Connection

from torch import Tensor

from services import wire
from services.journal_file import JournalFile
from teacher_cache.storage import crc32c

_log = logging.getLogger("services")
Fields = dict[str, Tensor]


class AnswerTable:
    """As safe to share as the file is."""

    def __init__(self, file: JournalFile, teacher: str) -> None:
        """Reads nothing yet.

        Args:
            file: where they lie, and other teachers' too.
            teacher: digest of the teacher, with all else that decides bits.
        """
        self._file, self._teacher = file, teacher

    def find(self, question: bytes, fields: Sequence[str]) -> Fields:
        """The answers that are there, of these fields; one that is damaged is not."""
        with self._file.reading() as db:
            # Cast: what is damaged may have become a text.
            query = "SELECT field, CAST(data AS BLOB), checksum FROM answers WHERE teacher = ? AND question = ?"
            rows = [row for row in db.execute(query, (self._teacher, question)) if row[0] in fields]
        found = {name: data for name, data, checksum in rows if checksum == self._checksum(question, name, data)}
        for name, _, _ in rows:
            if name not in found:
                self._forget_damaged(question, name)
        return {name: wire.unpack_tensors(data)[name] for name, data in found.items()}

    def has(self, db: Connection, question: bytes, fields: Sequence[str]) -> bool:
        """Whether all of these fields are there, damaged or not."""
        query = "SELECT field FROM answers WHERE teacher = ? AND question = ?"
        return {name for (name,) in db.execute(query, (self._teacher, question))}.issuperset(fields)

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
            row = (self._teacher, question, name, data, self._checksum(question, name, data))
            db.execute(f"{change} INTO answers VALUES (?, ?, ?, ?, ?)", row)

    def _checksum(self, question: bytes, field: str, data: bytes) -> int:
        return crc32c(b"\0".join([self._teacher.encode(), question, field.encode(), data]))

    def _forget_damaged(self, question: bytes, field: str) -> None:
        _log.warning("%s: a kept answer is damaged and is asked for again (%s)", self._file.path, field)
        with self._file.changing() as db:
            gone = "DELETE FROM answers WHERE teacher = ? AND question = ? AND field = ?"
            if db.execute(gone, (self._teacher, question, field)).rowcount:
                db.execute("UPDATE accounts SET damaged = damaged + 1 WHERE teacher = ?", (self._teacher,))
