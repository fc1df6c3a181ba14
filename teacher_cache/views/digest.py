"""The pixel digest: 64 bits of a view's uint8 pixels, the same integers from NumPy, torch on CPU and torch on CUDA.

Two lanes of multilinear hashing modulo 2⁶⁴ (Lemire and Kaser, "Strongly universal string hashing is fast",
2014) over the pixels read as little-endian 64-bit words: one over the words, one over their upper halves, so
that a difference in high bits alone reaches low bits somewhere. The multipliers are odd Philox words, so a
change of any single word always changes the first lane; a random change of several escapes both with probability
at most 2⁻³³. It guards against accidents, not against an adversary.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views.philox import philox4x32

_KEY = (0x7E4C4E52, 0x0D16E575)
_MIX = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
_MASK = 2**64 - 1


@lru_cache(maxsize=16)
def _multipliers(words: int) -> NDArray[np.int64]:
    counter = np.zeros((words, 4), np.uint32)
    counter[:, 0] = np.arange(words)
    return np.ascontiguousarray(philox4x32(counter, _KEY)).view(np.int64) | np.int64(1)


@lru_cache(maxsize=16)
def _multipliers_on(words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pair = torch.from_numpy(_multipliers(words)).to(device)
    return pair[:, 0].contiguous(), pair[:, 1].contiguous()


def _mix(value: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int64 tensors (torch has no unsigned shift: mask after shifting)."""
    for multiplier in _MIX:
        value = value ^ ((value >> 33) & (2**31 - 1))
        value = value * _signed(multiplier)
    return value ^ ((value >> 33) & (2**31 - 1))


def _signed(value: int) -> int:
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def pixel_digests(views_BCHW: Tensor) -> Tensor:
    """Digest of each view.

    Args:
        views_BCHW: uint8 [B, C, H, W] on any device; shape enters the digest, so a transposed image differs.

    Returns:
        int64 [B] on the same device; read as unsigned it is the stored digest.
    """
    if views_BCHW.dtype != torch.uint8 or views_BCHW.ndim != 4:
        raise ValueError(f"views must be uint8 [B, C, H, W]: {views_BCHW.dtype=} {tuple(views_BCHW.shape)=}")
    _, channels, height, width = views_BCHW.shape
    flat = views_BCHW.flatten(1)
    spare = -flat.shape[1] % 8
    if spare:
        flat = torch.nn.functional.pad(flat, (0, spare))
    flat = flat.contiguous()
    if flat.storage_offset() % 8:
        # A slice of a larger tensor may begin anywhere; 64-bit words may not.
        flat = flat.clone()
    words = flat.view(torch.int64)
    first, second = _multipliers_on(words.shape[1], views_BCHW.device)
    shape = _signed((channels << 42) + (height << 21) + width)
    low = (words * first).sum(1) if words.is_cuda else words @ first
    high_words = (words >> 32) & 0xFFFFFFFF
    high = (high_words * second).sum(1) if words.is_cuda else high_words @ second
    return _mix(low + shape) ^ _mix(high + _signed(shape * _MIX[0] + 1))


def as_unsigned(digests: Tensor) -> NDArray[np.uint64]:
    """int64 digests as the uint64 array that the cache stores."""
    return digests.cpu().numpy().view(np.uint64)
