"""From a configuration to a trained student: what `student-train fit` does, and each cell of `compare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from pydantic.fields import FieldInfo
from torch import nn

from student_train.cached_rows import CachedRows, OwnViews
from student_train.checkpoint import save_model
from student_train.data import LabelledRows, Rows
from student_train.evaluate import accuracy
from student_train.recipes import DataSpec, RunSpec, TrainSpec
from student_train.stream import ViewStream
from student_train.students import open_student
from student_train.term_specs import TermSpec, open_objective
from student_train.train import FitResult, Log, fit, rehearse
from teacher_cache import Cache
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.fingerprint import fingerprint
from teacher_cache.teachers import resolve_device
from teacher_cache.teachers.weights import load_into


@dataclass(frozen=True)
class Opened:
    """The data of a configuration, opened once and used by every arm and seed."""

    train: Rows
    test: Rows


def open_data(spec: RunSpec) -> Opened:
    """Opens the training and the evaluation data.

    Raises:
        MismatchError: a class number does not mean the same in both.
    """
    train, test = _open_rows(spec.data), LabelledRows(spec.evaluate.source, spec.evaluate.views)
    _require_same_classes(train, test)
    return Opened(train, test)


def _require_same_classes(train: Rows, test: Rows) -> None:
    """A folder without one class numbers the others anew: measured by it, a good student would seem to know nothing."""
    ours, theirs, labels = train.class_names, test.class_names, test.labels
    if ours is not None and theirs is not None and ours != theirs:
        pairs = enumerate(zip_longest(ours, theirs))
        place, (expected, found) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        hint = "Evaluate on a source with the same class names in the same order."
        rule = f"must number the classes as the training data does, where {place} is {expected}"
        raise MismatchError("evaluate", rule, found, hint)
    classes = train.classes
    if classes is not None and labels is not None and len(labels) and int(labels.max()) >= classes:
        hint = "Evaluate on a source with the classes of the training data."
        rule = f"must have labels in 0..{classes - 1}, the training data's"
        raise MismatchError("evaluate", rule, int(labels.max()), hint)


def _open_rows(spec: DataSpec) -> Rows:
    if spec.cache is not None:
        # What is being added meanwhile has holes, into which an epoch would run.
        cache = Cache(spec.cache, spec.source, spec.maps, spec.copies, sealed=True)
        if spec.views is not None:
            return OwnViews(cache, spec.views)
        return CachedRows(cache, size=spec.size, tolerance=spec.tolerance)
    assert spec.source is not None, "the spec has checked it"
    assert spec.views is not None, "the spec has checked it"
    return LabelledRows(spec.source, spec.views)


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
    stream = open_stream(spec, opened, terms, seed)
    normalization = spec.normalize or opened.train.normalize
    device = resolve_device(spec.train.device)
    with torch.random.fork_rng(devices=[]), _threads(spec.train.threads):
        torch.manual_seed(seed)
        result = fit(
            student,
            stream,
            objective,
            spec.train,
            normalization=normalization,
            evaluate=lambda model: accuracy(model, opened.test, normalization, device),
            folder=folder,
            run=_run_fingerprint(spec, opened, terms, seed),
            log=log,
        )
    save_model(folder, student)
    return result


def rehearse_one(spec: RunSpec, opened: Opened, terms: tuple[TermSpec, ...], seed: int) -> None:
    """Says what `train_one` would refuse, and trains nothing."""
    student, stream = _student(spec, opened, seed), open_stream(spec, opened, terms, seed)
    rehearse(student, stream, open_objective(terms), spec.normalize or opened.train.normalize)


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
        workers=spec.train.workers,
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
        "train": {"workers", "device"},
        "arms": True,
        "seeds": True,
        "objective": True,
        "seed": True,
    }
    # Paths are not what data is: a cache that was built again for another teacher is other data.
    body = spec.model_dump(mode="json", exclude=excluded)
    body |= {"data": opened.train.fingerprint, "evaluate": opened.test.fingerprint}
    body["train"] = _without_later(body["train"], TrainSpec.model_fields)
    told = [_without_later(term.model_dump(mode="json"), type(term).model_fields) for term in terms]
    return fingerprint("run", 1, {**body, "terms": told, "seed": seed})


_LATER = {"milestones", "step_factor", "warmup", "clip_norm", "accumulate", "precision", "ema", "standardise"}
"""What runs of earlier releases could not be told: as long as it says nothing, such a run goes on."""


def _without_later(body: dict[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    def said(name: str, value: Any) -> bool:
        default = fields[name].default
        return name not in _LATER or value != (list(default) if isinstance(default, tuple) else default)

    return {name: value for name, value in body.items() if said(name, value)}


def evaluate_weights(spec: RunSpec, weights: Path) -> float:
    """Accuracy of a finished student's `model.safetensors` on the configuration's evaluation data."""
    opened = open_data(spec)
    student = _student(spec, opened, seed=0)
    load_into(student, str(weights))
    device = resolve_device(spec.train.device)
    return accuracy(student.to(device), opened.test, spec.normalize or opened.train.normalize, device)
