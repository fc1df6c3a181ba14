"""Step 10, train: one flat loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from student_train.answer import Taps
from student_train.learner import Learner, deterministic, has_idle_parts
from student_train.metrics import Means, TimeSplit
from student_train.objective import Objective, Shapes
from student_train.optimizing import Stepper
from student_train.recipes import TrainSpec
from student_train.running import Running
from student_train.stream import ViewStream
from student_train.together import World, world
from teacher_cache.errors import SpecError
from teacher_cache.spec import NormalizeSpec
from teacher_cache.teachers import resolve_device
from teacher_cache.views import normalize

Log = Callable[[dict[str, float]], None]
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]


@dataclass(frozen=True)
class FitResult:
    """What a run leaves behind; the student itself is trained in place."""

    history: list[dict[str, float]]
    """One entry an epoch: `epoch`, `loss`, each term's value, `lr`, where the time went (`TimeSplit`),
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

    Where several processes have joined (`together.joining`), each calls this with the same student and a stream of
    its own share; gradients are averaged over them, the first one evaluates, writes and logs, and all end alike.
    What looks at a batch as a whole sees a process's own part: batch norm, and the terms that relate rows to each
    other (`dist`, `relations`, `similarity`). The queue of `seed` is that of all.

    Args:
        student: images to logits.
        stream: must carry the fields that the objective reads.
        objective: the weighted terms.
        train: optimiser, schedule, epochs. What it says of batches and workers is the stream's affair.
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
    together = world()
    _check(objective, stream, together)
    if folder is not None and not run:
        hint = "Name what decides the result, for example by a fingerprint of the configuration."
        raise SpecError("run", "must name the run where checkpoints are kept", run, hint)
    device, seed = torch.device(resolve_device(train.device)), torch.initial_seed()
    student.to(device)
    normalization = normalization or stream.data.normalize
    with objective.taps(student, compiled=train.compile) as answer, deterministic(train.deterministic):
        objective.join(_shapes(answer, objective, stream, normalization, device), device)
        learner = _parallel(together, Learner(student, answer, objective, normalization), objective, stream, device)
        stepper = Stepper(student, objective.parameters(), train, len(stream), device)
        running = Running(student, objective, stepper, stream, together, folder, run)
        history = running.resume()
        while stream.epoch < train.epochs:
            student.train()
            together.reseed(seed, stream.epoch)
            means, times = Means(), TimeSplit()
            for batch in times.timed(stream.on(device)):
                with stepper.autocast():
                    loss, values = learner(batch, stepper.progress)
                stepper.take(loss, batch.step)
                objective.remember(batch)
                means.add({"loss": loss.detach(), **values}, len(batch))
            entry = {"epoch": float(stream.epoch), **means.read(together, device), "lr": stepper.lr, **times.read()}
            if evaluate is not None:
                entry |= together.told(evaluate(stepper.averaged, stream.epoch) if together.first else {})
            history.append(entry)
            running.keep(history)
            if log is not None and together.first:
                log(entry)
        together.wait()
    student.load_state_dict(stepper.averaged.state_dict())
    together.share_buffers(student)
    return FitResult(history)


def _parallel(
    together: World, learner: Learner, objective: Objective, stream: ViewStream, device: torch.device
) -> nn.Module:
    """With gradients averaged over the processes; who asks for those of idle weights, too, would wait for them."""
    if together.size == 1:
        return learner
    idle = not objective.always or has_idle_parts(learner, stream.peek().to(device))
    return together.parallel(learner, idle)


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
    student: nn.Module,
    stream: ViewStream,
    objective: Objective,
    normalization: NormalizeSpec | None = None,
    *,
    compiled: bool = False,
) -> None:
    """Computes every term once for the stream's next batch, and learns nothing: what does not fit is said here.

    Args:
        student: a copy that is thrown away: batch norm sees a batch.
        stream: stays where it is.
        objective: is joined to the student, with other random numbers than a run draws.
        normalization: of the student's input; the recipe's where not given.
        compiled: whether the run will compile; nothing is compiled here.

    Raises:
        RequestError: fields, nodes, labels or targets are not what a term needs.
    """
    _check(objective, stream, world())
    normalization = normalization or stream.data.normalize
    batch = stream.peek()
    objective.require_compilable(compiled)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), objective.taps(student) as answer:
        objective.join(_shapes(answer, objective, stream, normalization, torch.device("cpu")))
        said = answer(normalize(batch.views_BCHW, normalization))
        objective.each(said, batch)


def _check(objective: Objective, stream: ViewStream, together: World) -> None:
    if stream.share != together.share:
        hint = "Open the stream with share=world().share."
        rule = f"must be {together.rank} of {together.size}, as this process is"
        raise SpecError("stream.share", rule, f"{stream.share.rank} of {stream.share.of}", hint)
    if objective.needs_labels and stream.data.labels is None:
        hint = "Leave `cross_entropy` out, or use a labelled source."
        raise SpecError("objective", "reads labels, and the data has none", "no labels", hint)
    missing = [field for field in objective.fields if field not in stream.fields]
    if missing:
        hint = f"Open the stream with fields={objective.fields}."
        raise SpecError("stream.fields", f"must carry {missing[0]}", stream.fields, hint)
