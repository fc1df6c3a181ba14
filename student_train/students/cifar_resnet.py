"""The CIFAR ResNets of He et al. 2015, section 4.2: 3×3 stem, three stages, parameter-free shortcuts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; where the shape changes the shortcut strides and pads with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self._stride, self._padding = stride, (outputs - inputs) // 2

    def shortcut(self, x_BCHW: Tensor) -> Tensor:
        """The input, brought to the output's shape."""
        strided = x_BCHW[:, :, :: self._stride, :: self._stride]
        return functional.pad(strided, (0, 0, 0, 0, self._padding, self._padding))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride]."""
        shortcut = self.shortcut(x_BCHW)
        x_BCHW = functional.relu(self.bn1(self.conv1(x_BCHW)))
        return functional.relu(self.bn2(self.conv2(x_BCHW)) + shortcut)


class CifarResNet(nn.Module):
    """6n + 2 layers: a 3×3 stem, three stages of n blocks, average pool, `linear`."""

    def __init__(self, blocks: int, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1)
        self.layer2 = _stage(blocks, width, 2 * width, 2)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images to logits [B, classes]."""
        x_BCHW = functional.relu(self.bn1(self.conv1(images_BCHW)))
        x_BCHW = self.layer3(self.layer2(self.layer1(x_BCHW)))
        logits: Tensor = self.linear(x_BCHW.mean((2, 3)))
        return logits


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet20_cifar(classes: int = 10, channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20: 0.27 million parameters at width 16."""
    return CifarResNet(3, classes, channels, width)


def resnet56_cifar(classes: int = 10, channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-56: 0.85 million parameters at width 16."""
    return CifarResNet(9, classes, channels, width)
