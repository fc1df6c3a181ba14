"""Native operations: torchvision's names, parameters, defaults and pixels; our own drawing of parameters."""

from __future__ import annotations

from collections.abc import Callable

from teacher_cache.views.operations.auto_augment import RandAugment, TrivialAugmentWide
from teacher_cache.views.operations.base import Images, Operation, Params, Sizes
from teacher_cache.views.operations.color_jitter import ColorJitter
from teacher_cache.views.operations.crops import CenterCrop, HorizontalFlip, PadCrop, Resize
from teacher_cache.views.operations.mix import CutMix, Mix, MixUp
from teacher_cache.views.operations.random_erasing import RandomErasing
from teacher_cache.views.operations.resized_crop import RandomResizedCrop

__all__ = [
    "OPERATIONS",
    "CenterCrop",
    "ColorJitter",
    "CutMix",
    "HorizontalFlip",
    "Images",
    "Mix",
    "MixUp",
    "Operation",
    "PadCrop",
    "Params",
    "RandAugment",
    "RandomErasing",
    "RandomResizedCrop",
    "Resize",
    "Sizes",
    "TrivialAugmentWide",
]

OPERATIONS: dict[str, Callable[..., Operation]] = {
    "resize": Resize,
    "center_crop": CenterCrop,
    "pad_crop": PadCrop,
    "random_resized_crop": RandomResizedCrop,
    "horizontal_flip": HorizontalFlip,
    "color_jitter": ColorJitter,
    "rand_augment": RandAugment,
    "trivial_augment": TrivialAugmentWide,
    "random_erasing": RandomErasing,
    "mixup": MixUp,
    "cutmix": CutMix,
}
"""The names that a recipe may use, beside `normalize`, which is not an operation on pixels."""
