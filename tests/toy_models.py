"""Toy teachers, named in specs as `toy_models:<class>`. Their arithmetic is exact, so bits are the same anywhere.

An input is a pixel divided by 255; `Pixels` gives the integer back, and sums of small multiples of 2⁻¹⁰ that
stay below 2²⁴ of them are exact in float32 whatever the order.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

POISON = 255
"""A sample whose pixels are all this makes the misbehaving teachers misbehave."""


class Pixels(nn.Module):
    """float 0..1 to the integers 0..255, as float32."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW.float() * 255).round()


class PixelSums(nn.Module):
    """Logits are integer-weighted sums of pixels, times 2⁻¹⁰. `stem` is a node to tap, [B, C, H, W]."""

    def __init__(self, classes: int = 10, pixels: int = 64, scale: float = 1.0) -> None:
        super().__init__()
        self.stem = Pixels()
        self.head = nn.Linear(pixels, classes, bias=False)
        self.scale = scale
        rows, columns = torch.meshgrid(torch.arange(classes), torch.arange(pixels), indexing="ij")
        self.head.weight.data = ((rows * 7 + columns * 3) % 11 - 5) * 2.0**-10

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.stem(images_BCHW).flatten(1)) * self.scale


def poisoned(images_BCHW: Tensor) -> Tensor:
    """Which inputs are the all-white poison, [B]."""
    return (images_BCHW.flatten(1) > 0.999).all(1)


class NaNs(PixelSums):
    """Answers NaN for the poison."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return torch.where(poisoned(images_BCHW)[:, None], torch.nan, super().forward(images_BCHW))


class Raises(PixelSums):
    """Raises on the poison."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if poisoned(images_BCHW).any():
            raise ArithmeticError("the poison was too much")
        return super().forward(images_BCHW)


class Dies(PixelSums):
    """Ends its process on the poison: always, or until the marker file is there."""

    def __init__(self, marker: str | None = None) -> None:
        super().__init__()
        self.marker = marker

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if poisoned(images_BCHW).any() and not (self.marker and Path(self.marker).exists()):
            if self.marker:
                Path(self.marker).touch()
            os._exit(1)
        return super().forward(images_BCHW)


class DiesOf(PixelSums):
    """Ends its process on images that hold one of some values in their first pixel: view-dependent where it moves.

    With `together` it does so only where two of these images are in one micro-batch.
    """

    def __init__(self, values: tuple[int, ...] = (), together: bool = False) -> None:
        super().__init__()
        self.values, self.together = values, together

    def forward(self, images_BCHW: Tensor) -> Tensor:
        first = (images_BCHW[:, 0, 0, 0] * 255).round().tolist()
        if sum(value in self.values for value in first) > int(self.together):
            os._exit(1)
        return super().forward(images_BCHW)


class OutOfMemory(PixelSums):
    """Has room for so many images at once; for `later` only, once it has been asked about a real one."""

    def __init__(self, room: int = 4, later: int | None = None) -> None:
        super().__init__()
        self.room, self.later = room, later

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.later is not None and images_BCHW.any():
            self.room = self.later
        if len(images_BCHW) > self.room:
            raise torch.OutOfMemoryError(f"tried to allocate {len(images_BCHW)} images")
        return super().forward(images_BCHW)


class OtherShape(PixelSums):
    """Answers one class fewer for the poison."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits = super().forward(images_BCHW)
        return logits[:, :-1] if poisoned(images_BCHW).any() else logits


class Infinite(PixelSums):
    """Answers inf for the poison."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return torch.where(poisoned(images_BCHW)[:, None], torch.inf, super().forward(images_BCHW))


class KillsItself(PixelSums):
    """`kill -9` of its own process after as many real answers as `TOY_KILL_AFTER` says; never without it."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if images_BCHW.any() and "TOY_KILL_AFTER" in os.environ:
            self.answers += 1
            if self.answers > int(os.environ["TOY_KILL_AFTER"]):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images_BCHW)


def image_name(pixels_CHW: Tensor) -> str:
    """A short digest of one image's uint8 pixels: by it a view is known again in a log."""
    return blake2b(pixels_CHW.to(torch.uint8).contiguous().numpy().tobytes(), digest_size=8).hexdigest()


