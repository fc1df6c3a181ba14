"""The service's journal: what the model has computed is on the disk before it leaves, and a build can take it over.

It is the same file as a paid teacher's journal, under the same keys: the teacher with all that decides bits, and the
exact pixels of a question in their order. So a builder that is pointed at it (`teacher.journal`) finds whole
micro-batches there that it would have to compute.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from services.answer_table import AnswerTable, Fields
from services.journal_file import JournalFile
from services.scribe import Scribe

_log = logging.getLogger("services")


class KeptAnswers:
    """Thread-safe. One commit for all answers that wait together."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Opens the file, or makes it.

        Args:
            folder: where it lies.
            most_bytes: size from which on nothing more is kept.

        Raises:
            BuildError: the folder or the file cannot be used.
        """
        self._file, self._most = JournalFile(folder), most_bytes
        self._scribe = Scribe("journal", self)
        self._waiting: list[tuple[str, bytes, Fields, bool]] = []
        self.full = self._is_full()
        """Whether answers are not kept any more."""

    def start(self) -> None:
        """Starts the thread that writes."""
        self._scribe.start()

    def close(self) -> None:
        """Writes what was handed over, and closes the file."""
        self._scribe.stop()
        self._file.close()

    def find(self, teacher: str, question: bytes, fields: Sequence[str]) -> Fields:
        """The answers to a question that are kept, of these fields."""
        return AnswerTable(self._file, teacher).find(question, fields)

    def keep(self, teacher: str, question: bytes, answers: Fields, *, again: bool = False) -> Future[None]:
        """Hands answers over.

        Args:
            teacher: digest of the teacher, with all else that decides bits.
            question: that names the pixels.
            answers: by field.
            again: in place of what is kept.

        Returns:
            A future that is done when they are on the disk (or, once the journal is full, left out), and fails where
            they cannot be written.
        """
        return self._scribe.submit(lambda: self._waiting.append((teacher, question, answers, again)), durable=True)

    def commit(self) -> None:
        """Writes what waits, in one transaction."""
        if not self.full:
            with self._file.changing() as db:
                for teacher, question, answers, again in self._waiting:
                    AnswerTable(self._file, teacher).put(db, question, answers, again=again)
            self.full = self._is_full()
        self._waiting.clear()

    def rollback(self) -> None:
        """Lets go of what waits."""
        self._waiting.clear()

    def _is_full(self) -> bool:
        with self._file.reading() as db:
            (pages,), (size,) = db.execute("PRAGMA page_count").fetchone(), db.execute("PRAGMA page_size").fetchone()
        full: bool = pages * size >= self._most
        if full:
            rule = "service.journal_bytes is reached: answers are given, and not kept any more"
            _log.warning("%s: %s", self._file.path, rule)
        return full
