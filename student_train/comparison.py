"""What a comparison found: by arm, seed and measure, and what the differences mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student_t

from student_train.evaluate import MEASURES
from student_train.recipes import CompareSpec


@dataclass(frozen=True)
class Difference:
    """An arm against the first one, paired by seed."""

    arm: str
    against: str
    measure: str
    mean: float
    low: float
    high: float
    """95 % confidence interval of the mean difference (Student's t over the pairs)."""

    spread: bool = True
    """Whether the pairs differ from each other at all: where they do not, they say nothing of what chance does."""

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0; it is that of this one comparison, not corrected for others beside it."""
        return self.spread and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """What every arm reached with every seed, after the last epoch (never the best one)."""

    history: dict[str, list[list[dict[str, float]]]]
    """Of each arm, for every seed, an entry an epoch."""
    spec: CompareSpec

    @property
    def measures(self) -> tuple[str, ...]:
        """What was measured of every student, in the order of `MEASURES`."""
        last = next(iter(self.history.values()))[0][-1]
        return tuple(name for name in MEASURES if name in last)

    def values(self, measure: str, arm: str) -> list[float]:
        """After the last epoch, by seed."""
        return [history[-1][measure] for history in self.history[arm]]

    @property
    def accuracy(self) -> dict[str, list[float]]:
        """On the evaluation data, by arm."""
        return {arm: self.values("accuracy", arm) for arm in self.history}

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Of every arm and measure, against the first arm."""
        first, *others = self.history
        return tuple(
            difference(arm, self.values(measure, arm), first, self.values(measure, first), measure)
            for measure in self.measures
            for arm in others
        )

    @property
    def chosen(self) -> str | None:
        """The arm with the highest mean accuracy on held-out training rows; None where none were held out.

        Chosen without a look at the evaluation data, so what that says of the arm is not flattered by the choice.
        """
        if "validation_accuracy" not in self.measures:
            return None
        return max(self.history, key=lambda arm: statistics.fmean(self.values("validation_accuracy", arm)))

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`."""
        return {
            "arms": {arm: self._arm(arm) for arm in self.history},
            "seeds": list(self.spec.seeds),
            "differences": [{**vars(item), "significant": item.significant} for item in self.differences],
            "chosen": self.chosen,
            "student": self.spec.student.model,
            "train": self.spec.train.model_dump(mode="json"),
        }

    def _arm(self, arm: str) -> dict[str, Any]:
        measured = {measure: self.values(measure, arm) for measure in self.measures}
        summary = {name: {"mean": statistics.fmean(v), "std": statistics.stdev(v)} for name, v in measured.items()}
        return {**measured, **summary["accuracy"], "summary": summary, "history": self.history[arm]}


def difference(
    arm: str, values: Sequence[float], against: str, others: Sequence[float], measure: str = "accuracy"
) -> Difference:
    """The paired mean difference with its 95 % interval (Student's t, n − 1 degrees of freedom)."""
    pairs = [value - other for value, other in zip(values, others, strict=True)]
    mean = statistics.fmean(pairs)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    reach = float(student_t.ppf(0.975, len(pairs) - 1)) * error
    # Rounding alone makes equal differences unequal by this.
    spread = max(pairs) - min(pairs) > 1e-12 * max(map(abs, (*values, *others)), default=0.0)
    return Difference(arm, against, measure, mean, mean - reach, mean + reach, spread)
