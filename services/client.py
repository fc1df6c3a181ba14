"""The other side of the wire, for people and programs that may have a teacher's answers but not its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

from torch import Tensor

from services.picture_files import ask_file, ask_files
from services.prediction import (
    CARD,
    Prediction,
    ask_images,
    ask_named,
    read_card,
    read_lookup,
    read_prediction,
)
from services.retries import Patience
from services.schemas import TeacherCard
from services.transport import Address, Asked, Connection
from services.wish import Wish, Wishes
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
        classes_BK: Tensor | None = None,
        **wishes: Unpack[Wishes],
    ) -> Prediction:
        """Asks for a batch.

        Args:
            images_BCHW: uint8, exactly in the card's input shape; not yet normalised.
            classes_BK: of a `gather`: class numbers, as many for each image.
            wishes: `output`, `k`, `temperature`, `fields`, `dtype`, `lse`, `digest`, `deadline_ms`, `request_id`,
                `cache` and `strict`, as `Wish` describes them.

        Raises:
            TeacherError: the images are not uint8 [B, C, H, W].
            ServiceError: the service refused or could not answer; field, rule and hint are its own.
        """
        return self._predict(ask_images(images_BCHW, Wish(**wishes), classes_BK))

    def predict_named(
        self,
        keys: Sequence[str],
        views: int | Sequence[int] = 0,
        *,
        digests: Sequence[int] | None = None,
        classes: Sequence[Sequence[int]] | None = None,
        **wishes: Unpack[Wishes],
    ) -> Prediction:
        """Asks for samples of the service's data set, and sends no image.

        Args:
            keys: as the data set names them.
            views: one number for all, or one for each key.
            digests: 64-bit pixel digests that the views must have, as a cache keeps them.
            classes: of a `gather`: class numbers, as many for each key.
            wishes: as in `predict`.

        Raises:
            TeacherError: there is no key, or not one view or digest for each.
            ServiceError: the service refused or could not answer; field, rule and hint are its own.
        """
        asked = ask_named(keys, views, Wish(**wishes), digests=digests, classes=classes)
        return self._predict(asked)

    def lookup(self, keys: Sequence[str], views: int | Sequence[int] = 0) -> tuple[str, ...]:
        """What the service has: for each key `cached`, `computable`, `unknown` or `broken`; raises as above."""
        asked = ask_named(keys, views, Wish(), path="/lookup")
        return read_lookup(self.url, self._connection.send(asked, self._patience))

    def predict_file(
        self,
        path: str | Path,
        **wishes: Unpack[Wishes],
    ) -> Prediction:
        """Asks for one JPEG, PNG or WebP file, which the service brings to the teacher's size; wishes as in `predict`.

        Raises:
            ServiceError: the service refused or could not answer.
            TeacherError: the file cannot be read, or its suffix is none of those.
        """
        return self._predict(ask_file(path, Wish(**wishes)))

    def predict_files(
        self,
        paths: Sequence[str | Path],
        **wishes: Unpack[Wishes],
    ) -> Prediction:
        """Asks for several such files in one request; `resized` and `status` tell of each. Wishes as in `predict`.

        Raises:
            ServiceError: the service refused or could not answer; beyond the card's limits of images, bytes and
                pixels share the files out (`picture_files.grouped`).
            TeacherError: there is no file, or one cannot be read, or its suffix is none of those.
        """
        return self._predict(ask_files(paths, Wish(**wishes)))

    def _predict(self, asked: Asked) -> Prediction:
        return read_prediction(self.url, self._connection.send(asked, self._patience))


def open_http_teacher(spec: TeacherSpec, normalize: NormalizeSpec | None = None) -> HttpTeacher:
    """The entry point of http:// and https:// teachers; see `HttpTeacher`."""
    # Here, because a client alone needs no journal.
    from services.http_teacher import HttpTeacher

    return HttpTeacher(spec, normalize)
