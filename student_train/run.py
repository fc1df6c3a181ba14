"""From a configuration to a trained student: what `student-train fit` does, and each cell of `compare`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic.fields import FieldInfo
from torch import nn

from student_train.board import require_board, write_board
from student_train.checkpoint import save_model
from student_train.evaluate import Measured, accuracy, measure
from student_train.opening import Opened, normalization_of, open_data
from student_train.recipes import RunSpec, TrainSpec
from student_train.running import METRICS
from student_train.stream import ViewStream
from student_train.students import open_student
from student_train.term_specs import TermSpec, open_objective
from student_train.together import world
from student_train.train import FitResult, Log, fit, rehearse
from teacher_cache.errors import NonFiniteError, SpecError
from teacher_cache.fingerprint import fingerprint
from teacher_cache.spec import NormalizeSpec
from teacher_cache.teachers import resolve_device
from teacher_cache.teachers.weights import load_into


def train_one(
    spec: RunSpec, opened: Opened, terms: tuple[TermSpec, ...], seed: int, folder: Path, log: Log | None = None
) -> FitResult:
    """Trains one student with one seed, going on from the folder's checkpoint if there is one.

    Args:
        spec: student, training, evaluation.
        opened: its data.
        terms: the objective.
        seed: of initial weights and order; equal seeds share both, whatever the objective.
        folder: gets `checkpoint.pt`, `metrics.jsonl` and `model.safetensors`.
        log: called with each epoch's entry.
    """
    student, objective = _student(spec, opened, seed), open_objective(terms)
    _prepare_board(spec, folder)
    stream = open_stream(spec, opened, terms, seed)
    normalization = normalization_of(spec, opened)
    device = resolve_device(spec.train.device)
    with torch.random.fork_rng(devices=[]), _threads(spec.train.threads):
        torch.manual_seed(seed)
        result = fit(
            student,
            stream,
            objective,
            spec.train,
            normalization=normalization,
            evaluate=partial(_evaluate, spec, opened, normalization, device),
            folder=folder,
            run=_run_fingerprint(spec, opened, terms, seed),
            log=partial(_log, spec, folder, log),
        )
    if world().first:
        save_model(folder, student)
    return result


def _prepare_board(spec: RunSpec, folder: Path) -> None:
    if not spec.tensorboard or not world().first:
        return
    require_board()
    lines = (folder / METRICS).read_text().splitlines() if (folder / METRICS).exists() else []
    if lines:
        # A run that was killed after its checkpoint may not have written its last epoch here.
        write_board(folder, json.loads(lines[-1]))


def _log(spec: RunSpec, folder: Path, log: Log | None, entry: dict[str, float]) -> None:
    if spec.tensorboard:
        write_board(folder, entry)
    if log is not None:
        log(entry)


def _evaluate(
    spec: RunSpec, opened: Opened, normalization: NormalizeSpec | None, device: str, model: nn.Module, epoch: int
) -> dict[str, float]:
    """After an epoch. Where rows are held out, the test data is not even looked at before the last one."""
    found: dict[str, float] = {}
    if opened.validation is not None:
        found["validation_accuracy"] = accuracy(model, opened.validation, normalization, device)
    if opened.validation is None or epoch == spec.train.epochs:
        found |= measure(model, opened.test, normalization, device, teacher=opened.teacher).named()
    for name, value in found.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"evaluate.{name}", "must be finite", value, "Lower train.lr.")
    return found


def rehearse_one(spec: RunSpec, opened: Opened, terms: tuple[TermSpec, ...], seed: int) -> None:
    """Says what `train_one` would refuse, and trains nothing."""
    student, stream = _student(spec, opened, seed), open_stream(spec, opened, terms, seed)
    rehearse(student, stream, open_objective(terms), normalization_of(spec, opened), compiled=spec.train.compile)


def open_stream(spec: RunSpec, opened: Opened, terms: tuple[TermSpec, ...], seed: int) -> ViewStream:
    """The stream that a run trains from; refuses what does not fit the data."""
    return ViewStream(
        opened.train,
        batch_size=spec.train.batch_size,
        fields=open_objective(terms).fields,
        seed=seed,
        drop_last=spec.train.drop_last,
        check_views=spec.train.check_views if opened.train.provable else None,
        views_per_decode=spec.train.views_per_decode,
        view_order=spec.train.view_order,
        workers=spec.train.workers,
        share=world().share,
        pin_memory=resolve_device(spec.train.device) == "cuda",
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _student(spec: RunSpec, opened: Opened, seed: int) -> nn.Module:
    classes = opened.train.classes
    if classes is None:
        hint = "Give the source class_names."
        raise SpecError("data", "must tell how many classes there are", None, hint)
    channels = opened.test.decode(opened.test.alive[:1]).images[0].shape[0]
    return open_student(spec.student, classes, channels, seed)


def _run_fingerprint(spec: RunSpec, opened: Opened, terms: tuple[TermSpec, ...], seed: int) -> str:
    # Workers and the device decide no batch: a run may go on elsewhere.
    excluded: Any = {
        "run": True,
        "tensorboard": True,
        "train": {"workers", "device"},
        "arms": True,
        "seeds": True,
        "objective": True,
        "seed": True,
    }
    # Paths are not what data is: a cache that was built again for another teacher is other data.
    body = spec.model_dump(mode="json", exclude=excluded)
    body |= {"data": opened.train.fingerprint, "evaluate": opened.test.fingerprint}
    if opened.teacher is not None:
        body["held_against"] = opened.teacher
    body = {name: value for name, value in body.items() if name != "validation" or value is not None}
    body["train"] = _without_later(body["train"], TrainSpec.model_fields)
    told = [_without_later(term.model_dump(mode="json"), type(term).model_fields) for term in terms]
    return fingerprint("run", 1, {**body, "terms": told, "seed": seed})


_LATER = {
    *("milestones", "step_factor", "warmup", "clip_norm", "accumulate", "precision", "ema", "standardise"),
    *("compile", "deterministic", "view_order"),
}
"""What runs of earlier releases could not be told: as long as it says nothing, such a run goes on."""


def _without_later(body: dict[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    def said(name: str, value: Any) -> bool:
        default = fields[name].default
        return name not in _LATER or value != (list(default) if isinstance(default, tuple) else default)

    return {name: value for name, value in body.items() if said(name, value)}


def evaluate_weights(spec: RunSpec, weights: Path) -> Measured:
    """What a finished student's `model.safetensors` does on the configuration's evaluation data."""
    opened = open_data(spec)
    student = _student(spec, opened, seed=0)
    load_into(student, str(weights))
    device = resolve_device(spec.train.device)
    return measure(student.to(device), opened.test, normalization_of(spec, opened), device, teacher=opened.teacher)
