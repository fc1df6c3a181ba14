"""What `student-train compare` writes, as the report reads it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from teacher_cache.errors import SpecError
from teacher_cache.spec import parse


class _Read(BaseModel):
    """Open to keys that a later writer adds; strict about those that are shown."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Epoch(_Read):
    """One line of a training history."""

    epoch: int
    loss: float | None = None
    accuracy: float | None = None
    validation_accuracy: float | None = None
    """On held-out training rows; then the test data has been looked at after the last epoch only."""


@dataclass(frozen=True)
class Curve:
    """A quantity per epoch over the seeds that recorded it."""

    epochs: NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    """Sample standard deviation; 0 where one seed is all there is."""


class Arm(_Read):
    """One way of training, over all seeds."""

    accuracy: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]
    """Share of test samples, one number for each seed."""
    mean: FiniteFloat | None = None
    std: float | None = None
    history: tuple[tuple[Epoch, ...], ...] = ()

    @property
    def average(self) -> float:
        """The mean as written, else of `accuracy`."""
        return sum(self.accuracy) / len(self.accuracy) if self.mean is None else self.mean

    @property
    def spread(self) -> float | None:
        """The standard deviation as written, else the sample's; None where it is not known."""
        if self.std is not None:
            return None if math.isnan(self.std) else self.std
        return float(np.std(self.accuracy, ddof=1)) if len(self.accuracy) > 1 else None

    def curve(self, name: str) -> Curve | None:
        """`loss`, `accuracy` or `validation_accuracy` per epoch; None where no seed recorded it."""
        found: dict[int, list[float]] = {}
        for seed in self.history:
            for entry in seed:
                value: float | None = getattr(entry, name)
                if value is not None:
                    found.setdefault(entry.epoch, []).append(value)
        if not found:
            return None
        epochs = sorted(found)
        return Curve(
            np.array(epochs, np.int64),
            np.array([np.mean(found[epoch]) for epoch in epochs]),
            np.array([np.std(found[e], ddof=1) if len(found[e]) > 1 else 0.0 for e in epochs]),
        )


class Difference(_Read):
    """How much better one arm is than another, paired by seed (and by sample)."""

    arm: str
    against: str
    mean: FiniteFloat
    low: FiniteFloat | None = None
    """Of the 95 % interval."""
    high: FiniteFloat | None = None
    significant: bool | None = None
    measure: str = "accuracy"


class Comparison(_Read):
    """A whole file."""

    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    seeds: tuple[int, ...] = ()
    differences: tuple[Difference, ...] = ()
    student: str | None = None

    @property
    def intervals(self) -> bool:
        """Whether a difference comes with its interval."""
        return any(item.low is not None and item.high is not None for item in self.in_accuracy)

    @property
    def in_accuracy(self) -> tuple[Difference, ...]:
        """The differences that the page shows."""
        return tuple(item for item in self.differences if item.measure == "accuracy")

    @model_validator(mode="after")
    def _known_arms(self) -> Comparison:
        for difference in self.differences:
            for name in (difference.arm, difference.against):
                if name not in self.arms:
                    raise ValueError(f"a difference names {name!r}, which is no arm")
        return self


def read_comparison(path: str | Path) -> Comparison:
    """Reads what `student-train compare` wrote.

    Raises:
        SpecError: the file cannot be read, is not JSON, or is not such a comparison.
    """
    hint = "Give the JSON file that `student-train compare` wrote."
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise SpecError("comparison", f"must be readable JSON: {error}", path, hint) from error
    if not isinstance(data, dict) or "arms" not in data:
        raise SpecError("comparison", "must be a JSON object with `arms`", path, hint)
    return parse(Comparison, data, str(path))
