"""How a configuration names code: `module:attribute` for the user's own, a name for torchvision's and timm's models."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from teacher_cache.errors import SpecError


def import_attribute(reference: str, field: str) -> Any:
    """Imports `package.module:attribute`.

    Args:
        reference: the reference as written.
        field: the configuration's field, for the message.

    Raises:
        SpecError: it has no colon, the module cannot be imported, or it has no such attribute.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (colon and module_name and attribute):
        raise SpecError(field, "must be module:attribute", reference, "For example my_models:wide_net.")
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        hint = "Run from the folder that holds the module, or install it."
        raise SpecError(field, f"cannot be imported: {error}", reference, hint) from error
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names that are nearest, as a sentence with a space behind it; nothing where none is near."""
    near = difflib.get_close_matches(name, known)
    return f"Did you mean {' or '.join(f'`{one}`' for one in near)}? " if near else ""


def torchvision_model(name: str, arguments: Mapping[str, Any], field: str) -> nn.Module:
    """A classification model of `torchvision.models` by name, without weights unless the arguments ask for them.

    Args:
        name: `resnet18`.
        arguments: keyword arguments of its constructor.
        field: the configuration's field, for the message.

    Raises:
        SpecError: there is no such model.
        TypeError: it does not know an argument.
    """
    from torchvision import models

    # Detectors and the like answer no logits, and fetch weights for their backbones without being asked to.
    known = [*models.list_models(models), *models.list_models(models.quantization)]
    if name not in known:
        hint = f"{did_you_mean(name, known)}torchvision.models.list_models(torchvision.models) lists them."
        raise SpecError(field, "is no classification model of torchvision.models", name, hint)
    model: nn.Module = models.get_model(name, **{"weights": None, **arguments})
    return model


def timm_model(name: str, arguments: Mapping[str, Any], field: str) -> nn.Module:
    """A model of timm by name, without weights unless the arguments ask for them.

    Args:
        name: `vit_tiny_patch16_224`.
        arguments: keyword arguments of `timm.create_model`, and through it of the model.
        field: the configuration's field, for the message.

    Raises:
        SpecError: timm is not installed, or has no such model.
        TypeError: the model does not know an argument.
    """
    try:
        import timm
    except ImportError as error:
        hint = "Install the extra: pip install 'teacher-cache[timm]'."
        raise SpecError(field, "`timm:` needs the package timm", error, hint) from error
    if not timm.is_model(name):
        hint = f"{did_you_mean(name, timm.list_models())}timm.list_models() lists them."
        raise SpecError(field, "is not a timm model", name, hint)
    model: nn.Module = timm.create_model(name, **arguments)
    return model
