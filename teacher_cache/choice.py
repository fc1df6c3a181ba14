"""What is decided by looking at real answers: encodings that were left open, ranges, priors, and heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.calibrate import calibrate
from teacher_cache.encodings.calibration import Calibration
from teacher_cache.encodings.constants import Arrays, has_prior, needs_constants
from teacher_cache.encodings.feature_head import largest_difference
from teacher_cache.encodings.u8_channel import Ranges, channel_axis
from teacher_cache.errors import SourceError, TeacherError
from teacher_cache.loader import ViewLoader
from teacher_cache.spec import HEAD_INPUT, Auto, FeatureHead, FieldSpec, U8Channel, is_logits
from teacher_cache.teachers import Teacher, TorchTeacher, ask_whole
from teacher_cache.views.philox import view_words

ROWS = 256
_ADDRESS = 2**16 - 2
_MOST_DENSE_CLASSES = 64
_DEFAULT = Auto(max_kl=1e-3)
_LINEAR = {"fp32": 1e-4, "bf16": 2.0**-5, "fp16": 2.0**-7}
"""How far logits may be from W h + b, relative to the largest: rounding, by the precision of the forward pass."""


@dataclass(frozen=True)
class Chosen:
    """The fields as they will be kept."""

    fields: dict[str, FieldSpec]
    calibration: Calibration | None = None
    """How the encoding of the logits was chosen, where that was left open."""
    constants: Mapping[str, Arrays] = field(default_factory=dict)
    """What the rows of a field share, by field and name."""


def with_defaults(fields: Mapping[str, FieldSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FieldSpec]:
    """Fields with the default encoding spelled out: dense_f16, and beyond 64 classes the smallest within 1e-3 nats."""

    def is_open(name: str, field: FieldSpec) -> bool:
        many = name == "logits" and shapes[name][-1] > _MOST_DENSE_CLASSES
        return many and "encoding" not in field.model_fields_set

    return {
        name: field.model_copy(update={"encoding": _DEFAULT}) if is_open(name, field) else field
        for name, field in fields.items()
    }


def choose(
    wanted: Mapping[str, FieldSpec],
    shapes: Mapping[str, tuple[int, ...]],
    teacher: Teacher,
    loader: ViewLoader,
    digests_N: NDArray[np.uint64],
    micro_batch: int,
) -> Chosen:
    """Asks the teacher about a seeded sample of rows, where something is to be decided by its answers.

    Args:
        wanted: the fields, every default spelled out.
        shapes: of one row of each field.
        teacher: asked in micro-batches, as the build asks it.
        loader: renders view 0 of the sampled rows.
        digests_N: key digests of all rows: the sample does not depend on their order.
        micro_batch: rows in one question.

    Raises:
        SpecError: no encoding keeps the bound that was asked for.
        TeacherError: the head is not linear.
    """
    fields = dict(wanted)
    head = _head(wanted, teacher)
    if head is not None:
        fields["logits"] = _with_head(wanted["logits"], *head)
    open_ended = "logits" in fields and isinstance(fields["logits"].encoding, Auto)
    if not open_ended and not any(needs_constants(item.fixed) for item in fields.values()):
        return Chosen(fields)
    look = _Look(fields, head, teacher)
    for answers in sampled_answers(teacher, loader, digests_N, micro_batch):
        look.see(answers)
    calibration = None
    logits = fields.get("logits")
    if logits is not None and isinstance(logits.encoding, Auto):
        calibration = calibrate(logits.encoding, look.logits)
        fields["logits"] = logits.model_copy(update={"encoding": calibration.chosen})
    return Chosen(fields, calibration, look.constants())


def sampled_answers(
    teacher: Teacher, loader: ViewLoader, digests_N: NDArray[np.uint64], micro_batch: int
) -> Iterator[dict[str, Tensor]]:
    """The teacher's answers, float32 on the CPU, to view 0 of the at most ROWS rows with the smallest Philox words."""
    words = view_words(digests_N, 0, _ADDRESS, 1, loader.recipe.seed)[:, 0]
    rows = np.argsort(words, kind="stable")[:ROWS]
    seen = 0
    for first in range(0, len(rows), micro_batch):
        decoded = loader.decode(rows[first : first + micro_batch])
        if not decoded.images:
            continue
        pixels = loader.views(decoded, 0).pixels_BCHW
        seen += len(pixels)
        answers = ask_whole(teacher, pixels, micro_batch)
        yield {name: value[: len(pixels)].float().cpu() for name, value in answers.items()}
    if not seen:
        raise SourceError("source", "has no sample that can be decoded among those sampled", len(rows), "Check it.")


