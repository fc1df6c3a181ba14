"""Several objectives, paired seeds: equal seeds share initial weights, order and views, so differences are paired."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from student_train.recipes import ArmSpec, CompareSpec, RunSpec
from student_train.run import Opened, open_data, rehearse_one, train_one
from teacher_cache.storage import write_atomic

Progress = Callable[[str, int, dict[str, float]], None]
"""Called after each epoch with (arm, seed, entry)."""


@dataclass(frozen=True)
class Difference:
    """An arm against the first one, paired by seed."""

    arm: str
    against: str
    mean: float
    low: float
    high: float
    """95 % confidence interval of the mean difference (Student's t over the pairs)."""

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """What every arm reached with every seed, after the last epoch (never the best one)."""

    accuracy: dict[str, list[float]]
    history: dict[str, list[list[dict[str, float]]]]
    differences: tuple[Difference, ...]
    spec: CompareSpec

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`."""
        return {
            "arms": {
                arm: {
                    "accuracy": values,
                    "mean": statistics.fmean(values),
                    "std": statistics.stdev(values),
                    "history": self.history[arm],
                }
                for arm, values in self.accuracy.items()
            },
            "seeds": list(self.spec.seeds),
            "differences": [{**vars(item), "significant": item.significant} for item in self.differences],
            "student": self.spec.student.model,
            "train": self.spec.train.model_dump(mode="json"),
        }


def compare(spec: CompareSpec, progress: Progress | None = None) -> Comparison:
    """Trains every arm with every seed; finished cells are read from their checkpoints, not trained again.

    Writes `result.json` into the run's folder, and each cell into `<run>/<arm>/seed-<n>`.
    """
    arms = {name: _of_arm(spec, arm) for name, arm in spec.arms.items()}
    shared: dict[str, Opened] = {}
    for run in arms.values():
        # Arms over the same data share it: opening may mean reading a data set into memory.
        key = run.data.model_dump_json()
        shared[key] = shared.get(key) or open_data(run)
    opened = {name: shared[run.data.model_dump_json()] for name, run in arms.items()}
    for name, run in arms.items():
        # Whatever an arm's data or student does not allow is said before the first arm has been trained.
        rehearse_one(run, opened[name], spec.arms[name].objective, spec.seeds[0])
    accuracy: dict[str, list[float]] = {arm: [] for arm in spec.arms}
    history: dict[str, list[list[dict[str, float]]]] = {arm: [] for arm in spec.arms}
    for seed in spec.seeds:
        for arm, run in arms.items():
            folder = Path(spec.run) / arm / f"seed-{seed}"
            log = (lambda entry, arm=arm, seed=seed: progress(arm, seed, entry)) if progress else None
            result = train_one(run, opened[arm], spec.arms[arm].objective, seed, folder, log)
            accuracy[arm].append(result.history[-1]["accuracy"])
            history[arm].append(result.history)
    first = next(iter(spec.arms))
    differences = tuple(difference(arm, accuracy[arm], first, accuracy[first]) for arm in spec.arms if arm != first)
    comparison = Comparison(accuracy, history, differences, spec)
    write_atomic(Path(spec.run), "result.json", json.dumps(comparison.to_json(), allow_nan=False).encode())
    return comparison


def _of_arm(spec: CompareSpec, arm: ArmSpec) -> RunSpec:
    """The run as one arm trains it."""
    changes = {name: value for name in ("data", "normalize") if (value := getattr(arm, name)) is not None}
    return spec.model_copy(update=changes)


def difference(arm: str, values: Sequence[float], against: str, others: Sequence[float]) -> Difference:
    """The paired mean difference with its 95 % interval (Student's t, n − 1 degrees of freedom)."""
    pairs = [value - other for value, other in zip(values, others, strict=True)]
    mean = statistics.fmean(pairs)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    reach = float(student_t.ppf(0.975, len(pairs) - 1)) * error
    return Difference(arm, against, mean, mean - reach, mean + reach)
