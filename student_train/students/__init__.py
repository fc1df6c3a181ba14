"""Students: plain modules, images [B, C, H, W] to logits [B, classes]; nothing in them knows of distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from student_train.recipes import StudentSpec
from student_train.students.cifar_resnet import resnet20_cifar, resnet56_cifar
from student_train.students.densenet import densenet121
from student_train.students.resnet import resnet18
from student_train.students.small_cnn import small_cnn
from student_train.students.vgg import vgg16
from teacher_cache.errors import SpecError
from teacher_cache.imports import did_you_mean, import_attribute, timm_model, torchvision_model

__all__ = [
    "densenet121",
    "open_student",
    "resnet18",
    "resnet20_cifar",
    "resnet56_cifar",
    "small_cnn",
    "vgg16",
]

_OURS: tuple[Callable[..., nn.Module], ...] = (
    small_cnn,
    resnet20_cifar,
    resnet56_cifar,
    resnet18,
    vgg16,
    densenet121,
)
_REFUSALS = (TypeError, ValueError, KeyError, AssertionError)
"""What constructors raise at arguments that they do not know, or that do not go together."""


def open_student(spec: StudentSpec, classes: int, channels: int, seed: int) -> nn.Module:
    """Makes a student with seeded initial weights; torch's global generator is put back afterwards.

    Args:
        spec: which model; its arguments win over the two that follow.
        classes: outputs.
        channels: of the input (torchvision's models have 3).
        seed: equal seeds give equal weights.

    Raises:
        SpecError: an unknown model or argument, or images with other channels than the model can have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = _made(spec, classes, channels)
        except _REFUSALS as error:
            hint = "Check the names and values of the model's arguments."
            raise SpecError("student.arguments", str(error), spec.arguments, hint) from error
    if not isinstance(made, nn.Module):
        rule = "must give an nn.Module when called"
        raise SpecError("student.model", rule, type(made).__name__, "Name a class or a factory.")
    return made


def _made(spec: StudentSpec, classes: int, channels: int) -> Any:
    kind, colon, name = spec.model.partition(":")
    if colon and kind == "timm":
        arguments = {"num_classes": classes, "in_chans": channels, **spec.arguments}
        return timm_model(name, arguments, "student.model")
    if colon and kind == "torchvision":
        if channels != 3:
            hint = "Give the source `channels: 3`, or take a model of timm or one of ours."
            raise SpecError("student.model", "of torchvision takes images of 3 channels", channels, hint)
        return torchvision_model(name, {"num_classes": classes, **spec.arguments}, "student.model")
    factory = import_attribute(spec.model, "student.model") if colon else _ours(spec.model)
    return factory(**{"classes": classes, "channels": channels, **spec.arguments})


def _ours(name: str) -> Callable[..., nn.Module]:
    factories = {factory.__name__: factory for factory in _OURS}
    if name not in factories:
        hint = f"{did_you_mean(name, factories)}Others are torchvision:<name>, timm:<name> and module:attribute."
        raise SpecError("student.model", f"must be one of {', '.join(factories)}", name, hint)
    return factories[name]
