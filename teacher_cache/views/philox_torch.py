"""Philox4x32-10 on torch tensors, CPU or CUDA: the same integers as `philox.philox4x32`.

Torch has no unsigned 64-bit arithmetic. A product of two 32-bit words wraps in int64, but its 64 bits are those of
the unsigned product; the upper half is then taken by shift and mask, because int64 shifts copy the sign downwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 2**32 - 1


def philox4x32_torch(counter_B4: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter_B4: int64 [B, 4], the addresses: values in [0, 2³²), which is not checked, because the check would
            make the host wait for the device.
        key: two 32-bit words.

    Returns:
        int64 [B, 4] on the same device, contiguous: four random words for each address, in [0, 2³²).
    """
    if counter_B4.dtype != torch.int64 or counter_B4.ndim != 2 or counter_B4.shape[1] != 4:
        raise ValueError(f"counters must be int64 [B, 4]: {counter_B4.dtype=} {tuple(counter_B4.shape)=}")
    keys = [[key[i] + number * _WEYL[i] & _LOW for i in range(2)] for number in range(_ROUNDS)]
    # One copy to the device for all constants, not one a round.
    multipliers_2, *keys_2 = torch.tensor([_MULTIPLIERS, *keys], device=counter_B4.device).unbind()
    even_B2, odd_B2 = counter_B4[:, 0::2], counter_B4[:, 1::2]
    for key_2 in keys_2:
        product_B2 = (even_B2 * multipliers_2).flip(1)
        even_B2 = (product_B2 >> 32 & _LOW) ^ odd_B2 ^ key_2
        odd_B2 = product_B2 & _LOW
    return torch.stack([even_B2, odd_B2], dim=2).reshape(-1, 4)
