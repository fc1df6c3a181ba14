"""ResNet-18 for small images: He et al. 2015, table 1, with a 3×3 stem that neither strides nor pools.

The names of the weights are torchvision's; of its `resnet18` all but `conv1` and the classes fit.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from student_train.students.cifar_resnet import BasicBlock
from student_train.students.parts import initialise, require_width


class ProjectionBlock(BasicBlock):
    """Two 3×3 convolutions; where the shape changes the shortcut is a strided 1×1 convolution (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.downsample = nn.Sequential()
        if inputs != outputs:
            self.downsample.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(outputs))

    def shortcut(self, x_BCHW: Tensor) -> Tensor:
        """The input, brought to the output's shape."""
        projected: Tensor = self.downsample(x_BCHW)
        return projected


class ResNet(nn.Module):
    """A 3×3 stem, four stages of two blocks, of which all but the first halve the map; average pool, `fc`."""

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, classes)
        initialise(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images to logits [B, classes]."""
        x_BCHW = functional.relu(self.bn1(self.conv1(images_BCHW)))
        x_BCHW = self.layer4(self.layer3(self.layer2(self.layer1(x_BCHW))))
        logits: Tensor = self.fc(x_BCHW.mean((2, 3)))
        return logits


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(ProjectionBlock(inputs, outputs, stride), ProjectionBlock(outputs, outputs, 1))


def resnet18(classes: int = 10, channels: int = 3, width: int = 64) -> ResNet:
    """11,164,352 weights at width 64 and 2,792,800 at half of it, for 10 classes and 3 channels.

    Args:
        classes: outputs.
        channels: of the input.
        width: channels of the first stage.

    Raises:
        SpecError: the width is no number of channels.
    """
    require_width("width", width, 64)
    return ResNet(classes, channels, width)
