"""A question's way: from the journal, or counted there, asked, written there, and only then used."""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

import httpx
from torch import Tensor

from services import wire
from services.journal import Fields, Journal, Ticket
from services.prediction import Wish, ask_images, read_prediction
from services.replicas import Replica, Replicas
from services.retries import Patience, Retries, perhaps_paid, status_of
from services.transport import Asked
from teacher_cache.errors import ServiceError, TeacherCacheError

_POLL = 0.05
"""Seconds between two looks at whether another builder has the answer."""


class _Asked(NamedTuple):
    """A request, and what its answer must have."""

    request: Asked
    fields: tuple[str, ...]
    rows: int


class PaidQuestions:
    """Safe to use from several threads."""

    def __init__(self, url: str, digest: str, replicas: Replicas, journal: Journal | None, patience: Patience) -> None:
        """Asks nothing yet.

        Args:
            url: the teacher's, for messages.
            digest: named in every request: should the service change its teacher, it refuses.
            replicas: where it is.
            journal: of this teacher; without one, answers are not kept and not counted.
            patience: of one question.
        """
        self._url, self._digest = url, digest
        self._replicas, self._journal, self._patience = replicas, journal, patience
        self.hurry = threading.Event()
        """While it is set, nothing is tried a second time."""

    def ask(self, views_BCHW: Tensor, fields: tuple[str, ...]) -> Fields:
        """The answer to a whole micro-batch, from wherever it is there first.

        Raises:
            ServiceError: the service refused, or could not answer.
            BudgetError: no more may be spent, and every answer that was under way has come.
        """
        question, rows = wire.identity_of(views_BCHW), len(views_BCHW)
        retries = Retries(self._url, self._patience)
        while True:
            found = self._journal.find(question, fields) if self._journal is not None else {}
            # Of a question that is answered in part, only the fields that are missing are asked for.
            missing = tuple(name for name in fields if name not in found)
            if not missing:
                return found
            # One id for all tries of a question: the service's log then shows what may have been answered twice.
            wish = Wish(fields=missing, digest=self._digest, request_id=question.hex())
            answer = self._try(question, _Asked(ask_images(views_BCHW, wish), missing, rows), retries)
            if answer is not None:
                return {**found, **answer}

    def _try(self, question: bytes, asked: _Asked, retries: Retries) -> Fields | None:
        """One request; None where there is to be another look, after the wait that is due."""
        try:
            replica = self._replicas.ready()
            if self._journal is None:
                return self._exchange(replica, asked)
            ticket = self._journal.leave(question, asked.fields, asked.rows)
            if ticket is not None:
                return self._counted(self._journal, ticket, question, replica, asked)
            self._rest(_POLL)
        except httpx.HTTPError as error:
            self._pause(retries, error)
        return None

    def _counted(self, journal: Journal, ticket: Ticket, question: bytes, replica: Replica, asked: _Asked) -> Fields:
        try:
            answer = self._exchange(replica, asked)
        except httpx.HTTPError as error:
            settle = journal.lost if perhaps_paid(error) else journal.refused
            settle(ticket)
            raise
        except BaseException:
            # An answer that is none, or Ctrl-C: it may be paid for. What went wrong first is what is told.
            with contextlib.suppress(TeacherCacheError):
                journal.lost(ticket)
            raise
        return journal.answered(ticket, question, answer)

    def _exchange(self, replica: Replica, asked: _Asked) -> Fields:
        url = replica.connection.url
        answer = read_prediction(url, self._replicas.once(replica, asked.request).content)
        found = dict(answer.features) if answer.values is None else {**answer.features, "logits": answer.values}
        hint = "Is it a teacher-serve of this version?"
        for name in asked.fields:
            if name not in found or len(found[name]) != asked.rows:
                shape = tuple(found[name].shape) if name in found else "no such tensor"
                raise ServiceError(url, f"must answer {name} for {asked.rows} images", shape, hint)
        if answer.metadata.get("digest") != self._digest:
            rule = f"must answer as the teacher that was asked for, {self._digest}"
            raise ServiceError(url, rule, answer.metadata.get("digest", "no digest"), hint)
        return {name: found[name] for name in asked.fields}

    def _pause(self, retries: Retries, error: httpx.HTTPError) -> None:
        """Waits, or raises `ServiceError` where nothing is tried again."""
        seconds = retries.after(error)
        # Our own budget is the same at every replica.
        if status_of(error) != 429 and self._replicas.is_one_up():
            seconds = 0.0
        self._rest(seconds)

    def _rest(self, seconds: float) -> None:
        if self.hurry.wait(seconds):
            hint = "Run the same command again: it goes on."
            raise ServiceError(self._url, "is not asked again, because the build ends", "unanswered", hint)
