"""What every source offers, and the one way in which an encoded image becomes pixels."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from teacher_cache.fingerprint import content_digest, fingerprint

Channels = Literal[1, 3] | None


_DEEP = re.compile(r"\b(RGB|RGBA|RGBX|LA|L|CMYK);16")
"""Pillow's raw modes of 16 bits a channel, which it would cut to 8 in silence (`BGR;16` is 16 bits a pixel)."""


class BrokenSample(Exception):  # noqa: N818 - not an error of the product: it becomes a tombstone
    """A sample's bytes cannot be decoded; the reason is kept with its row."""


@dataclass(frozen=True)
class Item:
    """One decoded sample."""

    image_CHW: Tensor
    """uint8 [C, H, W]."""
    content: int
    """64-bit digest of the stored bytes, before decoding."""


class Source(Protocol):
    """Step 1: a data set with a length, items by index, stable keys, labels, class names and a fingerprint.

    Opening costs no pass over the pixels. Obligations: `item` is pure and may be called from several threads;
    keys are unique and do not depend on order; the object is picklable or is opened again from its spec.
    """

    @property
    def keys(self) -> Sequence[str]:
        """A stable name for each sample; may be made when it is asked for."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers, or None where the data set has none."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in the order of the class numbers, or None where they are not known."""

    @property
    def channels(self) -> Channels:
        """What every image is brought to when it is decoded, where the configuration says so."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Stored bytes of each sample: known without reading it."""

    def item(self, index: int) -> Item:
        """Reads and decodes one sample; raises `BrokenSample` where that is impossible."""

    def __len__(self) -> int: ...


class Named(Protocol):
    """As much of a source as its fingerprint is made of."""

    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def sizes(self) -> NDArray[np.int64]: ...
    @property
    def labels(self) -> NDArray[np.int64] | None: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def channels(self) -> Channels: ...


_BLOCK = 65_536


def source_fingerprint(source: Named) -> str:
    """Names a data set by its keys, sizes, labels and class names: what can be known without reading it."""
    return source_fingerprints(source, [len(source.keys)])[0]


def source_fingerprints(source: Named, stops: Sequence[int]) -> list[str]:
    """The fingerprints that the first rows of a data set have by themselves, in one pass.

    Args:
        source: the data set.
        stops: for each fingerprint how many rows, in rising order.
    """
    labels, hashed, found, first = source.labels, hashlib.blake2b(digest_size=16), [], 0
    for stop in stops:
        while first < stop:
            last = min(first + _BLOCK, stop)
            encoded = [key.encode() for key in source.keys[first:last]]
            hashed.update(b"".join(len(key).to_bytes(4, "little") + key for key in encoded))
            first = last
        fields: dict[str, object] = {
            "rows": stop,
            "keys": hashed.copy().hexdigest(),
            "sizes": _digest_of(source.sizes[:stop]),
            "labels": None if labels is None else _digest_of(labels[:stop]),
            "class_names": source.class_names,
        }
        if source.channels is not None:
            fields["channels"] = source.channels
        found.append(fingerprint("source", 2, fields))
    return found


def _digest_of(numbers: NDArray[np.int64]) -> str:
    """`bytes_digest` of all of them, without a copy as large as the data set."""
    hashed = hashlib.blake2b(digest_size=16)
    for first in range(0, len(numbers), _BLOCK):
        hashed.update(numbers[first : first + _BLOCK].astype("<i8").tobytes())
    return hashed.hexdigest()


class Numbered(Sequence[str]):
    """Keys that are made when they are asked for: `<stem>/<number>`."""

    def __init__(self, stem: str, count: int) -> None:
        self._stem, self._numbers = stem, range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        found = self._numbers[place]
        return [f"{self._stem}/{number}" for number in found] if isinstance(found, range) else f"{self._stem}/{found}"


@contextmanager
def decoding() -> Iterator[None]:
    """Turns whatever an image decoder raises into `BrokenSample`: they raise anything over damaged files.

    An `OSError` with a number comes from the system and not from the image, and passes.
    """
    try:
        yield
    except (BrokenSample, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise BrokenSample(f"cannot be decoded: {_plain(error)}") from None
    except Exception as error:
        raise BrokenSample(f"cannot be decoded: {_plain(error)}") from None


def _plain(error: Exception) -> str:
    """What it says, without the address of an object: a reason is stored, and two builds end with the same bytes."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(error))


def pixels_of(image: Image.Image, channels: Channels) -> NDArray[np.uint8]:
    """A decoded picture as uint8 [H, W] or [H, W, 3]; where no number is given greyscale stays, all else is RGB.

    Raises:
        BrokenSample: it is deeper than 8 bits a channel, which Pillow would cut in silence.
    """
    require_bytes(image)
    grey = channels == 1 or (channels is None and image.mode == "L")
    return np.asarray(image.convert("L" if grey else "RGB"))


def require_bytes(image: Image.Image) -> None:
    """Refuses pictures of more than 8 bits a channel."""
    if image.mode.startswith(("I", "F")) or _DEEP.search(str(getattr(image, "tile", ""))):
        raise BrokenSample(f"{image.format} image of mode {image.mode}: more than 8 bits a channel")


def decode_image(data: bytes, channels: Channels = None) -> Item:
    """JPEG, PNG, WebP and the like to uint8 [C, H, W].

    Args:
        data: the stored bytes.
        channels: 1 or 3 to bring every image to so many; None keeps greyscale as it is and makes all else RGB.

    Raises:
        BrokenSample: the bytes are truncated, or no image at all, or deeper than 8 bits a channel.
    """
    with decoding(), Image.open(io.BytesIO(data)) as image:
        array = pixels_of(image, channels)
    return Item(to_chw(array), content_digest(data))


def array_item(array: NDArray[np.uint8]) -> Item:
    """A stored uint8 array [H, W] or [H, W, C] as an item; its content digest covers its shape too."""
    described = repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()
    return Item(to_chw(array), content_digest(described))


def to_chw(array: NDArray[np.uint8]) -> Tensor:
    """uint8 [H, W] or [H, W, C] to a contiguous tensor [C, H, W] of its own memory."""
    channels_last = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(np.array(channels_last.transpose(2, 0, 1), order="C"))
