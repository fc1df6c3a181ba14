"""Hypothesis strategies: logits of every temper, grids, parts."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.encodings import Part
from teacher_cache.storage import Grid

PHILOX_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Counter, key and words of `kat_vectors` in the Random123 distribution, philox4x32 with 10 rounds."""

SEEDS = st.integers(0, 2**31 - 1)


def _rows(kind: str, batch: int, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, classes, generator=generator)
    if kind == "ordinary":
        return noise * 3
    if kind == "confident":
        return noise + 40 * torch.nn.functional.one_hot(torch.arange(batch) % classes, classes)
    if kind == "tied":
        return (noise * 2).round()
    if kind == "constant":
        return torch.full((batch, classes), float(noise[0, 0]))
    if kind == "tiny":
        return noise * 1e-6
    assert kind == "large"
    return noise.sign() * 30_000 + noise


@st.composite
def logits(draw: st.DrawFn, max_classes: int = 300) -> Tensor:
    """float32 [B, C]: ordinary, confident, tied, constant, tiny and very large rows, one class to many."""
    classes = draw(st.one_of(st.integers(1, 12), st.integers(1, max_classes), st.just(257)))
    kind = draw(st.sampled_from(["ordinary", "confident", "tied", "constant", "tiny", "large"]))
    return _rows(kind, draw(st.integers(1, 6)), classes, draw(SEEDS))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Shards of 1 to 4 chunks of 1 to 5 rows; the last may be ragged."""
    chunk = draw(st.integers(1, 5))
    shard = chunk * draw(st.integers(1, 4))
    return Grid(draw(st.integers(1, 3 * shard)), shard, chunk)


@st.composite
def parts(draw: st.DrawFn) -> Part:
    """A part of any stored type with rows of 0 to 3 dimensions."""
    dtype = draw(st.sampled_from(["float16", "float32", "uint8", "uint16", "uint32", "uint64", "int32"]))
    return Part("values", dtype, tuple(draw(st.lists(st.integers(1, 4), max_size=3))))


def values_of(part: Part, rows: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Random bytes read as rows of a part; NaNs and all."""
    raw = np.random.Generator(np.random.Philox(seed)).bytes(rows * part.row_bytes)
    return np.frombuffer(raw, part.dtype).reshape(rows, *part.shape)


def _hard_rows(kind: str, batch: int, classes: int, seed: int) -> Tensor:
    noise = torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))
    if kind == "limit":
        # Around 65,504, the largest of half precision: some rows fit and some do not.
        return noise.sign() * 65_504 + noise * 20
    if kind == "sure":
        # All mass in one class: that of the others is 0 in every type.
        return noise + 2000 * torch.nn.functional.one_hot(torch.arange(batch) % classes, classes)
    if kind == "masked":
        return torch.where(noise < 0, -1e9, noise).scatter(1, torch.zeros((batch, 1), dtype=torch.long), 1.0)
    assert kind == "huge"
    return noise.sign() * 1e37


@st.composite
def hard_logits(draw: st.DrawFn) -> Tensor:
    """float32 [B, C]: those of `logits`, and rows that are one-hot, masked, near half precision's limit and beyond."""
    if draw(st.booleans()):
        return draw(logits())
    kind = draw(st.sampled_from(["limit", "sure", "masked", "huge"]))
    return _hard_rows(kind, draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 12, 40, 257])), draw(SEEDS))
