"""An answer's body: safetensors, or JSON with class names."""

from __future__ import annotations

import json
from typing import Any

import torch
from fastapi.responses import Response

from services import wire
from services.options import Wanted
from services.schemas import Predictions
from services.status import Answer
from services.teachers import ServedTeacher


def respond(answer: Answer, teacher: ServedTeacher, wanted: Wanted, resized: bool, tensors: bool) -> Response:
    """The answer as safetensors or as JSON."""
    about = {
        "teacher": teacher.name,
        "digest": teacher.digest,
        "output": wanted.output,
        "temperature": wanted.temperature,
        "resized": resized,
        "rounding": wanted.rounding,
        "encodings": answer.encodings,
    }
    if not tensors:
        return Response(_json(answer, teacher, about), media_type="application/json")
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    if wanted.rounding is None:
        del metadata["rounding"]
    status = torch.tensor(answer.status, dtype=torch.uint8)
    return Response(wire.pack_tensors({**answer.tensors, "status": status}, metadata), media_type=wire.MEDIA_TYPE)


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
