"""Questions and answers as the clients know them: tensors and files to requests, bodies to `Prediction`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from torch import Tensor

from services import naming, wire
from services.naming import Named
from services.schemas import Lookup, TeacherCard
from services.status import Status
from services.transport import Asked
from services.wish import Wish
from teacher_cache.errors import ServiceError, TeacherError

SUFFIXES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
"""Of files that may be sent as they are."""
CARD = Asked("GET", "")
_PARTS = ("values", "indices", "tail_logmass", "lse", "resized", "status")


@dataclass(frozen=True)
class Prediction:
    """An answer. Legend: B images, C classes, K kept classes. Floating values are float32, or of the wished `dtype`."""

    values: Tensor | None
    """[B, C], or [B, K] log-probabilities of a `topk` or a `gather`; None where only features were asked for."""
    indices: Tensor | None
    """int32 [B, K] class numbers of a `topk` or a `gather`."""
    tail_logmass: Tensor | None
    """[B], log of the probability that a `topk` leaves out."""
    features: dict[str, Tensor]
    """[B, ...] by field."""
    metadata: dict[str, str]
    """The teacher's digest, the output, the temperature, the type, whether an image was resized, how the cache keeps
    fields; as JSON the key's limits that shaped the answer (`policy`) and what decides its bits (`numerics`)."""
    status: tuple[Status, ...]
    """What became of each item."""
    lse: Tensor | None = None
    """[B], log-sum-exp of the raw logits, where it was wished for."""
    resized: tuple[bool, ...] | None = None
    """Of files: whether each was brought to the teacher's size."""


def ask_images(images_BCHW: Tensor, wish: Wish, classes_BK: Tensor | None = None) -> Asked:
    """A batch of views, and the classes of a `gather`; `TeacherError` where they are not uint8 [B, C, H, W]."""
    try:
        body = wire.pack_images(images_BCHW, classes_BK)
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
    classes: Sequence[Sequence[int]] | None = None,
    whole: bool = False,
    path: str = "/predict",
) -> Asked:
    """Samples by their names; `TeacherError` where they are none."""
    numbers = views if isinstance(views, int) else tuple(views)
    shown = None if digests is None else tuple(f"{int(digest):016x}" for digest in digests)
    chosen = None if classes is None else tuple(tuple(map(int, row)) for row in classes)
    try:
        named = Named(keys=tuple(keys), views=numbers, digests=shown, classes=chosen, whole=whole)
    except ValidationError as error:
        rule = str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
        raise TeacherError("keys", rule, f"{len(keys)} keys", "See the README on asking by name.") from error
    return wish.ask(named.model_dump_json(exclude_none=True).encode(), naming.MEDIA_TYPE, path)


def read_prediction(url: str, data: bytes) -> Prediction:
    """The body of a successful answer; `ServiceError` where it is none."""
    try:
        tensors = wire.unpack_tensors(data)
    except wire.WireError as error:
        hint = "Something between here and the service changes bodies."
        raise ServiceError(url, f"{error.field} {error.rule}", error.value, hint) from error
    values, indices, tail, lse, resized, status = (tensors.pop(name, None) for name in _PARTS)
    if status is None or status.ndim != 1 or not all(number in list(Status) for number in status.tolist()):
        hint = "Is it a teacher-serve of this version?"
        raise ServiceError(url, "must tell the status of each item", "none", hint)
    told = tuple(map(Status, status.tolist()))
    each = None if resized is None else tuple(map(bool, resized.tolist()))
    return Prediction(values, indices, tail, tensors, wire.unpack_metadata(data), told, lse, each)


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
