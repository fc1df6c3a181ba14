"""Answers of the Open Inference Protocol: JSON, and behind it the tensors that are wanted in binary."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from fastapi.responses import Response
from torch import Tensor

from services.asking import Question
from services.inference_body import Inference, flag
from services.options import Wanted
from services.problems import Problem
from services.status import Answer
from services.teachers import ServedTeacher

HEADER = "Inference-Header-Content-Length"
_TYPES = {torch.float32: "FP32", torch.int32: "INT32", torch.uint8: "UINT8"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Inferred(Question):
    """A question of this protocol."""

    inference: Inference
    """Which tensors are wanted, and how."""


def infer_response(answer: Answer, served: ServedTeacher, question: Inferred, ident: str) -> Response:
    """What was asked for.

    Args:
        answer: of the items.
        served: the teacher.
        question: what was asked of it.
        ident: the answer's id where the request has none.
    """
    tensors, asked = _named(answer, question), question.inference
    everything = flag(asked.parameters, "binary_data_output")
    chosen = {one.name: one.parameters.binary_data for one in asked.outputs} or dict.fromkeys(tensors)
    outputs, behind = [], []
    for name, binary in chosen.items():
        value = tensors[name]
        described: dict[str, Any] = {"name": name, "datatype": _TYPES[value.dtype], "shape": list(value.shape)}
        if everything if binary is None else binary:
            behind.append(_bytes(value))
            described["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            described["data"] = _listed(value)
        outputs.append(described)
    wanted = question.desk.wanted
    told = {"digest": served.digest, "output": wanted.output, "temperature": wanted.temperature}
    ident = asked.id if asked.id is not None else ident
    text = json.dumps({"model_name": served.name, "id": ident, "parameters": told, "outputs": outputs}).encode()
    if not behind:
        return Response(text, media_type="application/json")
    headers = {HEADER: str(len(text))}
    return Response(b"".join([text, *behind]), headers=headers, media_type="application/octet-stream")


def require_named(asked: Inference, wanted: Wanted, *, files: bool) -> None:
    """Before anything is computed: the tensors that are wanted are among those that there will be.

    Args:
        asked: the request.
        wanted: what its parameters ask for.
        files: whether encoded files are sent.

    Raises:
        Problem: 400, one is not.
    """
    known = {"topk": ["values", "indices", "tail_logmass"], "gather": ["values", "indices"]}
    there = known.get(wanted.output, [wanted.output]) if "logits" in wanted.fields else []
    there += [name for name in wanted.fields if name != "logits"]
    there += ["status", *(["lse"] if wanted.lse else []), *(["resized"] if files else [])]
    other = next((one.name for one in asked.outputs if one.name not in there), None)
    if other is not None:
        hint = "Other forms are asked for by the parameter `output`."
        raise Problem(400, "outputs", f"must be {', '.join(there)}", other, hint)


def _named(answer: Answer, question: Question) -> dict[str, Tensor]:
    """Whole rows are called by what they are."""
    output, tensors = question.desk.wanted.output, dict(answer.tensors)
    if "values" in tensors and output not in ("topk", "gather"):
        tensors = {output: tensors.pop("values"), **tensors}
    tensors["status"] = torch.tensor(answer.status, dtype=torch.uint8)
    if isinstance(question.resized, tuple):
        tensors["resized"] = torch.tensor(question.resized, dtype=torch.uint8)
    return tensors


def _bytes(value: Tensor) -> bytes:
    array = value.contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _listed(value: Tensor) -> list[float | int | None]:
    """In the order of the rows; a number that is not finite is null, because JSON has none."""
    flat = value.flatten().tolist()
    return [one if math.isfinite(one) else None for one in flat] if value.is_floating_point() else flat
