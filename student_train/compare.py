"""Several objectives, paired seeds: equal seeds share initial weights, order and views, so differences are paired."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from student_train.comparison import Comparison
from student_train.comparison_plot import picture
from student_train.opening import Opened, open_data
from student_train.recipes import ArmSpec, CompareSpec, RunSpec
from student_train.run import rehearse_one, train_one
from teacher_cache.storage import write_atomic

Progress = Callable[[str, int, dict[str, float]], None]
"""Called after each epoch with (arm, seed, entry)."""


def compare(spec: CompareSpec, progress: Progress | None = None) -> Comparison:
    """Trains every arm with every seed; finished cells are read from their checkpoints, not trained again.

    Writes `result.json` and `result.png` into the run's folder, and each cell into `<run>/<arm>/seed-<n>`.
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
    history: dict[str, list[list[dict[str, float]]]] = {arm: [] for arm in spec.arms}
    for seed in spec.seeds:
        for arm, run in arms.items():
            folder = Path(spec.run) / arm / f"seed-{seed}"
            log = (lambda entry, arm=arm, seed=seed: progress(arm, seed, entry)) if progress else None
            result = train_one(run, opened[arm], spec.arms[arm].objective, seed, folder, log)
            history[arm].append(result.history)
    comparison = Comparison(history, spec)
    write_atomic(Path(spec.run), "result.json", json.dumps(comparison.to_json(), allow_nan=False).encode())
    write_atomic(Path(spec.run), "result.png", picture(comparison))
    return comparison


def _of_arm(spec: CompareSpec, arm: ArmSpec) -> RunSpec:
    """The run as one arm trains it."""
    changes = {name: value for name in ("data", "normalize") if (value := getattr(arm, name)) is not None}
    return spec.model_copy(update=changes)
