"""The teachers that `bench_service.py` has served, and how many images a second whoever serves them reaches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from load_generator import Answer, Closed, LoadGenerator
from load_requests import Question
from torch import Tensor, nn
from torchvision import models

from student_train.students import resnet56_cifar

CACHED = 512
"""Images of the data set that is cached."""


@dataclass(frozen=True)
class Case:
    """One teacher that all serve."""

    name: str
    model: str
    network: Callable[[], nn.Module]
    """The same, to make its weights."""
    arguments: dict[str, int]
    size: int
    micro_batch: int
    turn: float
    """How long a turn is, as times of the shortest."""

    def images(self, count: int) -> Tensor:
        """Noise, uint8 [count, 3, H, W]."""
        drawn = torch.Generator().manual_seed(count)
        return torch.randint(0, 256, (count, 3, self.size, self.size), dtype=torch.uint8, generator=drawn)

    def configuration(self, root: Path) -> Path:
        """Writes a data set of noise, random weights, and the configuration that names them."""
        folder = root / self.name
        folder.mkdir()
        count = CACHED if self.size == 32 else 8
        np.save(folder / "images.npy", self.images(count).permute(0, 2, 3, 1).numpy())
        torch.save(self.network().state_dict(), folder / "weights.pt")
        described = {
            "cache": str(folder / "cache"),
            "source": {"kind": "numpy", "images": str(folder / "images.npy")},
            "views": {"recipe": [{"normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}]},
            "teacher": {
                "name": self.name,
                "model": self.model,
                "arguments": self.arguments,
                "weights": str(folder / "weights.pt"),
                "micro_batch": self.micro_batch,
            },
            "compute": {"device": "cpu", "threads": 1},
        }
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(described))
        return path


CASES = (
    Case("ResNet-56", "student_train.students:resnet56_cifar", resnet56_cifar, {"classes": 10}, 32, 64, turn=1),
    Case("ResNet-18", "torchvision:resnet18", models.resnet18, {"num_classes": 1000}, 224, 8, turn=2),
)
Rate = Callable[[float], float]


def pace(answers: list[Answer], images: int, seconds: float) -> float:
    """Images a second: the slope of all that were answered by a moment, as a batch answers many at once.

    The beginning, when batches are not full yet, and the end, when callers leave, are not counted.

    Raises:
        RuntimeError: a request was not answered, or too few were to tell.
    """
    if bad := {answer.status for answer in answers} - {200}:
        raise RuntimeError(f"the load was not answered: {bad}")
    times = sorted(answer.done for answer in answers)
    kept = [place for place, done in enumerate(times) if seconds / 5 <= done <= seconds]
    if len(kept) < 3:
        raise RuntimeError(f"{len(kept)} answers in {seconds} s: make --seconds more")
    return float(np.polyfit([times[place] for place in kept], kept, 1)[0]) * images


def asked(load: LoadGenerator, question: Question, case: Case, images: int) -> Rate:
    """A closed loop of so many callers that three batches are always there to be filled."""
    callers = max(2, math.ceil(3 * case.micro_batch / images))
    return lambda seconds: pace(load.run(question, Closed(callers, seconds)), images, seconds)


def in_turns(rounds: int, seconds: float, rates: dict[str, Rate]) -> dict[str, list[float]]:
    """What each reached in each round; the order changes from round to round."""
    found: dict[str, list[float]] = {name: [] for name in rates}
    for number in range(rounds):
        for name in rates if number % 2 else reversed(rates):
            found[name].append(rates[name](seconds))
            print(f"  {name}: {found[name][-1]:.1f}", file=sys.stderr, flush=True)
    return found
