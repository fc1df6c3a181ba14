"""Step 10, train: one flat loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from student_train.answer import Taps
from student_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from student_train.objective import Objective, Shapes
from student_train.optimizing import Stepper
from student_train.recipes import TrainSpec
from student_train.stream import Batch, ViewStream
from teacher_cache.errors import NonFiniteError, SpecError
from teacher_cache.spec import NormalizeSpec
from teacher_cache.storage import write_atomic
from teacher_cache.teachers import resolve_device
from teacher_cache.views import normalize

Log = Callable[[dict[str, float]], None]
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]


@dataclass(frozen=True)
class FitResult:
    """What a run leaves behind; the student itself is trained in place."""

    history: list[dict[str, float]]
    """One entry an epoch: `epoch`, `loss`, each term's value, `lr`, `seconds`, `data_seconds`, `step_seconds`,
    and what an evaluation found."""


def fit(
    student: nn.Module,
    stream: ViewStream,
    objective: Objective,
    train: TrainSpec,
    *,
    normalization: NormalizeSpec | None = None,
    evaluate: Evaluate | None = None,
    folder: Path | None = None,
    run: str = "",
    log: Log | None = None,
) -> FitResult:
    """Trains a student, in place; where a running average of its weights is kept, it ends with that.

    Args:
        student: images to logits.
        stream: must carry the fields that the objective reads.
        objective: the weighted terms.
        train: optimiser, schedule, epochs.
        normalization: of the student's input; the recipe's where not given.
        evaluate: called after every epoch with the student and the epoch's number; what it finds is reported, never
            used for a choice.
        folder: where a checkpoint is kept after every epoch; a run that finds one goes on from it.
        run: names the configuration, so that another run's checkpoint is refused.
        log: called with each epoch's entry.

    Raises:
        SpecError: the objective reads labels or fields that the stream does not carry, or a node that the student
            has not.
        NonFiniteError: the loss became NaN or inf.
    """
    _check(objective, stream)
    if folder is not None and not run:
        hint = "Name what decides the result, for example by a fingerprint of the configuration."
        raise SpecError("run", "must name the run where checkpoints are kept", run, hint)
    device = torch.device(resolve_device(train.device))
    student.to(device)
    normalization = normalization or stream.data.normalize
    with objective.taps(student) as answer:
        objective.join(_shapes(answer, objective, stream, normalization, device), device)
        stepper = Stepper(student, objective.parameters(), train, len(stream), device)
        history = _resume(folder, run, student, objective, stepper, stream)
        while stream.epoch < train.epochs:
            student.train()
            sums, waited, started = _Sums(), 0.0, time.perf_counter()
            for batch, wait in _timed(stream):
                batch = batch.to(device)
                with stepper.autocast():
                    said = answer(normalize(batch.views_BCHW, normalization))
                    loss, values = objective(said, batch, stepper.progress)
                stepper.take(loss, batch.step)
                objective.remember(batch)
                sums.add({"loss": loss.detach(), **values}, len(batch))
                waited += wait
            seconds = time.perf_counter() - started
            entry: dict[str, float] = {"epoch": float(stream.epoch), **sums.means(), "lr": stepper.lr}
            entry |= {"seconds": seconds, "data_seconds": waited, "step_seconds": seconds - waited}
            if evaluate is not None:
                entry |= evaluate(stepper.averaged, stream.epoch)
            history.append(entry)
            _keep(folder, run, student, objective, stepper, stream, history)
            if log is not None:
                log(entry)
    student.load_state_dict(stepper.averaged.state_dict())
    return FitResult(history)


def _shapes(
    answer: Taps, objective: Objective, stream: ViewStream, normalization: NormalizeSpec | None, device: torch.device
) -> Shapes:
    """Of one row: what the student's nodes put out for the data's first, and what the cache holds of a field."""
    fields = {field: stream.data.shape_of(field) for field in objective.fields}
    if not objective.nodes and not objective.needs_inputs:
        return Shapes({}, fields)
    data, none = stream.data, np.empty(0, np.int64)
    views_BCHW = data.render(data.decode(data.alive[:1]), 0, none).views.pixels_BCHW.to(device)
    with torch.no_grad(), answer.evaluating():
        nodes = answer(normalize(views_BCHW, normalization)).nodes
    shapes = {node: tuple(value.shape[1:]) for node, value in nodes.items()}
    return Shapes(shapes, fields, tuple(views_BCHW.shape[1:]), normalization)


def rehearse(
    student: nn.Module, stream: ViewStream, objective: Objective, normalization: NormalizeSpec | None = None
) -> None:
    """Computes every term once for the stream's next batch, and learns nothing: what does not fit is said here.

    Args:
        student: a copy that is thrown away: batch norm sees a batch.
        stream: stays where it is.
        objective: is joined to the student, with other random numbers than a run draws.
        normalization: of the student's input; the recipe's where not given.

    Raises:
        RequestError: fields, nodes, labels or targets are not what a term needs.
    """
    _check(objective, stream)
    normalization = normalization or stream.data.normalize
    batch = stream.peek()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), objective.taps(student) as answer:
        objective.join(_shapes(answer, objective, stream, normalization, torch.device("cpu")))
        said = answer(normalize(batch.views_BCHW, normalization))
        objective.each(said, batch)


def _check(objective: Objective, stream: ViewStream) -> None:
    if objective.needs_labels and stream.data.labels is None:
        hint = "Leave `cross_entropy` out, or use a labelled source."
        raise SpecError("objective", "reads labels, and the data has none", "no labels", hint)
    missing = [field for field in objective.fields if field not in stream.fields]
    if missing:
        hint = f"Open the stream with fields={objective.fields}."
        raise SpecError("stream.fields", f"must carry {missing[0]}", stream.fields, hint)


def _timed(stream: ViewStream) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that were spent waiting for it."""
    batches, waiting = iter(stream), time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - waiting
        waiting = time.perf_counter()


class _Sums:
    """Running means over rows, kept on the device: reading one every step would wait for the GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: dict[str, int] = {}
        """Of each value its own: a term counts only in the rows for which it was computed."""

    def add(self, values: dict[str, torch.Tensor], rows: int) -> None:
        for name, value in values.items():
            self._rows[name] = self._rows.get(name, 0) + rows
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value * rows

    def means(self) -> dict[str, float]:
        means = {name: float(value) / self._rows[name] for name, value in self._sums.items()}
        if not math.isfinite(means["loss"]):
            hint = "Lower train.lr; the last checkpoint is from the epoch before."
            raise NonFiniteError("loss", "must stay finite", means["loss"], hint)
        return means


def _resume(
    folder: Path | None, run: str, student: nn.Module, objective: Objective, stepper: Stepper, stream: ViewStream
) -> list[dict[str, float]]:
    found = load_checkpoint(folder, run) if folder is not None else None
    if found is None:
        return []
    student.load_state_dict(found.student)
    objective.load_state_dict(found.objective)
    stepper.load_state_dict(vars(found))
    stream.load_state_dict(found.stream)
    torch.set_rng_state(found.generator)
    return list(found.history)


def _keep(
    folder: Path | None,
    run: str,
    student: nn.Module,
    objective: Objective,
    stepper: Stepper,
    stream: ViewStream,
    history: list[dict[str, float]],
) -> None:
    if folder is None:
        return
    states = {"student": student.state_dict(), "objective": objective.state_dict(), "stream": stream.state_dict()}
    checkpoint = Checkpoint(**states, **stepper.state_dict(), history=history, run=run, generator=torch.get_rng_state())
    save_checkpoint(folder, checkpoint)
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    write_atomic(folder, "metrics.jsonl", lines.encode())
