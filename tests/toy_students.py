"""A small student, and what every run of one must keep: a run that was stopped ends with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teacher_cache as tc
from student_train import Objective, TrainSpec, ViewStream, fit
from student_train.objective import Term
from student_train.stream import Batch


class Net(nn.Module):
    """8×8 images to 10 logits; `maps` has 3 channels of 8×8, and what follows it overwrites its output."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.maps = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3) if batch_norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(3 * 64, 10)
        self.idle = nn.Linear(1, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.maps(images_BCHW))).flatten(1))


def seeded(module: Callable[..., nn.Module], *arguments: Any) -> Any:
    """A module whose first weights are the same each time."""
    torch.manual_seed(3)
    return module(*arguments)


def images(batch: Batch) -> Tensor:
    """What a student is shown where nothing is normalised."""
    return batch.views_BCHW.float() / 255


def trained(
    terms: list[Term],
    cache: Path,
    student: Callable[[], nn.Module] = Net,
    folder: Path | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
    **train: Any,
) -> tuple[list[dict[str, float]], nn.Module, dict[str, Any]]:
    """One run from its beginning, or from the folder's checkpoint: history, student, state of the objective."""
    net, objective = seeded(student), Objective(terms)
    stream = ViewStream(tc.open(cache), batch_size=9, fields=objective.fields)
    told = TrainSpec(**{"epochs": 3, "lr": 0.05, "clip_norm": 1, "batch_size": 9, "device": "cpu", **train})
    history = fit(net, stream, objective, told, folder=folder, run="test" if folder else "", log=log).history
    return history, net, objective.state_dict()


def assert_resumes(terms: list[Term], cache: Path, folder: Path, student: Callable[[], nn.Module] = Net) -> None:
    """Stopped after each epoch in turn, a run ends with the weights, the values and the joints of a whole one."""

    def stop(_entry: dict[str, float]) -> None:
        raise KeyboardInterrupt

    whole, one, kept = trained(terms, cache, student)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            trained(terms, cache, student, folder, stop)
    resumed, other, again = trained(terms, cache, student, folder)
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in whole]
    assert_equal(one.state_dict(), other.state_dict())
    assert_equal(kept, again)


def assert_equal(one: Any, other: Any) -> None:
    """Nested states, bit for bit."""
    if isinstance(one, dict):
        assert set(one) == set(other)
        for name, value in one.items():
            assert_equal(value, other[name])
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def student(classes: int = 10, channels: int = 1) -> Net:
    """`Net` by a name that a configuration can say."""
    assert (classes, channels) == (10, 1)
    return Net()
