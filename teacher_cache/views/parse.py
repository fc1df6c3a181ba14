"""From the steps of a configuration to a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from teacher_cache.errors import SpecError
from teacher_cache.spec import NormalizeSpec
from teacher_cache.views.operations import OPERATIONS, Mix, Operation
from teacher_cache.views.recipe import Recipe


def parse_recipe(steps: Iterable[Mapping[str, Mapping[str, Any]]], seed: int) -> Recipe:
    """Builds a recipe from the steps of a configuration.

    Args:
        steps: one `{name: parameters}` mapping for each step; `normalize` may only come last.
        seed: 64-bit root seed.

    Raises:
        SpecError: an unknown operation or parameter, or a value that the operation refuses.
    """
    operations: list[Operation] = []
    normalize: NormalizeSpec | None = None
    for place, step in enumerate(steps):
        where = f"views.recipe.{place}"
        if len(step) != 1:
            raise SpecError(where, "must be one {name: parameters}", dict(step), "Write one operation a step.")
        ((name, arguments),) = step.items()
        if normalize is not None:
            raise SpecError(where, "nothing may follow `normalize`", name, "Move `normalize` to the end.")
        if name == "normalize":
            normalize = _normalize(where, arguments)
        elif name in OPERATIONS:
            operations.append(_operation(where, name, arguments))
            if sum(isinstance(operation, Mix) for operation in operations) > 1:
                raise SpecError(where, "mixes, and another step does too", name, "Keep one of them.")
        else:
            known = ", ".join([*OPERATIONS, "normalize"])
            raise SpecError(where, "is not a known operation", name, f"Use one of: {known}.")
    return Recipe(tuple(operations), seed, normalize)


def _normalize(where: str, arguments: Mapping[str, Any]) -> NormalizeSpec:
    try:
        return NormalizeSpec.model_validate(dict(arguments))
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise SpecError(f"{where}.normalize", message, dict(arguments), "Give mean and std.") from None


def _operation(where: str, name: str, arguments: Mapping[str, Any]) -> Operation:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    try:
        return OPERATIONS[name](**values)
    except (TypeError, ValueError) as error:
        hint = "Parameters have torchvision's names and defaults."
        raise SpecError(f"{where}.{name}", str(error), dict(arguments), hint) from None
