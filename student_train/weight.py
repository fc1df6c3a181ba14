"""Step 9, weight: how much a term counts, always or as training goes on."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from teacher_cache.errors import SpecError


@dataclass(frozen=True)
class Schedule:
    """A weight that follows straight lines between points of a run.

    Soft targets that are given up half-way (Cho and Hariharan, "On the efficacy of knowledge distillation", 2019,
    section 4.2) are `Schedule(((0, 1), (0.5, 1), (0.5, 0)))`.
    """

    points: tuple[tuple[float, float], ...]
    """(progress, weight): progress is the share of all steps that are done, 0..1. Before the first point its weight
    holds, behind the last one that one's; of two points at one place the second holds from there on."""

    def __post_init__(self) -> None:
        hint = "For example ((0, 1), (0.5, 1), (0.5, 0)): given up half-way."
        if not self.points:
            raise SpecError("weight", "needs at least one point", self.points, hint)
        places = [place for place, _ in self.points]
        if any(not 0 <= place <= 1 for place in places) or any(b < a for a, b in pairwise(places)):
            raise SpecError("weight", "must have its points in the order of progress, within 0..1", self.points, hint)
        weights = [weight for _, weight in self.points]
        if any(not (weight >= 0 and math.isfinite(weight)) for weight in weights) or not any(weights):
            rule = "must have weights of at least 0, one of them above"
            raise SpecError("weight", rule, self.points, hint)

    def at(self, progress: float) -> float:
        """The weight when so much of the run is done."""
        behind = bisect_right([place for place, _ in self.points], progress)
        if behind in (0, len(self.points)):
            return self.points[0 if behind == 0 else -1][1]
        (left, before), (right, after) = self.points[behind - 1], self.points[behind]
        return before + (after - before) * (progress - left) / (right - left)


Weight = float | Schedule


def weight_at(weight: Weight, progress: float) -> float:
    """What a term counts when so much of the run is done, 0..1."""
    return weight.at(progress) if isinstance(weight, Schedule) else weight


def require_weight(name: str, weight: Weight) -> None:
    """Refuses a plain weight that is not above 0; a schedule has looked at its own."""
    if not isinstance(weight, Schedule) and not (weight > 0 and math.isfinite(weight)):
        raise SpecError(f"{name}.weight", "must be above 0", weight, "Choose another value, or leave the term out.")
