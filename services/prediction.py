"""Questions and answers as the clients know them: tensors and files to requests, bodies to `Prediction`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from services import naming, wire
from services.naming import Named
from services.schemas import CacheUse, Lookup, Output, TeacherCard
from services.status import Status
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
    """The teacher's digest, the output, the temperature, whether the image was resized, how the cache keeps fields."""
    status: tuple[Status, ...]
    """What became of each item."""


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
    cache: CacheUse = "prefer"
    """Whether the service's cache and journal may answer."""
    strict: bool = True
    """Refuse everything where one item has no answer."""

    def ask(self, body: bytes, media_type: str, path: str = "/predict") -> Asked:
        """The request that carries a body."""
        options = {
            "output": self.output,
            "k": self.k,
            "temperature": self.temperature,
            "fields": ",".join(self.fields),
            "cache": self.cache,
            "strict": self.strict,
        }
        headers = {
            "Accept": wire.MEDIA_TYPE,
            "Content-Type": media_type,
            "If-Match": None if self.digest is None else f'"{self.digest}"',
            "X-Deadline-Ms": None if self.deadline_ms is None else str(self.deadline_ms),
            "X-Request-Id": self.request_id,
        }
        given = {name: value for name, value in headers.items() if value is not None}
        chosen = {name: value for name, value in options.items() if value is not None}
        return Asked("POST", path, body, given, chosen)


def ask_images(images_BCHW: Tensor, wish: Wish) -> Asked:
    """A batch of views; `TeacherError` where they are not uint8 [B, C, H, W]."""
    try:
        body = wire.pack_images(images_BCHW)
    except wire.WireError as error:
        hint = "Send views as the cache renders them, before any normalisation."
        raise TeacherError(error.field, error.rule, error.value, hint) from error
    return wish.ask(body, wire.MEDIA_TYPE)


def ask_named(
    keys: Sequence[str],
    views: int | Sequence[int],
    wish: Wish,
    *,
    digests: Sequence[int] | None = None,
    whole: bool = False,
    path: str = "/predict",
) -> Asked:
    """Samples by their names; `TeacherError` where they are none."""
    numbers = views if isinstance(views, int) else tuple(views)
    shown = None if digests is None else tuple(f"{int(digest):016x}" for digest in digests)
    try:
        named = Named(keys=tuple(keys), views=numbers, digests=shown, whole=whole)
    except ValidationError as error:
        rule = str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
        raise TeacherError("keys", rule, f"{len(keys)} keys", "See the README on asking by name.") from error
    return wish.ask(named.model_dump_json(exclude_none=True).encode(), naming.MEDIA_TYPE, path)


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
    status = tensors.pop("status", None)
    if status is None or status.ndim != 1 or not all(number in list(Status) for number in status.tolist()):
        hint = "Is it a teacher-serve of this version?"
        raise ServiceError(url, "must tell the status of each item", "none", hint)
    told = tuple(map(Status, status.tolist()))
    return Prediction(values, indices, tail, tensors, wire.unpack_metadata(data), told)


def read_lookup(url: str, data: bytes) -> tuple[str, ...]:
    """What a service says of each key; `ServiceError` where the body says nothing of them."""
    try:
        return Lookup.model_validate_json(data).status
    except ValidationError as error:
        hint = "Check the URL: is it a teacher-serve?"
        raise ServiceError(url, "must answer what it has", "another body", hint) from error


def read_card(url: str, data: bytes) -> TeacherCard:
    """What the teacher takes and offers; `ServiceError` where the body is no card."""
    try:
        return TeacherCard.model_validate_json(data)
    except ValidationError as error:
        hint = "Check the URL: is it a teacher-serve?"
        raise ServiceError(url, "must answer a teacher's card", "another body", hint) from error
