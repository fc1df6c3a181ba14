"""Students have the sizes of their papers, and unknown ones are refused."""

from __future__ import annotations

import pytest
import torch

from student_train.recipes import StudentSpec
from student_train.students import open_student, resnet20_cifar, resnet56_cifar
from teacher_cache.errors import SpecError


@pytest.mark.parametrize(
    ("factory", "layers", "parameters"), [(resnet20_cifar, 20, 269_722), (resnet56_cifar, 56, 853_018)]
)
def test_cifar_resnets_have_the_sizes_of_the_paper(factory: type, layers: int, parameters: int) -> None:
    """He et al. 2015, table 6: 0.27 M and 0.85 M; layers with weights: convolutions and the head."""
    model = factory()
    assert sum(value.numel() for value in model.parameters()) == parameters
    weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == layers
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("model", "arguments", "channels"),
    [("small_cnn", {"width": 4}, 1), ("resnet20_cifar", {"width": 8}, 3), ("torchvision:resnet18", {}, 3)],
)
def test_students_answer_for_the_classes(model: str, arguments: dict[str, int], channels: int) -> None:
    student = open_student(StudentSpec(model=model, arguments=arguments), 7, channels, seed=0).eval()
    assert student(torch.zeros(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (StudentSpec(model="torchvision:resnet19"), "resnet19"),
        (StudentSpec(model="nowhere:net"), "nowhere:net"),
        (StudentSpec(model="small_cnn", arguments={"wdith": 4}), "wdith"),
        (StudentSpec(model="torch:is_tensor"), r"student\.arguments"),
        (StudentSpec(model="builtins:dict"), "nn.Module"),
    ],
)
def test_impossible_students_are_refused(spec: StudentSpec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        open_student(spec, 10, 3, seed=0)
