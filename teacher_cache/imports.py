"""`module:attribute` references: the only way in which a configuration names the user's own code."""

from __future__ import annotations

import importlib
from typing import Any

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
