"""From raw fields to what was asked for: temperature and k are applied after the forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from services.options import Wanted


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
