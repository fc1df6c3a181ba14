"""What became of each item of a question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Status(IntEnum):
    """Travels as its number in a safetensors answer (`status`, U8), and as its name in lower case in JSON."""

    CACHED = 0
    """Read from the cache."""
    KEPT = 1
    """Read from the service's journal: computed before."""
    COMPUTED = 2
    """Computed for this question, or for the same question of somebody else at this moment."""
    ABSENT = 3
    """Not answered: neither in the cache nor in the journal, and nothing else was to be asked."""
    UNKNOWN = 4
    """Not answered: the data set has no such sample, or its recipe no such view."""
    BROKEN = 5
    """Not answered: the file, or the sample when the cache was built or now, cannot be decoded."""
    DIFFERS = 6
    """Not answered: the view has other pixels than the digest that came with the question."""
    FAILED = 7
    """Not answered: the teacher fails on this image, and on it alone."""

    @property
    def answered(self) -> bool:
        """Whether there are values."""
        return self <= Status.COMPUTED

    @property
    def shown(self) -> str:
        """As JSON has it."""
        return self.name.lower()


@dataclass(frozen=True, eq=False)
class Part:
    """Answers to some items that came the same way."""

    places: Sequence[int]
    """Numbers of the items in the question."""
    tensors: dict[str, Tensor]
    """As they leave, one row for each place."""
    status: Status


@dataclass(frozen=True, eq=False)
class Question:
    """What the model is to be asked: at most a micro-batch."""

    images_BCHW: Tensor
    """uint8."""
    places: Sequence[int]
    """Numbers of the items that are wanted."""
    rows: Sequence[int]
    """Where each of them is among the images."""
    identity: bytes
    """Names the images, in their order."""


@dataclass(frozen=True, eq=False)
class Plan:
    """How a question will be answered."""

    items: int
    parts: Sequence[Part]
    """What is there already."""
    questions: Sequence[Question]
    """For what is to be computed."""
    unanswered: dict[int, Status]
    """Why the other items will have no values."""
    encodings: dict[str, str]
    """How each field was kept that is read from the cache."""


@dataclass(frozen=True, eq=False)
class Answer:
    """All items of a request."""

    tensors: dict[str, Tensor]
    """One row for each; of those without an answer NaN, or 0 where integers are."""
    status: list[Status]
    without: dict[int, Status]
    """Of the items that have none."""
    encodings: dict[str, str]
    """How the cache keeps the fields of which something was read."""

    @property
    def size(self) -> int:
        """As of `bytes_of`."""
        return bytes_of(self.tensors.values(), len(self.status))


def bytes_of(tensors: Iterable[Tensor], items: int) -> int:
    """What it takes to go over tensors, with a few bytes for each item."""
    return sum(value.nbytes for value in tensors) + 16 * items


def assembled(plan: Plan, parts: Sequence[Part], failed: Mapping[int, Status]) -> Answer:
    """An answer from its parts, and why there are none to the other items. Slow where there are thousands."""
    status = [failed.get(place, plan.unanswered.get(place, Status.ABSENT)) for place in range(plan.items)]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        index = torch.tensor(list(part.places), dtype=torch.int64)
        for name, value in part.tensors.items():
            if name not in tensors:
                filling = torch.nan if value.is_floating_point() else 0
                tensors[name] = torch.full((plan.items, *value.shape[1:]), filling, dtype=value.dtype)
            tensors[name][index] = value
        for place in part.places:
            status[place] = part.status
    without = {place: one for place, one in enumerate(status) if not one.answered}
    return Answer(tensors, status, without, plan.encodings)
