"""Students have the sizes of their papers and compute what they should; unknown ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from student_train import CrossEntropy, Objective, Taps, TrainSpec, ViewStream, fit
from student_train.data import LabelledRows
from student_train.recipes import StudentSpec
from student_train.students import densenet121, open_student, resnet18, resnet20_cifar, resnet56_cifar, vgg16
from teacher_cache.errors import SpecError
from teacher_cache.spec import NumpySource, TeacherSpec, ViewSpec
from teacher_cache.teachers import load_teacher

VIT = StudentSpec(model="timm:vit_tiny_patch16_224", arguments={"img_size": 32, "patch_size": 4, "depth": 6})
"""A ViT for images of CIFAR's size: 64 patches of 4×4, six blocks 192 wide with three heads."""


def images(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))


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
    ("model", "arguments", "layers", "weights"),
    [
        ("vgg16", {}, 16, 15_239_872),
        ("vgg16", {"width": 32}, 16, 3_811_680),
        ("resnet18", {}, 18 + 3, 11_164_352),
        ("resnet18", {"width": 32}, 18 + 3, 2_792_800),
        ("densenet121", {}, 121, 6_880_448),
        ("densenet121", {"growth": 16}, 121, 1_725_024),
    ],
)
def test_teachers_and_their_halves_have_their_weights(
    model: str, arguments: dict[str, int], layers: int, weights: int
) -> None:
    """Of convolutions and linear layers; the ResNet's three projections are not among its 18."""
    student = open_student(StudentSpec(model=model, arguments=arguments), 10, 3, seed=0)
    weighted = [module for module in student.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == layers
    assert sum(module.weight.numel() for module in weighted) == weights


def torchvision_vgg16() -> nn.Module:
    theirs = models.vgg16_bn(num_classes=10)
    theirs.avgpool = nn.AdaptiveAvgPool2d(1)
    theirs.classifier[0], theirs.classifier[3] = nn.Linear(512, 512), nn.Linear(512, 512)
    theirs.classifier[6] = nn.Linear(512, 10)
    return theirs


def torchvision_resnet18() -> nn.Module:
    theirs = models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return theirs


def torchvision_densenet121() -> nn.Module:
    return models.densenet121(num_classes=10)


@pytest.mark.parametrize(
    ("factory", "reference", "sides"),
    [
        (vgg16, torchvision_vgg16, (32, 64)),
        (resnet18, torchvision_resnet18, (8, 32)),
        (densenet121, torchvision_densenet121, (29, 64)),
    ],
)
def test_they_compute_what_torchvisions_do(
    factory: Callable[[], nn.Module], reference: Callable[[], nn.Module], sides: tuple[int, ...]
) -> None:
    """Given the same weights, by the same names, and as a teacher runs them: the maps between are right too."""
    torch.manual_seed(0)
    ours, theirs = factory(), reference()
    ours.load_state_dict(theirs.state_dict())
    for side in sides:
        # One pass in training mode gives the batch norms figures of their own.
        with torch.no_grad():
            torch.manual_seed(1)
            learnt = ours.train()(images(side))
            torch.manual_seed(1)
            torch.testing.assert_close(learnt, theirs.train()(images(side)), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(ours.eval()(images(side)), theirs.eval()(images(side)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factory", [vgg16, resnet18, densenet121])
def test_weights_begin_as_they_should(factory: Callable[..., nn.Module]) -> None:
    """He et al. 2015, equation 14: √(2 / (outputs · area)); no convolution begins with a bias."""
    torch.manual_seed(0)
    for module in factory(**{"growth": 16} if factory is densenet121 else {"width": 32}).modules():
        if isinstance(module, nn.Conv2d):
            outputs, _, height, width = module.weight.shape
            assert float(module.weight.detach().std()) == pytest.approx(
                (2 / (outputs * height * width)) ** 0.5, rel=0.1
            )
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(
    ("model", "arguments", "channels"),
    [
        ("small_cnn", {"width": 4}, 1),
        ("resnet20_cifar", {"width": 8}, 3),
        ("resnet18", {"width": 4}, 1),
        ("vgg16", {"width": 4}, 4),
        ("densenet121", {"growth": 2}, 1),
        ("student_train.students:resnet18", {"width": 4}, 1),
        ("torchvision:resnet18", {}, 3),
        ("torchvision:mobilenet_v2", {"width_mult": 0.25}, 3),
        ("timm:mobilenetv3_small_050", {}, 1),
        ("timm:test_vit", {"img_size": 32, "patch_size": 8, "embed_dim": 32}, 1),
    ],
)
def test_students_answer_for_the_classes(model: str, arguments: dict[str, Any], channels: int) -> None:
    student = open_student(StudentSpec(model=model, arguments=arguments), 7, channels, seed=0).eval()
    with torch.no_grad():
        assert student(torch.zeros(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("model", ["torchvision:mobilenet_v2", "timm:mobilenetv3_small_050", "resnet18"])
def test_equal_seeds_give_equal_weights(model: str) -> None:
    before = torch.get_rng_state()
    a, b, c = (open_student(StudentSpec(model=model), 3, 3, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    assert torch.equal(before, torch.get_rng_state())


def test_widths_are_the_models_own() -> None:
    """What makes a model of torchvision or timm narrower is called as they call it."""
    for whole, narrow in (
        (StudentSpec(model="torchvision:mobilenet_v2"), {"width_mult": 0.25}),
        (VIT, {**VIT.arguments, "embed_dim": 96}),
    ):
        specs = (whole, StudentSpec(model=whole.model, arguments=narrow))
        sizes = [sum(value.numel() for value in open_student(spec, 10, 3, 0).parameters()) for spec in specs]
        assert sizes[1] < sizes[0] / 2


def test_a_vit_for_small_images_takes_a_step(tmp_path: Path) -> None:
    generator = np.random.Generator(np.random.Philox(5))
    np.save(tmp_path / "x.npy", generator.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    np.save(tmp_path / "y.npy", np.arange(8))
    source = {"kind": "numpy", "images": str(tmp_path / "x.npy"), "labels": str(tmp_path / "y.npy")}
    rows = LabelledRows(NumpySource.model_validate(source), ViewSpec.model_validate({"recipe": []}))
    student = open_student(VIT, 10, 3, seed=0)
    assert sum(value.numel() for value in student.parameters()) == 2_693_578
    before = {name: value.clone() for name, value in student.named_parameters()}
    told = TrainSpec(epochs=2, batch_size=8, optimizer="adamw", lr=1e-3, schedule="constant", device="cpu")
    history = fit(student, ViewStream(rows, batch_size=8, fields=()), Objective([CrossEntropy()]), told).history
    assert all(not torch.equal(value, before[name]) for name, value in student.named_parameters())
    assert history[1]["loss"] < history[0]["loss"]


def test_they_serve_as_teachers() -> None:
    """By `module:attribute`, with the weights that the student of that name was trained to."""
    spec = TeacherSpec(model="student_train.students:resnet18", arguments={"width": 4, "classes": 3})
    torch.manual_seed(0)
    teacher = load_teacher(spec, None)
    views = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    expected = resnet18(classes=3, width=4).eval()(views / 255).detach()
    torch.testing.assert_close(teacher(views)["logits"], expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (StudentSpec(model="torchvision:resnet19"), "resnet19.*Did you mean `resnet18`"),
        (StudentSpec(model="torchvision:fcn_resnet50"), "no classification model"),
        (StudentSpec(model="timm:vit_tny_patch16_224"), "not a timm model.*Did you mean `vit_tiny_patch16_224`"),
        (StudentSpec(model="smal_cnn"), "must be one of small_cnn, .*Did you mean `small_cnn`"),
        (StudentSpec(model="open_student"), "must be one of"),
        (StudentSpec(model="timm"), "must be one of"),
        (StudentSpec(model="nowhere:net"), "nowhere:net"),
        (StudentSpec(model="small_cnn", arguments={"wdith": 4}), "wdith"),
        (StudentSpec(model="timm:test_vit", arguments={"wdith": 4}), r"student\.arguments.*wdith"),
        (StudentSpec(model="timm:test_vit", arguments={"embed_dim": 63}), r"student\.arguments.*divisible"),
        (
            StudentSpec(model="torchvision:resnet18", arguments={"width_per_group": 32}),
            r"student\.arguments.*base_width",
        ),
        (StudentSpec(model="resnet18", arguments={"width": 0.5}), r"arguments\.width: must be a whole.*32 half of it"),
        (StudentSpec(model="vgg16", arguments={"width": 0}), r"arguments\.width: must be a whole number"),
        (StudentSpec(model="densenet121", arguments={"growth": -1}), r"arguments\.growth: must be a whole.*16 half"),
        (StudentSpec(model="torch:is_tensor"), r"student\.arguments"),
        (StudentSpec(model="builtins:dict"), "nn.Module"),
    ],
)
def test_impossible_students_are_refused(spec: StudentSpec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        open_student(spec, 10, 3, seed=0)


def test_a_student_with_two_heads_is_refused() -> None:
    """As torchvision's Inception is while training: a loss of a tuple would fail without saying why."""

    class Pair(nn.Module):
        def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images_BCHW, images_BCHW

    with Taps(Pair(), []) as answer, pytest.raises(SpecError, match=r"student\.model: must answer one tensor.*tuple"):
        answer(images())


def test_torchvision_has_three_channels() -> None:
    """Said when the student is made, not by a convolution in the first step."""
    with pytest.raises(SpecError, match=r"student\.model: of torchvision takes images of 3 channels \(found: 1\)"):
        open_student(StudentSpec(model="torchvision:resnet18"), 10, 1, seed=0)
