"""A recipe: named operations with parameters, as data; the native way from (sample, view) to pixels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.fingerprint import fingerprint
from teacher_cache.spec import NormalizeSpec
from teacher_cache.views.drawing import Drawn, draw
from teacher_cache.views.operations import OPERATIONS, Images, Mix, Operation, Params, Sizes
from teacher_cache.views.partners import Pool
from teacher_cache.views.rendering import FASTEST, How, Mixed, render

RECIPE_VERSION = 1


class Columns(NamedTuple):
    """Where one operation's parameters are stored."""

    place: int
    """Of the operation in the recipe."""
    role: str
    """`own`; of a recipe that mixes also `partner` (the operation on the partner) and `identity`."""
    start: int
    stop: int


_IDENTITY = ("partner_low", "partner_high", "partner_view")


@dataclass(frozen=True)
class Recipe:
    """Operations on uint8 pixels, the seed that addresses them, and how the result is normalised.

    Thread-safe, picklable and deterministic: the view of (seed, sample, view number) is the same in any
    process, batch and order.
    """

    operations: tuple[Operation, ...]
    """Applied in this order; an operation's place is part of its random address. At most one mixes."""
    seed: int
    """64-bit root seed: the Philox key."""
    normalize: NormalizeSpec | None = None
    """What the teacher does after the view, and the student unless it says otherwise; not part of the view."""

    promise: ClassVar[str] = "native"

    @property
    def mixing(self) -> int | None:
        """The place of the operation that mixes, if there is one."""
        return next((place for place, operation in enumerate(self.operations) if isinstance(operation, Mix)), None)

    @cached_property
    def layout(self) -> tuple[Columns, ...]:
        """The stored columns of every operation, in the order in which they are stored."""
        layout: list[Columns] = []
        start = 0

        def add(place: int, role: str, count: int) -> None:
            nonlocal start
            layout.append(Columns(place, role, start, start + count))
            start += count

        for place, operation in enumerate(self.operations):
            if place == self.mixing:
                add(place, "identity", len(_IDENTITY))
                for earlier in range(place):
                    add(earlier, "partner", len(self.operations[earlier].params))
            add(place, "own", len(operation.params))
        return tuple(layout)

    def columns_of(self, params_BP: Params, place: int, role: str) -> Params:
        """The stored columns of one operation in one role (see `Columns`), a view of `params_BP`."""
        for columns in self.layout:
            if columns.place == place and columns.role == role:
                return params_BP[:, columns.start : columns.stop]
        raise AssertionError(f"operation {place} stores nothing as {role}")

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the stored parameters, `<place>.<operation>.<parameter>`; a partner's begin with `partner.`."""
        names: list[str] = []
        for place, role, _, _ in self.layout:
            stem = f"{place}.{operation_name(self.operations[place])}"
            prefix = "partner." if role == "partner" else ""
            params = _IDENTITY if role == "identity" else self.operations[place].params
            names += [f"{prefix}{stem}.{param}" for param in params]
        return tuple(names)

    @property
    def random(self) -> bool:
        """Whether two views of one sample can differ."""
        return any(operation.blocks for operation in self.operations)

    @property
    def rounds(self) -> bool:
        """Whether some pixels depend on how a processor or a release rounds."""
        return any(operation.rounds for operation in self.operations)

    @property
    def batched_from(self) -> int:
        """The first operation from which on all have a batched form: from there a batch may be on any device."""
        places = [place for place, operation in enumerate(self.operations) if not operation.batched]
        return places[-1] + 1 if places else 0

    @property
    def renderer(self) -> str:
        """How much of it works on whole batches, for people."""
        names = [f"{place} {operation_name(step)}" for place, step in enumerate(self.operations) if not step.batched]
        if not names:
            return "batched, on any device"
        tail = "" if self.batched_from == len(self.operations) else f"; batched from operation {self.batched_from} on"
        return f"image by image for {', '.join(names)}{tail}"

    def describe(self) -> list[dict[str, Any]]:
        """The recipe as it may be written in a YAML file, every default spelled out."""
        steps = [{operation_name(operation): _arguments(operation)} for operation in self.operations]
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

    def partners(self, params_BP: Params) -> NDArray[np.uint64] | None:
        """Key digests [B] of the partners that stored parameters name; None where the recipe does not mix."""
        if self.mixing is None:
            return None
        start = next(columns.start for columns in self.layout if columns.role == "identity")
        low, high = np.ascontiguousarray(params_BP[:, start : start + 2]).view(np.uint32).T.astype(np.uint64)
        digests: NDArray[np.uint64] = low | high << np.uint64(32)
        return digests

    def draw(self, digests_B: NDArray[np.uint64], sizes_B2: Sizes, view: int, pool: Pool | None = None) -> Drawn:
        """Draws every parameter of one view of many samples: see `drawing.draw`."""
        return draw(self, digests_B, sizes_B2, view, pool)

    def render(
        self, images: Images, params_BP: Params, partners: Images = (), how: How = FASTEST
    ) -> tuple[Images, Mixed | None]:
        """Decoded images and their parameters to uint8 views: see `rendering.render`."""
        return render(self, images, params_BP, partners, how)


def operation_name(operation: Operation) -> str:
    """The name that a configuration gives it."""
    return next(name for name, kind in OPERATIONS.items() if kind is type(operation))


def _arguments(operation: Operation) -> dict[str, Any]:
    """Every argument; one that was added later is left out at its default, so that older recipes keep their names."""
    fields = dataclasses.fields(operation)  # type: ignore[arg-type]
    values = {field.name: _alike(getattr(operation, field.name), field.default) for field in fields}
    added = {field.name for field in fields if field.metadata.get("added") and values[field.name] == field.default}
    return {name: value for name, value in values.items() if name not in added}


def _alike(value: Any, default: Any) -> Any:
    """The same number is the same recipe, however it was written: 1 is 1.0 where the default is a float."""
    if isinstance(default, tuple) and isinstance(value, tuple):
        return tuple(_alike(item, default[0]) for item in value)
    return float(value) if isinstance(default, float) and isinstance(value, int) else value
