"""Questions and answers as the clients know them: tensors and files to requests, bodies to `Prediction`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from services import wire
from services.schemas import Output, TeacherCard
from services.transport import Asked
from teacher_cache.errors import ServiceError, TeacherError

_SUFFIXES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
CARD = Asked("GET", "")


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


@dataclass(frozen=True)
class Wish:
    """What is to be made of the answer, and on which conditions."""

    output: Output = "logits"
    """What is made of the logits."""
    k: int | None = None
    """How many classes of a `topk`."""
    temperature: float | None = None
    """Of the softmax; not for raw logits."""
    fields: Sequence[str] = ("logits",)
    """`logits` and features of the card."""
    digest: str | None = None
    """Refuse to answer if the teacher is not this one."""
    deadline_ms: int | None = None
    """How long the answer is of use."""
    request_id: str | None = None
    """Names the question in the service's log, however often it is tried."""

    def ask(self, body: bytes, media_type: str) -> Asked:
        """The request that carries a body."""
        options = {"output": self.output, "k": self.k, "temperature": self.temperature, "fields": ",".join(self.fields)}
        headers = {
            "Accept": wire.MEDIA_TYPE,
            "Content-Type": media_type,
            "If-Match": None if self.digest is None else f'"{self.digest}"',
            "X-Deadline-Ms": None if self.deadline_ms is None else str(self.deadline_ms),
            "X-Request-Id": self.request_id,
        }
        given = {name: value for name, value in headers.items() if value is not None}
        chosen = {name: value for name, value in options.items() if value is not None}
        return Asked("POST", "/predict", body, given, chosen)


def ask_images(images_BCHW: Tensor, wish: Wish) -> Asked:
    """A batch of views; `TeacherError` where they are not uint8 [B, C, H, W]."""
    try:
        body = wire.pack_images(images_BCHW)
    except wire.WireError as error:
        hint = "Send views as the cache renders them, before any normalisation."
        raise TeacherError(error.field, error.rule, error.value, hint) from error
    return wish.ask(body, wire.MEDIA_TYPE)


def ask_file(path: str | Path, wish: Wish) -> Asked:
    """One picture.

    Raises:
        TeacherError: the file cannot be read, or its suffix is none of JPEG's, PNG's and WebP's.
    """
    media_type = _SUFFIXES.get(Path(path).suffix.lower())
    if media_type is None:
        hint = "Convert it, or send its pixels with predict()."
        raise TeacherError("path", f"must end in {', '.join(_SUFFIXES)}", path, hint)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TeacherError("path", "must be a readable file", path, f"Check it: {error}.") from error
    return wish.ask(data, media_type)


def read_prediction(url: str, data: bytes) -> Prediction:
    """The body of a successful answer; `ServiceError` where it is none."""
    try:
        tensors = wire.unpack_tensors(data)
    except wire.WireError as error:
        hint = "Something between here and the service changes bodies."
        raise ServiceError(url, f"{error.field} {error.rule}", error.value, hint) from error
    values, indices, tail = (tensors.pop(name, None) for name in ("values", "indices", "tail_logmass"))
    return Prediction(values, indices, tail, tensors, wire.unpack_metadata(data))


def read_card(url: str, data: bytes) -> TeacherCard:
    """What the teacher takes and offers; `ServiceError` where the body is no card."""
    try:
        return TeacherCard.model_validate_json(data)
    except ValidationError as error:
        hint = "Check the URL: is it a teacher-serve?"
        raise ServiceError(url, "must answer a teacher's card", "another body", hint) from error
