"""What a body with images brings: tensors, one picture, or many encoded files, brought to the teacher's input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services import images, wire
from services.beside import SMALL
from services.pixels import PixelBudget
from services.problems import Problem
from services.settings import Settings
from services.teachers import ServedTeacher
from services.tensor_body import Buffer

_HINT = "See `input` in the teacher's card."
_FORMS = ({"images"}, {"blob", "offsets"})
_SHORT = 2**10
"""Bytes of a header with few tensors."""


@dataclass(frozen=True, eq=False)
class Upload:
    """Images, and what was said of them."""

    views_BCHW: Tensor
    """uint8, one for each item; black where a file could not be decoded."""
    resized: bool | tuple[bool, ...] = False
    """Whether the picture was brought to the teacher's size; of files, each."""
    broken: frozenset[int] = frozenset()
    """The items whose files could not be decoded."""
    classes_NK: Tensor | None = None
    """Class numbers, not yet checked."""

    @property
    def decoded_BCHW(self) -> Tensor:
        """Those that were sent, without what stands for broken files."""
        if not self.broken:
            return self.views_BCHW
        return self.views_BCHW[[place for place in range(len(self.views_BCHW)) if place not in self.broken]]


def size_of(data: Buffer, media_type: str) -> float:
    """Bytes that `uploaded` goes over; inf for files, which may be anything before they are decoded, and for a crowd
    of tensors, which take the longer the more there are."""
    if media_type != wire.MEDIA_TYPE or len(data) > SMALL or wire.header_bytes(data) > _SHORT:
        return math.inf
    return math.inf if "blob" in wire.names_in(data) else len(data)


def uploaded(data: Buffer, media_type: str, served: ServedTeacher, settings: Settings) -> Upload:
    """A body to images.

    Args:
        data: the body.
        media_type: safetensors, or a key of `images.FORMATS`.
        served: whose input they become.
        settings: the limits.

    Raises:
        Problem: 413 for too many images or pixels, 415 where the teacher takes no pictures, 422 for any other body.
    """
    if media_type != wire.MEDIA_TYPE:
        budget = PixelBudget(settings.max_pixels)
        return Upload(*images.decode(data, media_type, served.view_shape, budget))
    try:
        tensors = wire.unpack_tensors(data)
        classes_NK = tensors.pop("classes", None)
        if tensors.keys() not in _FORMS:
            rule = "must hold `images`, or `blob` and `offsets`; beside them `classes`, where they are gathered"
            raise wire.WireError("body", rule, sorted(name[:20] for name in tensors)[:4])
        if "images" in tensors:
            require_few(len(tensors["images"]) if tensors["images"].ndim else 0, settings)
            return Upload(wire.as_views(tensors["images"], served.view_shape), classes_NK=classes_NK)
        files = _files(tensors["blob"], tensors["offsets"], settings)
    except wire.WireError as error:
        raise Problem(422, error.field, error.rule, error.value, _HINT) from None
    return decoded(files, served, settings, classes_NK)


def decoded(
    files: Sequence[bytes], served: ServedTeacher, settings: Settings, classes_NK: Tensor | None = None
) -> Upload:
    """JPEG, PNG and WebP files to images, one after the other; one that cannot be decoded spoils no other.

    Raises:
        Problem: 413 for too many pixels in all, 415 where the teacher takes no pictures.
    """
    budget = PixelBudget(settings.max_pixels)
    views_BCHW = torch.zeros((len(files), *served.view_shape), dtype=torch.uint8)
    resized, broken = [False] * len(files), set()
    for item, data in enumerate(files):
        media_type = images.media_type_of_file(data)
        try:
            if media_type is None:
                raise Problem(422, "image", "must be JPEG, PNG or WebP", "another", "Check the file.")
            views_BCHW[item : item + 1], resized[item] = images.decode(data, media_type, served.view_shape, budget)
        except Problem as problem:
            if problem.status != 422:
                raise
            broken.add(item)
    return Upload(views_BCHW, tuple(resized), frozenset(broken), classes_NK)


def require_few(found: int, settings: Settings) -> None:
    """Raises a 413 `Problem` for more images than one request may carry."""
    if found > settings.max_images:
        rule, hint = f"must hold at most {settings.max_images}", "Send several requests."
        raise Problem(413, "images", rule, found, hint)


def _files(blob: Tensor, offsets: Tensor, settings: Settings) -> list[bytes]:
    """Cuts a blob; `WireError` where the offsets do not divide all of it, in order."""
    if blob.dtype != torch.uint8 or blob.ndim != 1:
        raise wire.WireError("blob", "must be U8 [bytes]", list(blob.shape)[:4])
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or len(offsets) < 2:
        raise wire.WireError("offsets", "must be I64 [N + 1], of at least one file", list(offsets.shape)[:4])
    require_few(len(offsets) - 1, settings)
    # Compared and not subtracted: a difference could overflow.
    ordered = bool((offsets[:-1] <= offsets[1:]).all())
    if not ordered or int(offsets[0]) != 0 or int(offsets[-1]) != len(blob):
        raise wire.WireError("offsets", f"must run from 0 up to {len(blob)}, the bytes of the blob", "others")
    data, stops = blob.numpy(), offsets.tolist()
    return [data[start:stop].tobytes() for start, stop in itertools.pairwise(stops)]
