"""The same views at another input size: a student of 160 pixels sees the crop that a teacher of 224 saw.

What the views show is decided by their stored parameters. Where the last operation that fixes the size can give
another one from the same parameters (`random_resized_crop`, `resize` to a pair), and every operation after it
can too, a student may render at its own size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from teacher_cache.errors import SpecError
from teacher_cache.views.operations import Operation, Params
from teacher_cache.views.operations.base import pair
from teacher_cache.views.recipe import Recipe, operation_name


@dataclass(frozen=True)
class Resized:
    """A recipe at a student's size."""

    recipe: Recipe
    """Renders at that size, from converted parameters."""
    place: int
    """Of the operation that fixes the size."""
    before: tuple[int, int]
    """(height, width) of the teacher's views after that operation."""
    after: tuple[int, int]
    """(height, width) of the student's."""

    def convert(self, params_BP: Params) -> Params:
        """Stored parameters to those of the student's size: lengths after `place` are scaled, all else stays."""
        columns = []
        for place, role, start, stop in self.recipe.layout:
            part = params_BP[:, start:stop]
            if place > self.place and role != "identity":
                scaled = self.recipe.operations[place].rescaled(part, self.before, self.after)
                assert scaled is not None, "the recipe was checked when it was resized"
                part = scaled
            columns.append(part)
        return np.concatenate(columns, axis=1)


def at_size(recipe: object, size: int | tuple[int, int]) -> Resized:
    """The recipe for a student's own input size.

    Args:
        recipe: a native recipe.
        size: (height, width), or one number for both.

    Raises:
        SpecError: the recipe does not allow it; the message names the operation that stands in the way.
    """
    try:
        after = pair("size", size)
    except ValueError as error:
        raise SpecError("size", str(error), size, "For example 160, or (160, 192).") from None
    if not isinstance(recipe, Recipe):
        hint = "A `seeded-global` callable has one output size: use native operations, or the teacher's size."
        raise SpecError("size", "needs native operations", after, hint)
    resizable = [place for place, operation in enumerate(recipe.operations) if operation.with_size(after) is not None]
    if not resizable:
        hint = "Use random_resized_crop, or resize to a pair (height, width)."
        raise SpecError("size", "needs a recipe with an operation that resizes to a fixed size", after, hint)
    place = resizable[-1]
    fixed = recipe.operations[place].output_sizes(np.array([[1, 1]]))[0]
    before = (int(fixed[0]), int(fixed[1]))
    for later in recipe.operations[place + 1 :]:
        if not _scales(later, before, after):
            hint = "Move it before the operation that resizes, or train at the teacher's size."
            rule = f"cannot be changed: {operation_name(later)} counts pixels of {before[0]}×{before[1]}"
            raise SpecError("size", rule, after, hint)
    resized = recipe.operations[place].with_size(after)
    assert resized is not None, "it was chosen for that"
    operations = (*recipe.operations[:place], resized, *recipe.operations[place + 1 :])
    return Resized(dataclasses.replace(recipe, operations=operations), place, before, after)


def _scales(operation: Operation, before: tuple[int, int], after: tuple[int, int]) -> bool:
    nothing = np.empty((0, len(operation.params)), np.int32)
    return operation.rescaled(nothing, before, after) is not None
