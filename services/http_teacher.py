"""A teacher whose weights are elsewhere: a precompute job asks the service as it would ask a module."""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

from services.answer_table import Fields
from services.journal import Journal
from services.paid_questions import PaidQuestions
from services.replicas import Replicas
from services.retries import Patience
from services.same_teacher import key_of, refuse_local, require_same
from services.transport import Address, Connection
from teacher_cache.errors import TeacherError
from teacher_cache.service_spec import BudgetSpec
from teacher_cache.spec import NormalizeSpec, TeacherSpec, base_of
from teacher_cache.teachers import ViewNames
from teacher_cache.teachers.base import Bill

_FAULTS = 4
"""Tries of one question that may fail on the way, for each replica."""
_BUSY_TRIES = 100_000
"""At 429 and 503 a build's patience is counted in seconds."""


class HttpTeacher:
    """Implements `teacher_cache.teachers.RemoteTeacher`; has the local teacher's fingerprint, and gives its bits.

    Every request names the digest that was seen first: should the service change its teacher in the middle of
    a build, it refuses and the build stops.
    """

    def __init__(self, spec: TeacherSpec, normalize: NormalizeSpec | None = None) -> None:
        """Reads a card and compares.

        Args:
            spec: `model` is http(s)://host:port/<teacher>; `api_key`, or the variable TEACHER_API_KEY. Without a
                `journal` no answer is kept, and no budget can be.
            normalize: the recipe's normalisation; must be the service's where it is given.

        Raises:
            TeacherError: the spec asks for something that the service does otherwise.
            ServiceError: the service refused or cannot be reached.
            BuildError: the journal's folder cannot be used.
        """
        refuse_local(spec)
        if spec.journal is None and spec.budget != BudgetSpec():
            hint = "Builds have one; elsewhere name its folder."
            raise TeacherError("teacher.budget", "is counted in a journal: teacher.journal", "no journal", hint)
        addresses = [Address.of(spec.model, spec.api_key)]
        addresses += [Address.of(url, spec.api_key, "teacher.replicas") for url in spec.replicas]
        connections = [Connection(address, spec.timeout, spec.concurrency) for address in addresses]
        patience = Patience(_BUSY_TRIES, _FAULTS * len(connections), spec.patience)
        replicas = Replicas(connections)
        self._card = replicas.first_card(patience)
        require_same(spec, normalize, self._card)
        self.fields = tuple(spec.fields)
        self.fingerprint = self._card.digest
        self.device, self.threads = self._card.numerics.device, self._card.numerics.threads
        self.concurrency, self._budget = spec.concurrency, spec.budget
        self._journal = None
        if spec.journal is not None:
            # A try may take the timeout several times over: to connect, to write, to read.
            key = key_of(self._card.digest, self._card.numerics, self._card.micro_batch)
            pools = {name: field.pool for name, field in self._card.fields.items()}
            self._journal = Journal(Path(spec.journal), key, spec.budget, 4 * spec.timeout, pools)
        self._questions = PaidQuestions(
            spec.model,
            self.fingerprint,
            replicas,
            self._journal,
            patience,
            by_name=self._card.dataset is not None,
            by_image=not self._card.limits.by_id_only,
        )
        self._threads = ThreadPoolExecutor(spec.concurrency, "teacher")
        self._under_way: set[Future[Fields]] = set()
        self._end = weakref.finalize(self, _end, self._threads, replicas, self._journal)

    def __call__(self, views_BCHW: Tensor, _labels_B: Tensor | None = None) -> Fields:
        """uint8 [B, C, H, W] to float32 fields on the CPU, asked for in one request; none is made with labels."""
        return self._ask(views_BCHW, None)

    def _ask(self, views_BCHW: Tensor, names: ViewNames | None) -> Fields:
        found = self._questions.ask(views_BCHW.cpu(), tuple(dict.fromkeys(map(base_of, self.fields))), names)
        return {name: found[base_of(name)] for name in self.fields}

    def submit(self, views_BCHW: Tensor, names: ViewNames | None = None) -> Future[Fields]:
        """`__call__` in another thread; at most `concurrency` of them ask at once.

        Args:
            views_BCHW: uint8, a whole micro-batch.
            names: of the views before its fillings: where the service knows them, it is sent no image.
        """
        future = self._threads.submit(self._ask, views_BCHW, names)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def shapes(self, view_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The card's: a question could cost."""
        height, width, channels = self._card.input.shape
        if tuple(view_shape) != (channels, height, width):
            rule = f"must have the service's input size, {(channels, height, width)}"
            raise TeacherError("views", rule, tuple(view_shape), "Change the recipe's size.")
        return {name: self._card.fields[base_of(name)].shape for name in self.fields}

    def drain(self) -> None:
        """Ends retries, and waits for the answers that are under way: they may be paid for."""
        self._questions.hurry.set()
        try:
            wait(tuple(self._under_way))
        finally:
            self._questions.hurry.clear()

    def settle(self, forget: bool) -> Bill | None:
        """Lets the journal's answers go, where it is told to; the account stays. None where nothing is counted."""
        if self._journal is None:
            return None
        if forget:
            self._journal.forget()
        return self._journal.account().bill(self._budget)

    def close(self) -> None:
        """Closes connections and journal; also done when the teacher is forgotten."""
        self.drain()
        self._end()


def _end(threads: ThreadPoolExecutor, replicas: Replicas, journal: Journal | None) -> None:
    threads.shutdown(wait=False)
    replicas.close()
    if journal is not None:
        journal.close()
