"""Logits of sequences, [T, C] for each row: every position is encoded as a row of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings.base import Columns, Encoding, Part, tensors
from teacher_cache.encodings.sampled import SampledLogits
from teacher_cache.encodings.target import Target
from teacher_cache.errors import NonFiniteError

LENGTHS = "lengths"
"""The part that says how many classes each position holds, where positions differ."""


@dataclass(frozen=True)
class Sequenced:
    """An encoding of vectors, for T of them in each row; targets are [B, T, ...]."""

    inner: Encoding
    """Of one position."""
    length: int
    """T."""

    @property
    def name(self) -> str:
        """The encoding's own."""
        return self.inner.name

    @property
    def blocks(self) -> int:
        """Philox blocks for a row, where the encoding draws; 0 where it does not."""
        return self.inner.blocks * self.length if isinstance(self.inner, SampledLogits) else 0

    @property
    def _ragged(self) -> bool:
        return any(part.ragged for part in self.inner.parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those of the encoding, T times; of different lengths, the positions of a row lie one after the other."""
        found = []
        for part in self.inner.parts:
            if part.name == "count":
                found.append(part)
            elif part.ragged:
                found.append(replace(part, shape=(self.length * part.shape[0],)))
            else:
                found.append(replace(part, shape=(self.length, *part.shape)))
        return (*found, Part(LENGTHS, "uint32", (self.length,))) if self._ragged else tuple(found)

    def encode(self, values: Tensor) -> dict[str, NDArray[Any]]:
        """float32 [B, T, C] to the parts; a position that cannot be kept is named by its row."""
        with self._naming_rows():
            return self._rows(self.inner.encode(values.flatten(0, 1)))

    def encode_drawn(self, values: Tensor, words_BW: NDArray[np.uint32]) -> dict[str, NDArray[Any]]:
        """float32 [B, T, C] and random words [B, 4 · blocks] to the parts."""
        assert isinstance(self.inner, SampledLogits), "only a sample draws"
        with self._naming_rows():
            words = words_BW.reshape(-1, 4 * self.inner.blocks)
            return self._rows(self.inner.encode_drawn(values.flatten(0, 1), words))

    @contextmanager
    def _naming_rows(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            row, position = divmod(int(error.field.removeprefix("row ")), self.length)
            rule = f"{error.rule} (position {position})"
            raise NonFiniteError(f"row {row}", rule, error.value, error.hint) from error

    def _rows(self, columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        rows = {name: column.reshape(-1, self.length, *column.shape[1:]) for name, column in columns.items()}
        if not self._ragged:
            return rows
        lengths_BT = rows.pop("count")
        cap = next(part.shape[0] for part in self.inner.parts if part.ragged)
        empty = np.arange(cap) >= lengths_BT[..., None]
        forward = np.argsort(empty.reshape(len(empty), self.length * cap), axis=1, kind="stable")
        for part in self.inner.parts:
            if part.ragged:
                flat = rows[part.name].reshape(len(empty), self.length * cap)
                rows[part.name] = np.take_along_axis(flat, forward, axis=1)
        return {**rows, "count": lengths_BT.sum(axis=1, dtype=np.uint32), LENGTHS: lengths_BT}

    def decode(self, columns: Columns) -> Target:
        """The stored arrays of some rows to a target [B, T, ...]."""
        if not self._ragged:
            return self.inner.decode(columns)
        stored = tensors(columns)
        lengths_BT = stored[LENGTHS].long()
        first_BT = lengths_BT.cumsum(1) - lengths_BT
        cap = next(part.shape[0] for part in self.inner.parts if part.ragged)
        places_K = torch.arange(cap, device=lengths_BT.device)
        spread: dict[str, Any] = {**stored, "count": stored[LENGTHS]}
        for part in self.inner.parts:
            if part.ragged:
                places_BN = (first_BT[..., None] + places_K).clamp(max=self.length * cap - 1).flatten(1)
                values = stored[part.name]
                # Unsigned types wider than a byte cannot be gathered everywhere.
                wide = values.long() if not values.is_floating_point() else values
                spread[part.name] = wide.gather(1, places_BN).reshape(-1, self.length, cap).to(values.dtype)
        return self.inner.decode(spread)
