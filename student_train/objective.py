"""Step 9, objective: named weighted terms that declare what they read of the cache, and of the student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from student_train.answer import Answer, Taps
from student_train.stream import Batch
from student_train.weight import Schedule, Weight, weight_at
from teacher_cache.errors import SpecError
from teacher_cache.spec import NormalizeSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """Of one row: what a joint between student and teacher is built from."""

    nodes: Mapping[str, Shape]
    """What the student's tapped modules put out."""
    fields: Mapping[str, Shape]
    """The cached fields."""
    inputs: Shape = ()
    """The student's views, where a term differentiates at them."""
    normalization: NormalizeSpec | None = None
    """How they are normalised for the student."""


class Term(Protocol):
    """One part of an objective. It holds no state: what it trains or keeps is its joint, which the objective holds.

    Attributes:
        name: how it is called in logs.
        needs_labels: whether batches must have labels.
        needs_inputs: whether it differentiates at the student's input.
        weight: what its value is multiplied by.
        reads: the cached fields that it needs.
        nodes: the student's modules that it needs.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool]
    needs_inputs: ClassVar[bool]

    @property
    def weight(self) -> Weight: ...

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def nodes(self) -> tuple[str, ...]: ...

    def joint(self, shapes: Shapes, /) -> nn.Module | None:
        """What is trained or kept beside the student, such as a projection or a queue; None where nothing is."""

    def __call__(self, answer: Answer, batch: Batch, joint: nn.Module | None, progress: float, /) -> Tensor:
        """The unweighted value, a scalar, when so much of the run is done, 0..1."""

    def remember(self, batch: Batch, joint: nn.Module | None, /) -> None:
        """Takes into the joint what is kept of a batch that was trained on: called once for each, after its loss."""


Kept = TypeVar("Kept", bound=nn.Module)


def joined(joint: nn.Module | None, kind: type[Kept], name: str) -> Kept:
    """A term's joint, known for what it is.

    Raises:
        SpecError: the objective was not joined to a student.
    """
    if not isinstance(joint, kind):
        raise _not_joined(name)
    return joint


def _not_joined(name: str) -> SpecError:
    hint = "Call `objective.join(...)` before the first step; `fit` does."
    return SpecError(f"objective.{name}", "must be joined to the student first", "not joined", hint)


def _require_some_weight(terms: Sequence[Term]) -> None:
    """Refuses terms that all count nothing at some step: there would be nothing to learn from."""
    if not all(isinstance(term.weight, Schedule) for term in terms):
        return
    places = sorted({0.0, 1.0, *(p for term in terms for p, _ in cast(Schedule, term.weight).points)})
    # Between two points all weights are straight lines; the very end of a run is behind its last step.
    for place in (*places[:-1], *((left + right) / 2 for left, right in pairwise(places))):
        if not any(weight_at(term.weight, place) for term in terms):
            hint = "Let one of the terms count there, if only a little."
            raise SpecError("objective.weight", "must not be 0 of all terms at once", f"at progress {place:g}", hint)


class Objective:
    """A weighted sum of terms, and what is trained for it beside the student."""

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise SpecError("objective", "needs at least one term", "none", "For example cross_entropy.")
        self.terms = tuple(terms)
        _require_some_weight(self.terms)
        names = [term.name for term in self.terms]
        self._names = [f"{name}_{place}" if names.count(name) > 1 else name for place, name in enumerate(names)]
        self._joints: dict[str, nn.Module | None] | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The cached fields that some term reads: what a stream must carry."""
        return tuple(sorted({field for term in self.terms for field in term.reads}))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The student's modules that some term reads: what `Taps` must listen to."""
        return tuple(sorted({node for term in self.terms for node in term.nodes}))

    @property
    def needs_labels(self) -> bool:
        """Whether some term reads the labels."""
        return any(term.needs_labels for term in self.terms)

    @property
    def needs_inputs(self) -> bool:
        """Whether some term differentiates at the student's input: what `Taps` must keep."""
        return any(term.needs_inputs for term in self.terms)

    def taps(self, student: nn.Module, *, compiled: bool = False) -> Taps:
        """Listens to all that its terms read of a student.

        Raises:
            SpecError: the student has no such module; or a compiled pass would be differentiated twice.
        """
        self.require_compilable(compiled)
        return Taps(student, self.nodes, self.needs_inputs, compiled=compiled)

    def require_compilable(self, compiled: bool) -> None:
        """Refuses to compile what is differentiated twice."""
        if compiled and self.needs_inputs:
            hint = "Leave one of both out."
            raise SpecError("train.compile", "cannot be with a term that differentiates twice", "saliency", hint)

    def join(self, shapes: Shapes, device: torch.device | str = "cpu") -> None:
        """Builds what is trained beside the student; drawn from torch's global generator.

        Raises:
            SpecError: a node and a field do not fit each other.
        """
        joints = {name: term.joint(shapes) for name, term in zip(self._names, self.terms, strict=True)}
        self._joints = {name: None if joint is None else joint.to(device) for name, joint in joints.items()}

    @property
    def joints(self) -> list[nn.Module]:
        """What is trained or kept beside the student, and no part of it."""
        return [joint for joint in (self._joints or {}).values() if joint is not None]

    @property
    def always(self) -> bool:
        """Whether every term has a part in every step."""
        return not any(isinstance(term.weight, Schedule) for term in self.terms)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all joints; none of them is part of the student."""
        for joint in self.joints:
            yield from joint.parameters()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Of all joints, by term."""
        return {name: joint.state_dict() for name, joint in (self._joints or {}).items() if joint is not None}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes on where `state_dict` was taken; `join` comes first."""
        for name, joint in (self._joints or {}).items():
            if joint is not None:
                joint.load_state_dict(state[name])

    def __call__(
        self, answer: Answer | Tensor, batch: Batch, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term's own unweighted value (detached) for the logs, by name (`kd_1` of two).

        Args:
            answer: the student's; its logits alone are enough where no term reads more.
            batch: the data.
            progress: the share of all steps that are done, 0..1: scheduled weights follow it. A term whose weight
                is 0 is not computed.
        """
        answer = Answer(answer) if isinstance(answer, Tensor) else answer
        loss = torch.zeros((), device=answer.logits_BC.device)
        values: dict[str, Tensor] = {}
        for name, term in zip(self._names, self.terms, strict=True):
            weight = weight_at(term.weight, progress)
            if weight == 0:
                continue
            value = term(answer, batch, self._joint(name, term, answer), progress)
            loss = loss + weight * value
            values[name] = value.detach()
        return loss, values

    def remember(self, batch: Batch) -> None:
        """Lets each term keep what later batches are compared with: once for each batch that is trained on."""
        for name, term in zip(self._names, self.terms, strict=True):
            term.remember(batch, None if self._joints is None else self._joints[name])

    def each(self, answer: Answer, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """Each term's unweighted value, also of those that do not count at the moment."""
        terms = zip(self._names, self.terms, strict=True)
        return {name: term(answer, batch, self._joint(name, term, answer), progress) for name, term in terms}

    def _joint(self, name: str, term: Term, answer: Answer) -> nn.Module | None:
        missing = [node for node in term.nodes if node not in answer.nodes]
        if missing:
            hint = "Give the objective the answer of `objective.taps(student)`."
            raise SpecError(f"objective.{name}", "needs what a node of the student puts out", missing[0], hint)
        if term.needs_inputs and answer.inputs_BCHW is None:
            hint = "Give the objective the answer of `objective.taps(student)`."
            raise SpecError(f"objective.{name}", "needs what the student was shown", "an answer without", hint)
        if self._joints is None and term.nodes:
            raise _not_joined(name)
        return None if self._joints is None else self._joints[name]
