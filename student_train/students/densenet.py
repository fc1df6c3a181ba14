"""DenseNet-121: Huang et al. 2017, table 1, with the bottlenecks and the halving transitions of DenseNet-BC.

The names of the weights are torchvision's; at growth 32 all of its `densenet121` but the classes fit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from student_train.students.parts import initialise, require_width

BLOCKS = (6, 12, 24, 16)
"""Layers of each dense block."""


class DenseLayer(nn.Module):
    """bn–relu–1×1 to 4 · growth, bn–relu–3×3 to growth; puts out its inputs with what it made beside them."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C + growth, H, W]."""
        narrow = self.conv1(functional.relu(self.norm1(x_BCHW)))
        return torch.cat([x_BCHW, self.conv2(functional.relu(self.norm2(narrow)))], 1)


class Transition(nn.Module):
    """bn–relu–1×1 to half the channels, then a 2×2 average pool."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C / 2, H / 2, W / 2]."""
        return functional.avg_pool2d(self.conv(functional.relu(self.norm(x_BCHW))), 2)


class DenseNet(nn.Module):
    """A strided 7×7 stem with a max pool, four dense blocks with transitions between them, average pool, linear.

    For images from 29×29 upwards, which it makes 32 times smaller.
    """

    def __init__(self, classes: int, channels: int, growth: int) -> None:
        super().__init__()
        width = 2 * growth
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(channels, width, 7, 2, 3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(width))
        self.features.add_module("relu0", nn.ReLU())
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for number, layers in enumerate(BLOCKS, 1):
            if number > 1:
                self.features.add_module(f"transition{number - 1}", Transition(width))
                width //= 2
            self.features.add_module(f"denseblock{number}", _block(layers, width, growth))
            width += layers * growth
        self.features.add_module("norm5", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, classes)
        initialise(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images to logits [B, classes]."""
        x_BCHW = functional.relu(self.features(images_BCHW))
        logits: Tensor = self.classifier(x_BCHW.mean((2, 3)))
        return logits


def _block(layers: int, width: int, growth: int) -> nn.Sequential:
    block = nn.Sequential()
    for number in range(layers):
        block.add_module(f"denselayer{number + 1}", DenseLayer(width + number * growth, growth))
    return block


def densenet121(classes: int = 10, channels: int = 3, growth: int = 32) -> DenseNet:
    """6,880,448 weights at growth 32 and 1,725,024 at half of it, for 10 classes and 3 channels.

    Args:
        classes: outputs.
        channels: of the input.
        growth: channels that each layer adds; the stem has twice as many.

    Raises:
        SpecError: the growth is no number of channels.
    """
    require_width("growth", growth, 32)
    return DenseNet(classes, channels, growth)
