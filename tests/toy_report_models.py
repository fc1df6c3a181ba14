"""A teacher for the report's tests: any image size, seeded weights, answers that differ from row to row."""

from __future__ import annotations

import torch
from torch import nn


def net(classes: int = 10, channels: int = 1, sharpness: float = 40.0) -> nn.Module:
    """Logits [B, classes], and a feature of 6 numbers at node `2`."""
    generator = torch.Generator().manual_seed(7)
    module = nn.Sequential(
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, 6), nn.ReLU(), nn.Linear(6, classes)
    )
    with torch.no_grad():
        for layer in (module[2], module[4]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * sharpness**0.5 / 4)
            layer.bias.zero_()
    return module
