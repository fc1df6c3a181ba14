"""An answer's body: safetensors, or JSON with class names."""

from __future__ import annotations

import json
from typing import Any

import torch
from fastapi.responses import Response
from torch import Tensor

from services import wire
from services.asking import Question
from services.policy import Policy
from services.problems import Problem
from services.schemas import Dtype, Predictions
from services.status import Answer
from services.teachers import ServedTeacher

_DTYPES: dict[Dtype, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


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
        return Response(_json(answer, teacher, about), media_type="application/json")
    if wanted.rounding is None:
        del about["rounding"]
    about["dtype"] = wanted.dtype
    about["policy"] = policy.model_dump(include={"rounding", "largest_k"}, exclude_none=True)
    about["numerics"] = {**teacher.numerics.model_dump(), "micro_batch": teacher.micro_batch}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    parts = {**narrowed(answer.tensors, wanted.dtype), "status": torch.tensor(answer.status, dtype=torch.uint8)}
    if isinstance(resized, tuple):
        parts["resized"] = torch.tensor(resized, dtype=torch.uint8)
    return Response(wire.pack_tensors(parts, metadata), media_type=wire.MEDIA_TYPE)


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


def _json(answer: Answer, teacher: ServedTeacher, about: dict[str, Any]) -> str:
    """The same as JSON, with class names beside the indices where the teacher has them."""
    there = [one.answered for one in answer.status]
    parts = {
        name: [row if given else None for row, given in zip(value.tolist(), there, strict=True)]
        for name, value in answer.tensors.items()
    }
    parts.setdefault("values", [None] * len(there))
    names = teacher.class_names
    if names is not None and "indices" in parts:
        parts["names"] = [row if row is None else [names[index] for index in row] for row in parts["indices"]]
    status = [one.shown for one in answer.status]
    return Predictions.model_validate({**about, **parts, "status": status}).model_dump_json(exclude_none=True)
