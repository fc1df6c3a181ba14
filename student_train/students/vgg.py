"""VGG-16 with batch norm for images of 32×32: configuration D of Simonyan and Zisserman 2014, and a small head.

The names of the weights are torchvision's; of its `vgg16_bn` the `features` fit.
"""

from __future__ import annotations

from torch import Tensor, nn

from student_train.students.parts import initialise, require_width

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Of each stage its channels, as times the first one's, and its convolutions (their table 1, column D)."""


class VGG(nn.Module):
    """Five stages of 3×3 convolutions, each ended by a 2×2 max pool, then three linear layers.

    For images from 32×32 upwards: what five pools leave of larger ones is averaged.
    """

    def __init__(self, classes: int, channels: int, width: int, dropout: float) -> None:
        super().__init__()
        self.features = _features(channels, width)
        last = STAGES[-1][0] * width
        # In place of the paper's 4096-4096 head, made for 7×7 maps, which would hold nine tenths of the weights.
        self.classifier = nn.Sequential(
            nn.Linear(last, last),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(last, last),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(last, classes),
        )
        initialise(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images to logits [B, classes]."""
        logits: Tensor = self.classifier(self.features(images_BCHW).mean((2, 3)))
        return logits


def _features(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for times, convolutions in STAGES:
        for _ in range(convolutions):
            outputs = times * width
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def vgg16(classes: int = 10, channels: int = 3, width: int = 64, dropout: float = 0.5) -> VGG:
    """15,239,872 weights at width 64 and 3,811,680 at half of it, for 10 classes and 3 channels.

    Args:
        classes: outputs.
        channels: of the input.
        width: channels of the first stage; the head has 8 times as many.
        dropout: share of the head's numbers that are dropped while training.

    Raises:
        SpecError: the width is no number of channels.
    """
    require_width("width", width, 64)
    return VGG(classes, channels, width, dropout)
