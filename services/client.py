"""The other side of the wire, for people and programs that may have a teacher's answers but not its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pydantic import ValidationError
from torch import Tensor

from services import wire
from services.schemas import Output, TeacherCard
from services.transport import Connection
from teacher_cache.errors import ServiceError, TeacherError
from teacher_cache.spec import NormalizeSpec, TeacherSpec

if TYPE_CHECKING:
    from services.http_teacher import HttpTeacher

_SUFFIXES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


@dataclass(frozen=True)
class Prediction:
    """An answer. Legend: B images, C classes, K kept classes."""

    values: Tensor | None
    """float32 [B, C], or [B, K] log-probabilities of a `topk`; None where only features were asked for."""
    indices: Tensor | None
    """int32 [B, K] class numbers of a `topk`."""
    tail_logmass: Tensor | None
    """float32 [B], log of the probability that a `topk` leaves out."""
    features: dict[str, Tensor]
    """float32 [B, ...] by field."""
    metadata: dict[str, str]
    """The teacher's digest, the output, the temperature, and whether the image was resized."""


class TeacherClient:
    """One teacher of a service. Keeps its connection; safe to use from several threads."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout: float = 120.0, attempts: int = 8) -> None:
        """Asks nothing yet.

        Args:
            url: `http://host:port/<teacher>`.
            api_key: bearer key; the variable TEACHER_API_KEY where None.
            timeout: seconds that one request may take.
            attempts: tries while the service answers 429 or 503; it is waited for as long as it asks.

        Raises:
            TeacherError: the URL names no teacher.
        """
        self.url = url
        self._connection = Connection(url, api_key, timeout, attempts)

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def card(self) -> TeacherCard:
        """What the teacher takes and offers.

        Raises:
            ServiceError: the service refused, cannot be reached, or is no teacher service.
        """
        data = self._connection.send("GET", "")
        try:
            return TeacherCard.model_validate_json(data)
        except ValidationError as error:
            hint = "Check the URL: is it a teacher-serve?"
            raise ServiceError(self.url, "must answer a teacher's card", "another body", hint) from error

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

        Raises:
            TeacherError: the images are not uint8 [B, C, H, W].
            ServiceError: the service refused or could not answer; field, rule and hint are its own.
        """
        asked = {"output": output, "k": k, "temperature": temperature, "fields": ",".join(fields)}
        headers = {"Content-Type": wire.MEDIA_TYPE}
        if digest is not None:
            headers["If-Match"] = f'"{digest}"'
        if deadline_ms is not None:
            headers["X-Deadline-Ms"] = str(deadline_ms)
        try:
            body = wire.pack_images(images_BCHW)
        except wire.WireError as error:
            hint = "Send views as the cache renders them, before any normalisation."
            raise TeacherError(error.field, error.rule, error.value, hint) from error
        return self._predict(body, headers, asked)

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
        media_type = _SUFFIXES.get(Path(path).suffix.lower())
        if media_type is None:
            hint = "Convert it, or send its pixels with predict()."
            raise TeacherError("path", f"must end in {', '.join(_SUFFIXES)}", path, hint)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TeacherError("path", "must be a readable file", path, f"Check it: {error}.") from error
        asked = {"output": output, "k": k, "temperature": temperature, "fields": ",".join(fields)}
        return self._predict(data, {"Content-Type": media_type}, asked)

    def _predict(self, body: bytes, headers: dict[str, str], asked: Mapping[str, object]) -> Prediction:
        options = {name: value for name, value in asked.items() if value is not None}
        data = self._connection.send("POST", "/predict", body, {"Accept": wire.MEDIA_TYPE, **headers}, options)
        try:
            tensors = wire.unpack_tensors(data)
        except wire.WireError as error:
            hint = "Something between here and the service changes bodies."
            raise ServiceError(self.url, f"{error.field} {error.rule}", error.value, hint) from error
        values, indices, tail = (tensors.pop(name, None) for name in ("values", "indices", "tail_logmass"))
        return Prediction(values, indices, tail, tensors, wire.unpack_metadata(data))


def open_http_teacher(spec: TeacherSpec, normalize: NormalizeSpec | None = None) -> HttpTeacher:
    """The entry point of http:// and https:// teachers; see `HttpTeacher`."""
    # Here, because it is built on this module's client.
    from services.http_teacher import HttpTeacher

    return HttpTeacher(spec, normalize)