def _head(wanted: Mapping[str, FieldSpec], teacher: Teacher) -> tuple[str, torch.nn.Linear] | None:
    logits = wanted.get("logits")
    if logits is None or not isinstance(logits.encoding, FeatureHead):
        return None
    if not isinstance(teacher, TorchTeacher) or teacher.head is None:
        hint = "Use top_k or dense_u8 for a teacher whose weights are elsewhere."
        raise TeacherError("teacher.fields.logits.encoding", "needs the head's weights here", "feature_head", hint)
    return teacher.head


def _with_head(logits: FieldSpec, name: str, head: torch.nn.Linear) -> FieldSpec:
    assert isinstance(logits.encoding, FeatureHead), "asked for"
    given = logits.encoding.width
    if given is not None and given != head.in_features:
        hint = "Leave it out: planning finds it."
        raise TeacherError("teacher.fields.logits.encoding.width", f"must be {head.in_features}", given, hint)
    found = logits.encoding.model_copy(update={"head": name, "width": head.in_features})
    return logits.model_copy(update={"encoding": found})


class _Look:
    """What is kept of the calibration rows: little, except of logits, however large the features are."""

    def __init__(
        self, fields: Mapping[str, FieldSpec], head: tuple[str, torch.nn.Linear] | None, teacher: Teacher
    ) -> None:
        self._logits: list[Tensor] = []
        self._prior = [name for name, item in fields.items() if has_prior(item.encoding)]
        self._ranges: dict[str, Ranges | None] = {
            name: None for name, item in fields.items() if isinstance(item.encoding, U8Channel)
        }
        self._head, self._precision = head, teacher.precision if isinstance(teacher, TorchTeacher) else "fp32"
        self._inputs = Ranges(0)

    def see(self, answers: Mapping[str, Tensor]) -> None:
        """One batch of answers; `TeacherError` where the head is not linear."""
        name = next(filter(is_logits, answers), None)
        if name is not None:
            logits = answers[name].flatten(0, -2)
            if not bool(logits.isfinite().all()):
                hint = "Check its precision, its weights and `normalize`."
                raise TeacherError("teacher.model", "must answer finite logits", "NaN or inf", hint)
            self._logits.append(logits)
        for feature, ranges in self._ranges.items():
            known = ranges or Ranges(channel_axis(feature, answers[feature].ndim - 1))
            known.see(answers[feature])
            self._ranges[feature] = known
        if self._head is not None:
            self._see_head(answers["logits"], answers[HEAD_INPUT])

    def _see_head(self, logits: Tensor, inputs: Tensor) -> None:
        assert self._head is not None, "asked for"
        name, head = self._head
        weight, bias = _weights(head)
        error, allowed = largest_difference(logits, inputs, weight, bias), _LINEAR[self._precision]
        if not error <= allowed:
            rule = f"logits must be W h + b of {name!r} within {allowed:g} of the largest"
            hint = "Name the layer that answers, or use dense_u8 or top_k: something follows this one."
            raise TeacherError("teacher.fields.logits.encoding", rule, f"{error:.3g}", hint)
        self._inputs.see(inputs.flatten(0, -2))

    @property
    def logits(self) -> Tensor:
        """All of them, [rows, C]."""
        return torch.cat(self._logits)

    def constants(self) -> dict[str, Arrays]:
        """By field and name."""
        found: dict[str, Arrays] = {}
        for name in self._prior:
            # The geometric mean: softened, it stays nearer to the rows than the mean of their probabilities does.
            mean_C = torch.log_softmax(self.logits.double(), dim=1).mean(0)
            found[name] = {"prior": torch.log_softmax(mean_C, dim=0).float().numpy()}
        for name, ranges in self._ranges.items():
            assert ranges is not None, "rows were seen"
            found[name] = ranges.constants()
        if self._head is not None:
            weight, bias = (tensor.numpy() for tensor in _weights(self._head[1]))
            found["logits"] = {**self._inputs.constants(), "weight": weight, "bias": bias}
        return found


def _weights(head: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    weight = head.weight.detach().float().cpu()
    return weight, weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().float().cpu()
