"""What an operation of a recipe is, and the checks that all of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views.philox import Words, unit

Params = NDArray[np.int32]
Sizes = NDArray[np.int64]
Images = Sequence[Tensor] | Tensor
"""Images one by one, sizes may differ, or a batch [B, C, H, W]."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class Operation(ABC):
    """One step of a recipe: a frozen dataclass that refuses bad values; pure, picklable, safe between threads.

    It is used in two steps. `draw` turns random words into resolved parameters (int32, stored in the cache) for
    many samples at once; `apply` turns one uint8 image and its parameters into pixels. Nothing touches a global
    random generator. A number that is no integer is stored as a multiple of 2⁻¹⁶ (`philox.number`).
    """

    channels: ClassVar[tuple[int, ...]] = ()
    """Numbers of channels that it takes; empty when any will do."""

    @property
    def blocks(self) -> int:
        """Most Philox blocks (four words each) that `draw` uses for one sample; 0 when nothing is random."""
        return 0

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the resolved integers, in the order in which they are stored."""
        return ()

    @property
    def rounds(self) -> bool:
        """Whether pixels come from float arithmetic that another processor or release may round otherwise."""
        return False

    @property
    def batched(self) -> bool:
        """Whether `apply_batch` exists, and gives on any device the pixels that `apply` gives."""
        return False

    def draw(self, words: Words, sizes_B2: Sizes) -> Params:
        """Random words of B samples and their images' (height, width) [B, 2] to parameters int32 [B, P]."""
        return np.empty((len(sizes_B2), 0), np.int32)

    def output_sizes(self, sizes_B2: Sizes) -> Sizes:
        """The sizes (height, width) [B, 2] that `apply` will return."""
        return sizes_B2

    @abstractmethod
    def apply(self, image_CHW: Tensor, params: tuple[int, ...]) -> Tensor:
        """One uint8 image and its resolved parameters to pixels; may return the image itself or a view of it."""

    def apply_batch(self, images_BCHW: Tensor, params_BP: Params) -> Tensor:
        """Images of one size, on any device, to pixels; only where `batched`. May overwrite `images_BCHW`."""
        raise NotImplementedError(f"{type(self).__name__} has no batched form")

    def with_size(self, size: tuple[int, int]) -> Operation | None:
        """The same operation with another output size, taking the same parameters; None where there is none."""
        return None

    def rescaled(self, params_BP: Params, before: tuple[int, int], after: tuple[int, int]) -> Params | None:
        """The parameters for images of another size that show the same; None where lengths would be lost."""
        return None


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raises `ValueError` naming a parameter, its rule and the value."""
    if not holds:
        raise ValueError(f"{name} {rule}, found {value!r}")


def require_interpolation(value: str) -> None:
    """Only what tensors can do."""
    require(value in INTERPOLATIONS, "interpolation", f"is one of {INTERPOLATIONS}", value)


def require_flag(name: str, value: object) -> None:
    """Only true or false: "no" is a text, and would count as true."""
    require(isinstance(value, bool), name, "must be true or false", value)


def require_share(name: str, value: object) -> None:
    """A probability."""
    require(is_number(value) and 0 <= float(value) <= 1, name, "must be a number in 0..1", value)  # type: ignore[arg-type]


def is_whole(value: object, low: int, high: float = math.inf) -> bool:
    """Whether it is an integer (and no bool) in low..high."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def require_span(name: str, value: tuple[float, float], low: float = 0.0, high: float | None = None) -> None:
    """A pair (low, high) of numbers in order, above 0 unless told, and not above `high`."""
    numbers = isinstance(value, tuple) and len(value) == 2 and all(is_number(edge) for edge in value)
    inside = numbers and low < value[0] <= value[1] and (high is None or value[1] <= high)
    top = "" if high is None else f" <= {high:g}"
    require(inside, name, f"must be (low, high) with {low:g} < low <= high{top}", value)


def is_number(value: object) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_channels(operation: Operation, image_CHW: Tensor) -> None:
    """Refuses an image that the operation does not take, whatever was drawn."""
    allowed = " or ".join(str(count) for count in operation.channels)
    found, name = image_CHW.shape[0], type(operation).__name__
    require(found in operation.channels, "channels", f"must be {allowed} for {name}", found)


def pair(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """A size as (height, width), checked."""
    both = size if isinstance(size, tuple) else (size, size)
    whole = len(both) == 2 and all(is_whole(edge, 1) for edge in both)
    require(whole, name, "must be a positive integer or (height, width)", size)
    return both[0], both[1]


def area_and_aspect(
    words_B4: NDArray[np.uint32], sizes_B2: Sizes, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A random box as torchvision draws it: an even share of the image's area, a log-even aspect, [B] each."""
    area_B = sizes_B2[:, 0] * sizes_B2[:, 1] * (scale[0] + unit(words_B4[:, 0]) * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    return area_B, np.exp(low + unit(words_B4[:, 1]) * (high - low))


def scaled_edges(values_BP: Params, before: int, after: int) -> NDArray[np.int64]:
    """Positions on an edge of `before` pixels, moved to an edge of `after` pixels, rounded (halves up)."""
    return (values_BP.astype(np.int64) * 2 * after + before) // (2 * before)
