"""Step 10, running: all that a run changes as it goes on, and so all that a checkpoint keeps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from student_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from student_train.objective import Objective
from student_train.optimizing import Stepper
from student_train.stream import ViewStream
from student_train.together import World
from teacher_cache.errors import SpecError
from teacher_cache.storage import write_atomic

METRICS = "metrics.jsonl"


@dataclass(frozen=True, eq=False)
class Running:
    """One run, of one process or of several."""

    student: nn.Module
    objective: Objective
    stepper: Stepper
    stream: ViewStream
    together: World
    folder: Path | None
    """Where its checkpoint is; None where none is kept."""
    run: str
    """Names the configuration."""

    def resume(self) -> list[dict[str, float]]:
        """Goes on where the folder's checkpoint was taken; the epochs that are done.

        Raises:
            SpecError: there is none, and the stream is not at its beginning.
            MismatchError: it belongs to a run with another configuration.
        """
        # The first process's folder counts: on another machine there may be none.
        mine = self.folder if self.together.first else None
        found = self.together.told(None if mine is None else load_checkpoint(mine, self.run))
        if found is None:
            if (self.stream.epoch, self.stream.step) != (0, 0):
                hint = "Open another stream for each run."
                place = f"epoch {self.stream.epoch}, step {self.stream.step}"
                raise SpecError("stream", "must be at its beginning where a run begins", place, hint)
            return []
        self.student.load_state_dict(found.student)
        self.objective.load_state_dict(found.objective)
        self.stepper.load_state_dict(vars(found))
        self.stream.load_state_dict(found.stream)
        if self.together.first:
            torch.set_rng_state(found.generator)
            if found.cuda_generator is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(found.cuda_generator)
        if mine is not None:
            # A run that was killed between the checkpoint and these lines has one too few.
            _write_metrics(mine, found.history)
        return list(found.history)

    def keep(self, history: list[dict[str, float]]) -> None:
        """Replaces the checkpoint; the first process does it for all.

        Raises:
            NonFiniteError: a weight is NaN or infinite: nothing is replaced.
        """
        self.stepper.require_finite()
        if self.folder is None or not self.together.first:
            return
        checkpoint = Checkpoint(
            student=self.student.state_dict(),
            objective=self.objective.state_dict(),
            stream=self.stream.state_dict(),
            **self.stepper.state_dict(),
            history=history,
            run=self.run,
            generator=torch.get_rng_state(),
            cuda_generator=self.stepper.cuda_generator(),
        )
        save_checkpoint(self.folder, checkpoint)
        _write_metrics(self.folder, history)


def _write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    write_atomic(folder, METRICS, lines.encode())
