"""What every encoding offers: named parts of fixed type and shape, encode, decode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.target import Target
from teacher_cache.errors import NonFiniteError

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """One stored array of an encoding."""

    name: str
    """`values`, `indices` and so on: the last part of the array's path."""
    dtype: str
    """NumPy's name of a little-endian type: `float16`, `uint8`."""
    shape: tuple[int, ...]
    """Of one row."""
    ragged: bool = False
    """Whether rows fill only their first `count` places: the shape is then (cap,), places beyond hold `fill`, and
    the encoding has one part `count` (uint32, of no dimension) for all of its ragged parts. Only what is filled is
    stored."""

    def __post_init__(self) -> None:
        if self.ragged and (len(self.shape) != 1 or self.shape[0] < 1):
            raise ValueError(f"the shape of a ragged part must be (cap,) with cap of at least 1, found {self.shape}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of a ragged part the most that it can take."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    @property
    def fill(self) -> float | int:
        """What rows hold that nobody wrote: NaN, or the largest integer of the type."""
        kind = np.dtype(self.dtype)
        return math.nan if kind.kind == "f" else int(np.iinfo(kind).max)


class Encoding(Protocol):
    """Step 4: what is kept of a field. Pure and picklable; the same values give the same bytes.

    `encode` refuses NaN and inf with `NonFiniteError` naming the row; `decode` is vectorised and keeps the
    stored type.
    """

    @property
    def name(self) -> str: ...

    @property
    def parts(self) -> tuple[Part, ...]: ...

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, ...] to one array [B, ...] for each part."""

    def decode(self, columns: Columns) -> Target:
        """The stored arrays of some rows to a target."""


def tensors(columns: Columns) -> dict[str, Tensor]:
    """Columns as tensors that share their memory; tensors, on any device, as they are."""
    return {name: torch.as_tensor(column) for name, column in columns.items()}


def row_bytes(encoding: Encoding) -> int:
    """Bytes that one row takes, all parts together."""
    return sum(part.row_bytes for part in encoding.parts)


def narrowest(classes: int) -> str:
    """The smallest unsigned type that holds every class number."""
    return next(name for name in ("uint8", "uint16", "uint32") if classes - 1 <= np.iinfo(name).max)


def stored_bytes(encoding: Encoding, columns: Columns) -> int:
    """Bytes that a row takes on average, rounded up: parts of different lengths count as far as they are filled."""
    fixed = sum(part.row_bytes for part in encoding.parts if not part.ragged)
    ragged = [part for part in encoding.parts if part.ragged]
    if not ragged:
        return fixed
    each = sum(np.dtype(part.dtype).itemsize for part in ragged)
    return fixed + math.ceil(each * float(columns["count"].mean()))


def require_finite(values: Tensor, encoding: str) -> None:
    """Refuses rows with NaN or inf, naming the first.

    Raises:
        NonFiniteError: its `field` is `row <number>`; the caller adds the sample's key.
    """
    # A NaN or an inf makes the sum one too: one pass proves the many batches that have none.
    if bool(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).isfinite()):
        return
    finite_B = values.isfinite().flatten(1).all(dim=1)
    if not bool(finite_B.all()):
        row = int((~finite_B).nonzero()[0, 0])
        bad = values[row][~values[row].isfinite()][0].item()
        hint = "Check the teacher's precision and weights, or use dense_f32."
        raise NonFiniteError(f"row {row}", f"{encoding} keeps finite values only", bad, hint)
