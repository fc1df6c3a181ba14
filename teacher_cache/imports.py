"""How a configuration names code: `module:attribute` for the user's own, a name for torchvision's models."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
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


def torchvision_model(name: str, arguments: Mapping[str, Any], field: str) -> nn.Module:
    """A model of `torchvision.models` by name, without weights unless the arguments ask for them.

    Args:
        name: `resnet18`.
        arguments: keyword arguments of its constructor.
        field: the configuration's field, for the message.

    Raises:
        SpecError: there is no such model.
        TypeError: it does not know an argument.
    """
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise SpecError(field, "is not in torchvision.models", name, "torchvision.models.list_models() lists them.")
    model: nn.Module = get_model(name, **{"weights": None, **arguments})
    return model
