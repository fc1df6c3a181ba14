"""Step 3, teacher: a frozen model, uint8 views to named fields, with a fingerprint."""

from __future__ import annotations

import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import nn

from teacher_cache.errors import TeacherError
from teacher_cache.fingerprint import bytes_digest
from teacher_cache.imports import import_attribute, timm_model, torchvision_model
from teacher_cache.spec import NormalizeSpec, TeacherSpec
from teacher_cache.teachers.base import RemoteTeacher, Teacher, ViewNames, ask_whole, begin_whole
from teacher_cache.teachers.exported import ExportedModule
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.teachers.weights import load_into, state_digest

__all__ = [
    "RemoteTeacher",
    "Teacher",
    "TorchTeacher",
    "ViewNames",
    "ask_whole",
    "begin_whole",
    "load_teacher",
    "resolve_device",
    "with_kept_answers",
]


def resolve_device(device: str) -> str:
    """`auto` to `cuda` where there is a GPU, else `cpu`; `cuda` without one is refused."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise TeacherError("compute.device", "needs a GPU that torch can use", device, "Set it to auto or cpu.")
    return ("cuda" if available else "cpu") if device == "auto" else device


def load_teacher(spec: TeacherSpec, normalize: NormalizeSpec | None, device: str = "cpu") -> Teacher:
    """Loads the teacher that a configuration names.

    Args:
        spec: model reference, weights, fields, precision.
        normalize: the recipe's normalisation, used where the teacher gives none of its own.
        device: `cpu` or `cuda`.

    Raises:
        TeacherError: the model is unknown, the weights do not fit, or a field names no node.
    """
    scheme = spec.model.split("://")[0] if "://" in spec.model else None
    if scheme is not None:
        return _plugged_in(scheme, spec, normalize)
    module, identity = _load_module(spec)
    return TorchTeacher(
        module,
        {"model": identity, "arguments": spec.arguments, "class_names": spec.class_names},
        spec.fields,
        normalize=spec.normalize or normalize,
        precision=spec.precision,
        channels_last=spec.channels_last,
        device=device,
    )


def _plugged_in(scheme: str, spec: TeacherSpec, normalize: NormalizeSpec | None) -> Teacher:
    """A teacher behind a URL: whichever installed package serves that scheme (entry points)."""
    for entry in entry_points(group="teacher_cache.teachers", name=scheme):
        teacher: Teacher = entry.load()(spec, normalize)
        return teacher
    hint = "Install the package that provides it."
    raise TeacherError("teacher.model", f"no installed package opens {scheme}://", spec.model, hint)


def with_kept_answers(teacher: Teacher, spec: TeacherSpec, device: str, threads: int) -> Teacher:
    """A teacher of this process that takes what a service has computed from its journal (`teacher.journal`).

    Raises:
        TeacherError: no installed package reads such journals, or there is none in that folder.
    """
    for entry in entry_points(group="teacher_cache.journals", name="teacher-serve"):
        adopting: Teacher = entry.load()(teacher, spec, device, threads)
        return adopting
    hint = "Install the package that provides it, or leave the journal out."
    raise TeacherError("teacher.journal", "no installed package reads it", spec.journal, hint)


def _load_module(spec: TeacherSpec) -> tuple[nn.Module, dict[str, Any]]:
    if spec.model.endswith(".pt2"):
        return _exported(spec)
    kind, _, name = spec.model.partition(":")
    if kind == "torchvision":
        module = _called(lambda **arguments: torchvision_model(name, arguments, "teacher.model"), spec)
    elif kind == "timm":
        module = _called(lambda **arguments: timm_model(name, arguments, "teacher.model"), spec)
    else:
        module = _called(import_attribute(spec.model, "teacher.model"), spec)
    if spec.weights is not None:
        load_into(module, spec.weights)
    module.eval()
    return module, {"reference": spec.model, "state": state_digest(module)}


def _called(factory: Any, spec: TeacherSpec) -> nn.Module:
    try:
        module = factory(**spec.arguments)
    except TypeError as error:
        raise TeacherError("teacher.arguments", str(error), spec.arguments, "Check their names.") from error
    if not isinstance(module, nn.Module):
        rule = "must give an nn.Module when called"
        raise TeacherError("teacher.model", rule, type(module).__name__, "Name a class or a factory.")
    return module


def _exported(spec: TeacherSpec) -> tuple[nn.Module, dict[str, Any]]:
    if spec.weights or spec.arguments:
        hint = "Remove `weights` and `arguments`: the program holds both."
        raise TeacherError("teacher.model", "a .pt2 program is complete in itself", spec.model, hint)
    if not Path(spec.model).is_file():
        raise TeacherError("teacher.model", "must be a file", spec.model, "Check the path.")
    try:
        program = torch.export.load(spec.model)
    except (RuntimeError, zipfile.BadZipFile, OSError, ValueError) as error:
        hint = "Write it with torch.export.save."
        raise TeacherError("teacher.model", f"cannot be read: {error}", spec.model, hint) from error
    identity = {"reference": "torch.export", "state": bytes_digest(Path(spec.model).read_bytes())}
    return ExportedModule(program), identity
