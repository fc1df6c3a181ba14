"""What every encoding offers: named parts of fixed type and shape, encode, decode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
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

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
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


def row_bytes(encoding: Encoding) -> int:
    """Bytes that one row takes, all parts together."""
    return sum(part.row_bytes for part in encoding.parts)


def require_finite(values: Tensor, encoding: str) -> None:
    """Refuses rows with NaN or inf, naming the first.

    Raises:
        NonFiniteError: its `field` is `row <number>`; the caller adds the sample's key.
    """
    finite_B = values.isfinite().flatten(1).all(dim=1)
    if not bool(finite_B.all()):
        row = int((~finite_B).nonzero()[0, 0])
        bad = values[row][~values[row].isfinite()][0].item()
        hint = "Check the teacher's precision and weights, or use dense_f32."
        raise NonFiniteError(f"row {row}", f"{encoding} keeps finite values only", bad, hint)
