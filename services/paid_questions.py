"""A question's way: from the journal, or counted there, asked, written there, and only then used."""

from __future__ import annotations

import contextlib
import threading

import httpx
from torch import Tensor

from services.journal import Fields, Journal, Ticket, question_of
from services.prediction import Wish, ask_images, read_prediction
from services.replicas import Replica, Replicas
from services.retries import Patience, Retries, perhaps_paid, status_of
from teacher_cache.errors import ServiceError, TeacherCacheError

_POLL = 0.05
"""Seconds between two looks at whether another builder has the answer."""


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
        question = question_of(views_BCHW)
        retries = Retries(self._url, self._patience)
        while True:
            found = self._journal.find(question, fields) if self._journal is not None else {}
            missing = tuple(name for name in fields if name not in found)
            # Of a question that is answered in part, only the fields that are missing are asked for.
            answer = self._try(question, missing, views_BCHW, retries) if missing else {}
            if answer is not None:
                return {**found, **answer}

    def _try(self, question: bytes, fields: tuple[str, ...], views_BCHW: Tensor, retries: Retries) -> Fields | None:
        """One request; None where there is to be another look, after the wait that is due."""
        try:
            replica = self._replicas.ready()
        except httpx.HTTPError as error:
            self._pause(retries, error)
            return None
        if self._journal is None:
            try:
                return self._exchange(replica, question, fields, views_BCHW)
            except httpx.HTTPError as error:
                self._pause(retries, error)
            return None
        ticket = self._journal.leave(question, fields, len(views_BCHW))
        if ticket is None:
            self._rest(_POLL)
            return None
        try:
            answer = self._exchange(replica, question, fields, views_BCHW)
        except httpx.HTTPError as error:
            self._journal.lost(ticket) if perhaps_paid(error) else self._journal.refused(ticket)
            self._pause(retries, error)
            return None
        except BaseException:
            self._give_up(ticket)
            raise
        return self._journal.answered(ticket, question, answer)

    def _give_up(self, ticket: Ticket) -> None:
        """An answer that is none, or Ctrl-C: it may be paid for. What went wrong first is what is told."""
        assert self._journal is not None, "it gave the ticket"
        with contextlib.suppress(TeacherCacheError):
            self._journal.lost(ticket)

    def _exchange(self, replica: Replica, question: bytes, fields: tuple[str, ...], views_BCHW: Tensor) -> Fields:
        # One id for all tries of a question: the service's log then shows what may have been answered twice.
        wish = Wish(fields=fields, digest=self._digest, request_id=question.hex())
        data = self._replicas.once(replica, ask_images(views_BCHW, wish)).content
        answer = read_prediction(replica.connection.url, data)
        found = dict(answer.features) if answer.values is None else {**answer.features, "logits": answer.values}
        for name in fields:
            if name not in found or len(found[name]) != len(views_BCHW):
                shape = tuple(found[name].shape) if name in found else "no such tensor"
                rule = f"must answer {name} for {len(views_BCHW)} images"
                raise ServiceError(replica.connection.url, rule, shape, "Is it a teacher-serve of this version?")
        return {name: found[name] for name in fields}

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
