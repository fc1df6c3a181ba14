"""Students: plain modules, images [B, C, H, W] to logits [B, classes]; nothing in them knows of distillation."""

from __future__ import annotations

import torch
from torch import nn

from student_train.recipes import StudentSpec
from student_train.students.cifar_resnet import resnet20_cifar, resnet56_cifar
from student_train.students.small_cnn import small_cnn
from teacher_cache.errors import SpecError
from teacher_cache.imports import import_attribute, torchvision_model

__all__ = ["open_student", "resnet20_cifar", "resnet56_cifar", "small_cnn"]


def open_student(spec: StudentSpec, classes: int, channels: int, seed: int) -> nn.Module:
    """Makes a student with seeded initial weights; torch's global generator is put back afterwards.

    Args:
        spec: which model; its arguments win over the two that follow.
        classes: outputs.
        channels: of the input (torchvision models have 3).
        seed: equal seeds give equal weights.

    Raises:
        SpecError: an unknown model or argument.
    """
    kind, _, name = spec.model.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if kind == "torchvision":
                return torchvision_model(name, {"num_classes": classes, **spec.arguments}, "student.model")
            own = {"small_cnn": small_cnn, "resnet20_cifar": resnet20_cifar, "resnet56_cifar": resnet56_cifar}
            factory = own.get(spec.model) or import_attribute(spec.model, "student.model")
            made = factory(**{"classes": classes, "channels": channels, **spec.arguments})
        except TypeError as error:
            raise SpecError("student.arguments", str(error), spec.arguments, "Check their names.") from error
    if not isinstance(made, nn.Module):
        rule = "must give an nn.Module when called"
        raise SpecError("student.model", rule, type(made).__name__, "Name a class or a factory.")
    return made
