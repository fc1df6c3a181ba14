"""The pixel digest: 64 bits of a view's uint8 pixels, the same integers from NumPy, torch on CPU and torch on CUDA.

Two lanes of multilinear hashing modulo 2⁶⁴ (Lemire and Kaser, "Strongly universal string hashing is fast",
2014) over the pixels read as little-endian 64-bit words: one over the words, one over their upper halves, so
that a difference in high bits alone reaches low bits somewhere. The multipliers are odd Philox words, so a
change of any single word always changes the first lane; a random change of several escapes both with probability
at most 2⁻³³. It guards against accidents, not against an adversary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.views.philox_torch import philox4x32_torch

_KEY = (0x7E4C4E52, 0x0D16E575)
_MIX = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
_MASK = 2**64 - 1

_Words = TypeVar("_Words", Tensor, NDArray[np.int64])


@lru_cache(maxsize=16)
def _multipliers(words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The odd multipliers of both lanes, int64 [W] each, made on the device."""
    counter_W4 = torch.zeros((words, 4), dtype=torch.int64, device=device)
    counter_W4[:, 0] = torch.arange(words, device=device)
    random_W4 = philox4x32_torch(counter_W4, _KEY)
    first_W, second_W = (random_W4[:, i] | random_W4[:, i + 1] << 32 | 1 for i in (0, 2))
    if device.type == "cuda":
        # They are kept, and the next caller's stream, perhaps another, does not wait for this one.
        torch.cuda.current_stream(device).synchronize()
    return first_W, second_W


def _signed(value: int) -> int:
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _finish(lanes_2B: _Words, shape: int) -> _Words:
    """Add the shape, apply the finaliser of MurmurHash3 to both lanes, join them. Overwrites `lanes_2B`."""
    lanes_2B[0] += _signed(shape)
    lanes_2B[1] += _signed(shape * _MIX[0] + 1)
    for multiplier in _MIX:
        # int64 shifts copy the sign downwards: mask after shifting.
        lanes_2B ^= lanes_2B >> 33 & 2**31 - 1
        lanes_2B *= _signed(multiplier)
    lanes_2B ^= lanes_2B >> 33 & 2**31 - 1
    joined_B: _Words = lanes_2B[0] ^ lanes_2B[1]
    return joined_B


def _numpy_digests(views_BCHW: Tensor, shape: int) -> Tensor:
    """`pixel_digests` on the CPU: `einsum` reads upper halves where they lie; torch would write them out first."""
    batch, size = len(views_BCHW), views_BCHW.shape[1:].numel()
    flat = views_BCHW.numpy().reshape(batch, size)
    if size % 8 or flat.strides[1] != 1:
        padded = np.zeros((batch, size + -size % 8), np.uint8)
        padded[:, :size] = flat
        flat = padded
    first_W, second_W = (lane.numpy() for lane in _multipliers(flat.shape[1] // 8, views_BCHW.device))
    lanes_2B = np.empty((2, batch), np.int64)
    np.einsum("bw,w->b", flat.view(np.int64), first_W, out=lanes_2B[0])
    np.einsum("bw,w->b", flat.view(np.uint32)[:, 1::2], second_W, out=lanes_2B[1])
    return torch.from_numpy(_finish(lanes_2B, shape))


def _torch_digests(views_BCHW: Tensor, shape: int) -> Tensor:
    """`pixel_digests` on any device, without leaving it."""
    size = views_BCHW.shape[1:].numel()
    flat = views_BCHW.flatten(1)
    if size % 8:
        flat = torch.nn.functional.pad(flat, (0, -size % 8))
    flat = flat.contiguous()
    if flat.storage_offset() % 8:
        # A slice of a larger tensor may begin anywhere; 64-bit words may not.
        flat = flat.clone()
    words_BW = flat.view(-1).view(torch.int64).view(len(flat), flat.shape[1] // 8)
    first_W, second_W = _multipliers(words_BW.shape[1], views_BCHW.device)
    low_B = (words_BW * first_W).sum(1)
    high_B = ((words_BW >> 32 & 2**32 - 1) * second_W).sum(1)
    return _finish(torch.stack([low_B, high_B]), shape)


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
    digests = _numpy_digests if views_BCHW.device.type == "cpu" else _torch_digests
    return digests(views_BCHW, (channels << 42) + (height << 21) + width)


def as_unsigned(digests: Tensor) -> NDArray[np.uint64]:
    """int64 digests as the uint64 array that the cache stores."""
    return digests.cpu().numpy().view(np.uint64)
