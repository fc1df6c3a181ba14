"""From raw fields to what was asked for: temperature and k are applied after the forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from pydantic_core import to_json
from torch import Tensor

from services.options import Wanted
from services.schemas import Predictions
from services.teachers import ServedTeacher

_AT_ONCE = 2048
"""Numbers of one call: less than a millisecond."""


def log_probs(logits_BC: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T), float32 [B, C]; shifted first, so that a small T cannot overflow."""
    shifted_BC = logits_BC - logits_BC.amax(dim=1, keepdim=True)
    return torch.log_softmax(shifted_BC / temperature, dim=1)


def rounded(values: Tensor, step: float) -> Tensor:
    """The nearest multiple of the step, halves to the even one, as float32; −inf stays."""
    # In float64: multiples of a small step are not all apart in float32. Plus zero, because −0 shows a sign.
    return ((values.double() / step).round() * step + 0.0).float()


def top_k(logprobs_BC: Tensor, k: int) -> dict[str, Tensor]:
    """`values` [B, K], `indices` [B, K] (value down, then class up) and `tail_logmass` [B] (−inf for k = C)."""
    sorted_BC, order_BC = logprobs_BC.sort(dim=1, descending=True, stable=True)
    return {
        "values": sorted_BC[:, :k],
        "indices": order_BC[:, :k].int(),
        "tail_logmass": torch.logsumexp(sorted_BC[:, k:], dim=1),
    }


def transform(fields: dict[str, Tensor], wanted: Wanted) -> dict[str, Tensor]:
    """The tensors of an answer: `values` (and top-k's parts) from the logits, features under their names.

    Where the key's policy rounds, logits and features are rounded first, and what is made of them again, each in its
    own units: a logit, a log-probability, a probability, the log of a mass, a feature.
    """
    if wanted.rounding is None:
        return _transform(fields, wanted, lambda values: values)
    step = wanted.rounding
    # First too: a temperature of 0.01 would spread logits a hundredfold before they are rounded, and the order of a
    # `topk` would tell apart what rounding makes equal. So no series of questions tells more than rounded logits.
    coarse = {name: rounded(value, step) for name, value in fields.items()}
    return _transform(coarse, wanted, lambda values: rounded(values, step))


def _transform(fields: dict[str, Tensor], wanted: Wanted, out: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    answer = {name: value for name, value in fields.items() if name != "logits"}
    if "logits" not in fields:
        return answer
    logits_BC = fields["logits"]
    if wanted.output == "logits":
        return {**answer, "values": logits_BC}
    logprobs_BC = log_probs(logits_BC, wanted.temperature)
    if wanted.output == "topk":
        parts = top_k(out(logprobs_BC), wanted.k)
        return {**answer, **parts, "tail_logmass": out(parts["tail_logmass"])}
    return {**answer, "values": out(logprobs_BC.exp() if wanted.output == "probs" else logprobs_BC)}


def metadata(teacher: ServedTeacher, wanted: Wanted, resized: bool) -> dict[str, str]:
    """What a safetensors answer says about itself."""
    found = {
        "teacher": teacher.name,
        "digest": teacher.digest,
        "output": wanted.output,
        "temperature": repr(wanted.temperature),
        "resized": str(resized).lower(),
    }
    return found if wanted.rounding is None else {**found, "rounding": repr(wanted.rounding)}


def as_json(tensors: dict[str, Tensor], teacher: ServedTeacher, wanted: Wanted, resized: bool) -> list[bytes]:
    """The same as the JSON of `Predictions`, with class names beside the indices where the teacher has them.

    In pieces, each of a few rows: one call for a million numbers would let no other thread run.
    """
    columns = {name: _columns(value) for name, value in tensors.items()}
    if teacher.class_names is not None and "indices" in tensors:
        columns["names"] = _named(tensors["indices"], teacher.class_names)
    frame = Predictions(
        teacher=teacher.name,
        digest=teacher.digest,
        output=wanted.output,
        temperature=wanted.temperature,
        resized=resized,
        rounding=wanted.rounding,
        **{name: [] for name in columns},
    )
    pieces = list[bytes]()
    for name, value in frame.model_dump(mode="json", exclude_none=True).items():
        pieces.append(b'%s"%s":' % (b"," if pieces else b"{", name.encode()))
        if name not in columns:
            pieces.append(to_json(value))
            continue
        for number, rows in enumerate(columns[name]):
            pieces.append((b"," if number else b"[") + rows)
        pieces.append(b"]")
    return [*pieces, b"}"]


def _columns(values: Tensor) -> Iterator[bytes]:
    """JSON of some rows after the other, without the brackets around all."""
    for rows in torch.split(values, _rows(values)):
        yield to_json(rows.tolist(), inf_nan_mode="null")[1:-1]
        # Hands the interpreter over now: who waits for it is let in after 5 ms only.
        time.sleep(0)


def _named(indices_BK: Tensor, names: Sequence[str]) -> Iterator[bytes]:
    for rows in torch.split(indices_BK, _rows(indices_BK)):
        yield to_json([[names[index] for index in row] for row in rows.tolist()])[1:-1]
        time.sleep(0)


def _rows(values: Tensor) -> int:
    return max(1, _AT_ONCE * len(values) // max(1, values.numel()))
