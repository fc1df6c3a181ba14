"""Native operations: torchvision's names, parameters, defaults and pixels; our own drawing of parameters.

Each operation is a frozen dataclass that refuses bad values, and is used in two steps. `draw` turns random
words into resolved parameters (int32, stored in the cache) for many samples at once; `apply` turns one uint8
image [C, H, W] and its parameters into pixels. Nothing here touches a global random generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as pixels

from teacher_cache.views.philox import below, chance, unit

Words = NDArray[np.uint32]
Params = NDArray[np.int32]
Sizes = NDArray[np.int64]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class Operation(Protocol):
    """One step of a recipe. Pure, picklable, safe to share between threads.

    Attributes:
        blocks: Philox blocks (four words each) that `draw` consumes for one sample.
        params: names of the resolved integers, in the order in which they are stored.
    """

    blocks: ClassVar[int]
    params: ClassVar[tuple[str, ...]]

    def draw(self, words_BW: Words, sizes_B2: Sizes) -> Params:
        """Random words [B, 4·blocks] and input sizes (height, width) [B, 2] to parameters int32 [B, P]."""

    def output_sizes(self, sizes_B2: Sizes) -> Sizes:
        """The sizes (height, width) [B, 2] that `apply` will return."""

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        """One uint8 image and its resolved parameters to pixels."""


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} {rule}, found {value!r}")


def _pair(name: str, size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    whole = len(pair) == 2 and all(isinstance(edge, int) and edge > 0 for edge in pair)
    _require(whole, name, "must be a positive integer or (height, width)", size)
    return pair[0], pair[1]


def _nothing(sizes_B2: Sizes) -> Params:
    return np.empty((len(sizes_B2), 0), np.int32)


@dataclass(frozen=True)
class Resize:
    """torchvision's `Resize`: an integer size is the shorter edge, a pair is (height, width)."""

    size: int | tuple[int, int]
    interpolation: str = "bilinear"
    antialias: bool = True

    blocks: ClassVar[int] = 0
    params: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        _pair("size", self.size)
        _require(
            self.interpolation in _INTERPOLATIONS,
            "interpolation",
            f"is one of {_INTERPOLATIONS}",
            self.interpolation,
        )

    def draw(self, words_BW: Words, sizes_B2: Sizes) -> Params:
        return _nothing(sizes_B2)

    def output_sizes(self, sizes_B2: Sizes) -> Sizes:
        if not isinstance(self.size, int):
            return np.broadcast_to(np.array(self.size, np.int64), sizes_B2.shape)
        short = sizes_B2.min(axis=1, keepdims=True)
        return np.where(sizes_B2 == short, self.size, self.size * sizes_B2 // short)

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        size = [self.size] if isinstance(self.size, int) else list(self.size)
        mode = InterpolationMode(self.interpolation)
        resized: Tensor = pixels.resize(image_CHW, size, interpolation=mode, antialias=self.antialias)
        return resized


@dataclass(frozen=True)
class CenterCrop:
    """torchvision's `CenterCrop`; a smaller image is padded with zeros."""

    size: int | tuple[int, int]

    blocks: ClassVar[int] = 0
    params: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        _pair("size", self.size)

    def draw(self, words_BW: Words, sizes_B2: Sizes) -> Params:
        return _nothing(sizes_B2)

    def output_sizes(self, sizes_B2: Sizes) -> Sizes:
        return np.broadcast_to(np.array(_pair("size", self.size), np.int64), sizes_B2.shape)

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        cropped: Tensor = pixels.center_crop(image_CHW, list(_pair("size", self.size)))
        return cropped


@dataclass(frozen=True)
class PadCrop:
    """torchvision's `RandomCrop(size, padding=…)`: pad every side, then cut a window at a random place."""

    size: int | tuple[int, int]
    padding: int = 4
    fill: int = 0
    padding_mode: str = "constant"

    blocks: ClassVar[int] = 1
    params: ClassVar[tuple[str, ...]] = ("top", "left")

    def __post_init__(self) -> None:
        _pair("size", self.size)
        whole = isinstance(self.padding, int) and self.padding >= 0
        _require(whole, "padding", "must be a whole number, not negative", self.padding)
        _require(0 <= self.fill <= 255, "fill", "must be in 0..255", self.fill)
        modes = ("constant", "edge", "reflect", "symmetric")
        _require(self.padding_mode in modes, "padding_mode", f"is one of {modes}", self.padding_mode)

    def draw(self, words_BW: Words, sizes_B2: Sizes) -> Params:
        room = sizes_B2 + 2 * self.padding - np.array(_pair("size", self.size))
        smallest = sizes_B2[room.min(axis=1).argmin()] if len(room) else sizes_B2
        _require(
            bool((room >= 0).all()),
            "size",
            "must fit into the padded image",
            tuple(np.ravel(smallest).tolist()),
        )
        return below(words_BW[:, :2], room + 1).astype(np.int32)

    def output_sizes(self, sizes_B2: Sizes) -> Sizes:
        return np.broadcast_to(np.array(_pair("size", self.size), np.int64), sizes_B2.shape)

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        height, width = _pair("size", self.size)
        top, left = params
        padded: Tensor = pixels.pad(image_CHW, [self.padding], fill=self.fill, padding_mode=self.padding_mode)
        return padded[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class HorizontalFlip:
    """torchvision's `RandomHorizontalFlip`."""

    p: float = 0.5

    blocks: ClassVar[int] = 1
    params: ClassVar[tuple[str, ...]] = ("flip",)

    def __post_init__(self) -> None:
        _require(0 <= self.p <= 1, "p", "must be in 0..1", self.p)

    def draw(self, words_BW: Words, sizes_B2: Sizes) -> Params:
        return chance(words_BW[:, :1], self.p).astype(np.int32)

    def output_sizes(self, sizes_B2: Sizes) -> Sizes:
        return sizes_B2

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        return image_CHW.flip(-1) if params[0] else image_CHW


@dataclass(frozen=True)
class RandomResizedCrop:
    """torchvision's `RandomResizedCrop`: ten tries at an area and an aspect, then a central fallback."""

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    antialias: bool = True

    blocks: ClassVar[int] = 10
    params: ClassVar[tuple[str, ...]] = ("top", "left", "height", "width")

    def __post_init__(self) -> None:
        _pair("size", self.size)
        _require(
            len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1],
            "scale",
            "must be (low, high) with 0 < low <= high",
            self.scale,
        )
        _require(
            len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1],
            "ratio",
            "must be (low, high) with 0 < low <= high",
            self.ratio,
        )
        _require(
            self.interpolation in _INTERPOLATIONS,
            "interpolation",
            f"is one of {_INTERPOLATIONS}",
            self.interpolation,
        )

    def draw(self, words_BW: Words, sizes_B2: Sizes) -> Params:
        words = words_BW.reshape(len(words_BW), 10, 4)
        height, width = sizes_B2[:, :1], sizes_B2[:, 1:]
        area = height * width * (self.scale[0] + unit(words[:, :, 0]) * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = np.exp(low + unit(words[:, :, 1]) * (high - low))
        crop_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        crop_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits: NDArray[np.bool_] = (crop_w > 0) & (crop_w <= width) & (crop_h > 0) & (crop_h <= height)
        found = fits.any(axis=1, keepdims=True)
        pick = (np.arange(len(words)), fits.argmax(axis=1))
        crop = np.stack([crop_h[pick], crop_w[pick]], axis=1)
        room = np.where(found, sizes_B2 - crop, 0)
        corner = below(words[:, :, 2:][pick], room + 1)
        drawn = np.concatenate([corner, crop], axis=1)
        return np.where(found, drawn, self._central(sizes_B2)).astype(np.int32)

    def _central(self, sizes_B2: Sizes) -> NDArray[np.int64]:
        height, width = sizes_B2[:, 0], sizes_B2[:, 1]
        aspect = width / height
        crop_w = np.where(aspect > self.ratio[1], np.rint(height * self.ratio[1]), width).astype(np.int64)
        crop_h = np.where(aspect < self.ratio[0], np.rint(width / self.ratio[0]), height).astype(np.int64)
        return np.stack([(height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w], axis=1)

    def output_sizes(self, sizes_B2: Sizes) -> Sizes:
        return np.broadcast_to(np.array(_pair("size", self.size), np.int64), sizes_B2.shape)

    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        top, left, height, width = params
        mode = InterpolationMode(self.interpolation)
        size = list(_pair("size", self.size))
        cropped: Tensor = pixels.resized_crop(
            image_CHW, top, left, height, width, size, interpolation=mode, antialias=self.antialias
        )
        return cropped


OPERATIONS: dict[str, Callable[..., Operation]] = {
    "resize": Resize,
    "center_crop": CenterCrop,
    "pad_crop": PadCrop,
    "horizontal_flip": HorizontalFlip,
    "random_resized_crop": RandomResizedCrop,
}
"""The names that a recipe may use, beside `normalize`, which is not an operation on pixels."""