class Told(PixelSums):
    """Appends "run, image" to the file `TOY_LOG` for every image that it is asked about; `TOY_PAUSE` slows it down.

    The fillings of a micro-batch are black and are not told of. One write for each question: lines stay whole.
    """

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pixels = (images_BCHW.float() * 255).round()
        lines = [f"{os.environ.get('TOY_RUN', '-')} {image_name(image)}\n" for image in pixels if image.any()]
        if lines and "TOY_LOG" in os.environ:
            handle = os.open(os.environ["TOY_LOG"], os.O_APPEND | os.O_CREAT | os.O_WRONLY)
            os.write(handle, "".join(lines).encode())
            os.close(handle)
            time.sleep(float(os.environ.get("TOY_PAUSE", "0")))
        return super().forward(images_BCHW)


class SmallNet(nn.Module):
    """Convolution, BatchNorm, in-place ReLU, Dropout, head: what real networks have, in 400 weights."""

    def __init__(self, classes: int = 10, channels: int = 1, train_mode: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.conv = nn.Conv2d(channels, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=True)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(4, classes)
            self.unused = nn.Identity()
            self.norm.running_mean = torch.randn(4)
        if train_mode:
            self.train()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.drop(self.relu(self.norm(self.conv(images_BCHW)))).mean((2, 3)))


class Stages(nn.Module):
    """Two stages: `first` puts out 3 channels of 8×8, `second` 5 of 4×4."""

    def __init__(self, classes: int = 10, channels: int = 1, widths: tuple[int, int] = (3, 5)) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
            self.second = nn.Conv2d(widths[0], widths[1], 3, padding=1, stride=2)
            self.head = nn.Linear(widths[1], classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        second_BCHW = self.second(self.first(images_BCHW).relu()).relu()
        return self.head(second_BCHW.mean((2, 3)))


class Recurrent(nn.Module):
    """Its inner node gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 10, batch_first=True)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.rnn(images_BCHW[:, 0])[0][:, -1]


class AnswersTuple(PixelSums):
    """Gives (logits, auxiliary) instead of logits."""

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(images_BCHW)
        return logits, logits


class Constant(nn.Module):
    """Always the same class: a teacher at chance."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("logits", torch.arange(classes, dtype=torch.float32))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.logits.repeat(len(images_BCHW), 1)


class Bands(nn.Module):
    """The right answer on `toy_builds.write_arrays`: class c images are brightest in row c % 8."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images_BCHW: Tensor) -> Tensor:
        rows = (images_BCHW[:, 0] * 255).round().sum(2)
        return rows[:, torch.arange(self.classes) % rows.shape[1]] * 2.0**-10


def not_a_module() -> int:
    """A factory that gives no module."""
    return 3


def half_up(image_CHW: Tensor) -> Tensor:
    """A seeded-global view: adds global noise to uint8 pixels."""
    noise = torch.randint(0, 3, image_CHW.shape, dtype=torch.uint8)
    return (image_CHW // 2) + noise


PIPELINE = v2.Compose([v2.RandomResizedCrop(12), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4), v2.RandomErasing()])
"""A whole torchvision pipeline, as a user has one already."""


def in_place(image_CHW: Tensor) -> Tensor:
    """A transform that overwrites what it is given."""
    return image_CHW.bitwise_xor_(1 + torch.randint(0, 200, (), dtype=torch.uint8))


def from_numpys_generator(image_CHW: Tensor) -> Tensor:
    """A transform whose randomness nobody seeds."""
    return image_CHW ^ int(np.random.randint(0, 2**8))


def wants_a_picture(image_CHW: Tensor) -> Tensor:
    """A transform for PIL images."""
    return image_CHW.getpixel((0, 0))  # type: ignore[operator]


def as_float(image_CHW: Tensor) -> Tensor:
    """A view that answers floats: refused."""
    return image_CHW / 255


class Twice(nn.Module):
    """One node that runs twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.head = nn.LazyLinear(10)
        self.head(torch.zeros(1, 64))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.relu(self.relu(images_BCHW.flatten(1)) - 0.5))
        return logits


def shifted(image_CHW: Tensor, by: int) -> Tensor:
    """A callable with a parameter: `functools.partial` hides it behind an address in its `repr`."""
    return image_CHW.roll(by, -1)


SHIFT_ONE = functools.partial(shifted, by=1)
SHIFT_TWO = functools.partial(shifted, by=2)


class Positions(PixelSums):
    """Logits of a sequence, [B, 8, C]: a linear layer on each row of the image."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(classes, pixels=8)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.stem(images_BCHW)[:, 0])
