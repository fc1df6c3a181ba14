"""The other side of the wire, for people and programs that may have a teacher's answers but not its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from services.prediction import (
    CARD,
    Prediction,
    Wish,
    ask_file,
    ask_images,
    ask_named,
    read_card,
    read_lookup,
    read_prediction,
)
from services.retries import Patience
from services.schemas import CacheUse, Output, TeacherCard
from services.transport import Address, Asked, Connection
from teacher_cache.spec import NormalizeSpec, TeacherSpec

if TYPE_CHECKING:
    from services.http_teacher import HttpTeacher

__all__ = ["Prediction", "TeacherClient", "open_http_teacher"]


class TeacherClient:
    """One teacher of a service. Keeps its connections; safe to use from several threads.

    A question that breaks off or comes too late is asked again: it may then be answered, and counted, twice.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        attempts: int = 8,
        patience: float = 600.0,
    ) -> None:
        """Asks nothing yet.

        Args:
            url: `http://host:port/<teacher>`.
            api_key: bearer key; the variable TEACHER_API_KEY where None.
            timeout: seconds that one request may take.
            attempts: tries of one question in all: while the service answers 429 or 503, and at most four that fail
                on the way.
            patience: seconds that one question may wait between its tries; a 429 that asks for more is given up.

        Raises:
            TeacherError: the URL names no teacher.
        """
        self.url = url
        self._patience = Patience(attempts=attempts, seconds=patience)
        self._connection = Connection(Address.of(url, api_key), timeout)

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._connection.close()

    def card(self) -> TeacherCard:
        """What the teacher takes and offers.

        Raises:
            ServiceError: the service refused, cannot be reached, or is no teacher service.
        """
        return read_card(self.url, self._connection.send(CARD, self._patience))

    def predict(
        self,
        images_BCHW: Tensor,
        *,
        output: Output = "logits",
        k: int | None = None,
        temperature: float | None = None,
        fields: Sequence[str] = ("logits",),
        digest: str | None = None,
        deadline_ms: int | None = None,
        cache: CacheUse = "prefer",
        strict: bool = True,
    ) -> Prediction:
        """Asks for a batch.

        Args:
            images_BCHW: uint8, exactly in the card's input shape; not yet normalised.
            output: what is made of the logits.
            k: how many classes of a `topk`.
            temperature: of the softmax; not for raw logits.
            fields: `logits` and features of the card.
            digest: refuse to answer if the teacher is not this one.
            deadline_ms: how long the answer is of use.
            cache: what the service may do: `prefer` takes what its cache and its journal have, with the error of the
                cache's encoding; `bypass` gives the teacher's own values.
            strict: whether one image without an answer leaves the others without one; otherwise `status` tells.

        Raises:
            TeacherError: the images are not uint8 [B, C, H, W].
            ServiceError: the service refused or could not answer; field, rule and hint are its own.
        """
        wish = Wish(output, k, temperature, fields, digest, deadline_ms, cache=cache, strict=strict)
        return self._predict(ask_images(images_BCHW, wish))

    def predict_named(
        self,
        keys: Sequence[str],
        views: int | Sequence[int] = 0,
        *,
        digests: Sequence[int] | None = None,
        output: Output = "logits",
        k: int | None = None,
        temperature: float | None = None,
        fields: Sequence[str] = ("logits",),
        digest: str | None = None,
        cache: CacheUse = "prefer",
        strict: bool = True,
    ) -> Prediction:
        """Asks for samples of the service's data set, and sends no image.

        Args:
            keys: as the data set names them.
            views: one number for all, or one for each key.
            digests: 64-bit pixel digests that the views must have, as a cache keeps them.
            output: for this and all below see `predict`.
            k: as there.
            temperature: as there.
            fields: as there.
            digest: as there.
            cache: as there; `only` computes nothing.
            strict: as there.

        Raises:
            TeacherError: there is no key, or not one view or digest for each.
            ServiceError: the service refused or could not answer; field, rule and hint are its own.
        """
        wish = Wish(output, k, temperature, fields, digest, cache=cache, strict=strict)
        return self._predict(ask_named(keys, views, wish, digests=digests))

    def lookup(self, keys: Sequence[str], views: int | Sequence[int] = 0) -> tuple[str, ...]:
        """What the service has: for each key `cached`, `computable`, `unknown` or `broken`; raises as above."""
        asked = ask_named(keys, views, Wish(), path="/lookup")
        return read_lookup(self.url, self._connection.send(asked, self._patience))

    def predict_file(
        self,
        path: str | Path,
        *,
        output: Output = "logits",
        k: int | None = None,
        temperature: float | None = None,
        fields: Sequence[str] = ("logits",),
    ) -> Prediction:
        """Asks for one JPEG, PNG or WebP file, which the service brings to the teacher's size.

        Raises:
            ServiceError: the service refused or could not answer.
            TeacherError: the file cannot be read, or its suffix is none of those.
        """
        return self._predict(ask_file(path, Wish(output, k, temperature, fields)))

    def _predict(self, asked: Asked) -> Prediction:
        return read_prediction(self.url, self._connection.send(asked, self._patience))


def open_http_teacher(spec: TeacherSpec, normalize: NormalizeSpec | None = None) -> HttpTeacher:
    """The entry point of http:// and https:// teachers; see `HttpTeacher`."""
    # Here, because a client alone needs no journal.
    from services.http_teacher import HttpTeacher

    return HttpTeacher(spec, normalize)
