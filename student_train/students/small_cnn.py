"""A small convolutional network for small images: two 3×3 stages and a linear head."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """conv–bn–relu–pool twice, global average, linear; for images from 8×8 upwards."""

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.stem = _stage(channels, width)
        self.body = _stage(width, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images to logits [B, classes]."""
        logits: Tensor = self.head(self.body(self.stem(images_BCHW)).mean((2, 3)))
        return logits


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


def small_cnn(classes: int = 10, channels: int = 3, width: int = 16) -> SmallCNN:
    """About 5,000 parameters at width 16."""
    return SmallCNN(classes, channels, width)
