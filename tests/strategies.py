"""Hypothesis strategies: logits of every temper, grids, parts."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.encodings import Part
from teacher_cache.storage import Grid

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
