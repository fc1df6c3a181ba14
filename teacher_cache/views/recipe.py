"""A recipe: named operations with parameters, as data; the native way from (sample, view) to pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from teacher_cache.errors import SpecError
from teacher_cache.fingerprint import fingerprint
from teacher_cache.spec import NormalizeSpec
from teacher_cache.views.operations import OPERATIONS, Operation, Params, Sizes
from teacher_cache.views.philox import view_words

RECIPE_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Operations on uint8 pixels, the seed that addresses them, and how the result is normalised.

    Thread-safe, picklable and deterministic: the view of (seed, sample, view number) is the same in any
    process, batch and order.
    """

    operations: tuple[Operation, ...]
    """Applied in this order; an operation's place is part of its random address."""
    seed: int
    """64-bit root seed: the Philox key."""
    normalize: NormalizeSpec | None = None
    """What the teacher does after the view, and the student unless it says otherwise; not part of the view."""

    promise: ClassVar[str] = "native"

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the stored parameters, `<place>.<operation>.<parameter>`."""
        return tuple(
            f"{place}.{_name(operation)}.{param}"
            for place, operation in enumerate(self.operations)
            for param in operation.params
        )

    @property
    def random(self) -> bool:
        """Whether two views of one sample can differ."""
        return any(operation.blocks for operation in self.operations)

    def describe(self) -> list[dict[str, Any]]:
        """The recipe as it may be written in a YAML file, every default spelled out."""
        steps = [{_name(operation): dataclasses.asdict(operation)} for operation in self.operations]  # type: ignore[call-overload]
        return [*steps, {"normalize": self.normalize.model_dump(mode="json")}] if self.normalize else steps

    @property
    def fingerprint(self) -> str:
        """Names everything in the recipe, normalisation and order of operations included."""
        return fingerprint("recipe", RECIPE_VERSION, {"steps": self.describe(), "seed": self.seed})

    @property
    def view_fingerprint(self) -> str:
        """Names the uint8 views only: what teacher and student must share."""
        steps = [step for step in self.describe() if "normalize" not in step]
        return fingerprint("view", RECIPE_VERSION, {"steps": steps, "seed": self.seed})

    def resolve(self, digests_B: NDArray[np.uint64], sizes_B2: Sizes, view: int) -> Params:
        """Draws every parameter of one view of many samples.

        Args:
            digests_B: uint64 [B], digests of the samples' keys.
            sizes_B2: int64 [B, 2], (height, width) of the decoded images.
            view: the view number.

        Returns:
            int32 [B, P], columns as in `param_names`.
        """
        drawn = []
        for place, operation in enumerate(self.operations):
            words = view_words(digests_B, view, place, operation.blocks, self.seed)
            drawn.append(operation.draw(words, sizes_B2))
            sizes_B2 = operation.output_sizes(sizes_B2)
        return np.concatenate([np.empty((len(digests_B), 0), np.int32), *drawn], axis=1)

    def render(self, image_CHW: Tensor, params_P: Sequence[int]) -> Tensor:
        """One decoded image and its resolved parameters to the uint8 view [C, H, W]."""
        start = 0
        for operation in self.operations:
            stop = start + len(operation.params)
            image_CHW = operation.apply(image_CHW, tuple(int(value) for value in params_P[start:stop]))
            start = stop
        return image_CHW


def _name(operation: Operation) -> str:
    return next(name for name, kind in OPERATIONS.items() if kind is type(operation))


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
