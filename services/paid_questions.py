"""A question's way: from the journal, or counted there, asked, written there, and only then used."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import NamedTuple

import httpx
from torch import Tensor

from services import wire
from services.answer_table import Fields
from services.journal import Journal, Ticket
from services.prediction import ask_images, ask_named, read_prediction
from services.replicas import Replica, Replicas
from services.retries import Patience, Retries, perhaps_paid, status_of
from services.transport import Asked
from services.wish import Wish
from teacher_cache.errors import ServiceError, TeacherCacheError
from teacher_cache.teachers import ViewNames

_POLL = 0.05
"""Seconds between two looks at whether another builder has the answer."""


_REFUSALS = 3
"""Questions by name that may be refused one after the other before no more are asked."""
_NOT_BY_NAME = (403, 404, 413, 415, 422)


class _Asked(NamedTuple):
    """A request, and what its answer must have."""

    request: Asked
    fields: tuple[str, ...]
    rows: int
    images: int
    """That it may cost."""
    by_name: bool = False


class _Unnamed(Exception):  # noqa: N818 - a state, not a defect
    """The service has no such samples, or others by these names: it must be sent the images."""


class PaidQuestions:
    """Safe to use from several threads."""

    def __init__(
        self,
        url: str,
        digest: str,
        replicas: Replicas,
        journal: Journal | None,
        patience: Patience,
        *,
        by_name: bool = False,
        by_image: bool = True,
    ) -> None:
        """Asks nothing yet.

        Args:
            url: the teacher's, for messages.
            digest: named in every request: should the service change its teacher, it refuses.
            replicas: where it is.
            journal: of this teacher; without one, answers are not kept and not counted.
            patience: of one question.
            by_name: whether the service has a data set that may be asked by name.
            by_image: whether it may be sent images.
        """
        self._by_name, self._by_image, self._refusals = by_name, by_image, 0
        self._url, self._digest = url, digest
        self._replicas, self._journal, self._patience = replicas, journal, patience
        self.hurry = threading.Event()
        """While it is set, nothing is tried a second time."""

    def ask(self, views_BCHW: Tensor, fields: tuple[str, ...], names: ViewNames | None = None) -> Fields:
        """The answer to a whole micro-batch, from wherever it is there first.

        Args:
            views_BCHW: uint8, all of it with its fillings.
            fields: that are wanted.
            names: of the views before the fillings; where the service knows them it is sent no image.

        Raises:
            ServiceError: the service refused, or could not answer.
            BudgetError: no more may be spent, and every answer that was under way has come.
        """
        question = wire.identity_of(views_BCHW)
        retries = Retries(self._url, self._patience)
        while True:
            found = self._journal.find(question, fields) if self._journal is not None else {}
            # Of a question that is answered in part, only the fields that are missing are asked for.
            missing = tuple(name for name in fields if name not in found)
            if not missing:
                return found
            # One id for all tries of a question: the service's log then shows what may have been answered twice.
            wish = Wish(fields=missing, digest=self._digest, request_id=question.hex())
            try:
                answer = self._try(question, self._asked(views_BCHW, wish, names), retries)
            except _Unnamed:
                # What is missing there is sent: the whole micro-batch, because its bits are those of its layout.
                names = None
                continue
            if answer is not None:
                return {**found, **answer}

    def _asked(self, views_BCHW: Tensor, wish: Wish, names: ViewNames | None) -> _Asked:
        fields, rows = tuple(wish.fields), len(views_BCHW)
        if names is not None and self._by_name:
            asked = ask_named(names.keys, names.view, wish, digests=names.digests.tolist(), whole=True)
            return _Asked(asked, fields, rows, len(names.keys), by_name=True)
        if not self._by_image:
            hint = "Ask for a key that may bring images, or build over the service's own data set and recipe."
            rule = "must know the samples by name: this key may bring no images"
            raise ServiceError(self._url, rule, "it does not", hint)
        # Not from its cache, whose encoding may have rounded, nor into its journal: ours keeps it.
        return _Asked(ask_images(views_BCHW, replace(wish, cache="bypass")), fields, rows, rows)

    def _try(self, question: bytes, asked: _Asked, retries: Retries) -> Fields | None:
        """One request; None where there is to be another look, after the wait that is due."""
        try:
            replica = self._replicas.ready()
            if self._journal is None:
                return self._exchange(replica, asked)
            ticket = self._journal.leave(question, asked.fields, asked.images)
            if ticket is not None:
                return self._counted(self._journal, ticket, question, replica, asked)
            self._rest(_POLL)
        except httpx.HTTPError as error:
            if asked.by_name:
                self._require_named(error)
            self._pause(retries, error)
        return None

    def _require_named(self, error: httpx.HTTPError) -> None:
        """Raises `_Unnamed` where a question by name was refused, and the same one by image may not be."""
        if status_of(error) not in _NOT_BY_NAME:
            return
        self._refusals += 1
        if self._refusals >= _REFUSALS:
            self._by_name = False
        raise _Unnamed from None

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
        if asked.by_name:
            self._refusals = 0
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
