"""Class numbers in as many bits as the number of classes needs: ten for 1,000, seventeen for 128,000."""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_cache.encodings.base import narrowest

_TORCH = {"uint8": torch.uint8, "uint16": torch.uint16, "uint32": torch.uint32}


def id_bits(classes: int) -> int:
    """Bits of one class number; at least one."""
    return max(1, (classes - 1).bit_length())


def packed_bytes(count: int, classes: int) -> int:
    """Bytes that `count` class numbers take."""
    return -(-count * id_bits(classes) // 8)


def pack(indices_BK: Tensor, classes: int) -> Tensor:
    """Class numbers [B, K] to bytes [B, packed_bytes]: the bits of number i begin at bit i · bits, lowest first."""
    bits, count = id_bits(classes), indices_BK.shape[-1]
    places = torch.arange(bits, device=indices_BK.device)
    stream_BN = (indices_BK.long()[..., None] >> places & 1).flatten(-2)
    width = packed_bytes(count, classes)
    filling = stream_BN.new_zeros((*stream_BN.shape[:-1], width * 8 - count * bits))
    whole_BN = torch.cat([stream_BN, filling], dim=-1)
    eights = whole_BN.reshape(*whole_BN.shape[:-1], width, 8)
    packed_BN: Tensor = (eights << torch.arange(8, device=indices_BK.device)).sum(-1)
    return packed_BN.to(torch.uint8)


def unpack(packed_BN: Tensor, count: int, classes: int) -> Tensor:
    """Bytes [B, N] to class numbers [B, K] in the narrowest unsigned type."""
    bits = id_bits(classes)
    first_K = torch.arange(count, device=packed_BN.device) * bits
    # A number begins at most seven bits into a byte, and lies in that one and those after it.
    spanned = -(-(bits + 7) // 8)
    padded_BN = torch.cat([packed_BN, packed_BN.new_zeros((*packed_BN.shape[:-1], spanned - 1))], dim=-1).long()
    word_BK = sum(padded_BN[..., first_K // 8 + byte] << 8 * byte for byte in range(spanned))
    assert isinstance(word_BK, Tensor), "one byte at least"
    indices_BK = word_BK >> first_K % 8 & (1 << bits) - 1
    return indices_BK.to(_TORCH[narrowest(classes)])
