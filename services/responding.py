"""An answer's body: safetensors, or JSON with class names."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fastapi.responses import Response
from pydantic_core import to_json
from torch import Tensor

from services import wire
from services.asking import Question
from services.large_response import SLICE, LargeResponse
from services.policy import Policy
from services.problems import Problem
from services.schemas import Dtype, Predictions
from services.status import Answer
from services.teachers import ServedTeacher

_DTYPES: dict[Dtype, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_AT_ONCE = 512
"""Numbers of one call, but for a longer row: a fifth of a millisecond, which the event loop may wait at each step."""


def respond(answer: Answer, teacher: ServedTeacher, question: Question, policy: Policy, tensors: bool) -> Response:
    """The answer as safetensors or as JSON.

    Raises:
        Problem: 422 for a value that the wanted type cannot hold.
    """
    wanted, resized = question.desk.wanted, question.resized
    about: dict[str, Any] = {
        "teacher": teacher.name,
        "digest": teacher.digest,
        "output": wanted.output,
        "temperature": wanted.temperature,
        "resized": any(resized) if tensors and isinstance(resized, tuple) else resized,
        "rounding": wanted.rounding,
        "encodings": answer.encodings,
    }
    if not tensors:
        return LargeResponse(pieces_of(answer, teacher, about), "application/json")
    if wanted.rounding is None:
        del about["rounding"]
    about["dtype"] = wanted.dtype
    about["policy"] = policy.model_dump(include={"rounding", "largest_k"}, exclude_none=True)
    about["numerics"] = {**teacher.numerics.model_dump(), "micro_batch": teacher.micro_batch}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    parts = {**narrowed(answer.tensors, wanted.dtype), "status": torch.tensor(answer.status, dtype=torch.uint8)}
    if isinstance(resized, tuple):
        parts["resized"] = torch.tensor(resized, dtype=torch.uint8)
    return LargeResponse([wire.pack_tensors(parts, metadata)], wire.MEDIA_TYPE)


def narrowed(tensors: dict[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """Every floating value to the nearest one of a type.

    Raises:
        Problem: 422 where a finite one would become infinite.
    """
    found = dict(tensors)
    for name, value in tensors.items():
        if value.is_floating_point():
            found[name] = value.to(_DTYPES[dtype])
            lost_N = (found[name].isinf() & value.isfinite()).flatten(1 if value.ndim > 1 else 0)
            if lost_N.any():
                rule = f"must be able to hold every value of {name}"
                hint = f"Ask for {'f32 or bf16' if dtype == 'f16' else 'f32'}."
                raise Problem(422, "dtype", rule, f"{dtype}, for item {int(lost_N.nonzero()[0, 0])}", hint)
    return found


def pieces_of(answer: Answer, teacher: ServedTeacher, about: dict[str, Any]) -> list[bytes]:
    """The JSON of `Predictions`, with class names beside the indices where the teacher has them.

    In pieces that are one write each.
    """
    pieces, waiting, length = list[bytes](), list[bytes](), 0
    for piece in _pieces(answer, teacher, about):
        if waiting and length + len(piece) > SLICE:
            pieces.append(b"".join(waiting))
            waiting, length = [], 0
        waiting.append(piece)
        length += len(piece)
    return [*pieces, b"".join(waiting)]


def _pieces(answer: Answer, teacher: ServedTeacher, about: dict[str, Any]) -> Iterator[bytes]:
    """Of a few rows each: one call for a million numbers would let no other thread run."""
    there = [one.answered for one in answer.status]
    columns = {name: _column(value, there) for name, value in answer.tensors.items()}
    columns.setdefault("values", iter([to_json([None] * len(there))[1:-1]]))
    if teacher.class_names is not None and "indices" in answer.tensors:
        columns["names"] = _named(answer.tensors["indices"], there, teacher.class_names)
    status = [one.shown for one in answer.status]
    frame = Predictions.model_validate({**about, "status": status, **{name: [] for name in columns}})
    for place, (name, value) in enumerate(frame.model_dump(mode="json", exclude_none=True).items()):
        yield b'%s"%s":' % (b"," if place else b"{", name.encode())
        if name not in columns:
            yield to_json(value)
            continue
        for number, rows in enumerate(columns[name]):
            yield (b"," if number else b"[") + rows
        yield b"]"
    yield b"}"


def _column(values: Tensor, there: Sequence[bool]) -> Iterator[bytes]:
    """JSON of some rows after the other, without the brackets around all; null for one without an answer."""
    for rows, given in _split(values, there):
        yield to_json([row if one else None for row, one in zip(rows, given, strict=True)], inf_nan_mode="null")[1:-1]


def _named(indices_BK: Tensor, there: Sequence[bool], names: Sequence[str]) -> Iterator[bytes]:
    for rows, given in _split(indices_BK, there):
        shown = ([names[index] for index in row] if one else None for row, one in zip(rows, given, strict=True))
        yield to_json(list(shown))[1:-1]


def _split(values: Tensor, there: Sequence[bool]) -> Iterator[tuple[list[Any], Sequence[bool]]]:
    size = max(1, _AT_ONCE * len(values) // max(1, values.numel()))
    for start in range(0, len(values), size):
        # Hands the interpreter over now: who waits for it is let in after 5 ms only.
        time.sleep(0)
        yield values[start : start + size].tolist(), there[start : start + size]
