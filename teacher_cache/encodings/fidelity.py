"""Fidelity: what an encoding lost, measured on real rows while the exact values are in hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from teacher_cache.encodings.sparse_target import SparseTarget
from teacher_cache.encodings.target import Target

TEMPERATURES = (1, 2, 4)


def measure_logits(exact_BC: Tensor, target: Target) -> dict[str, float]:
    """Sums over rows of what was lost, to be added up over shards.

    Args:
        exact_BC: float32, the teacher's own logits; of sequences [B, T, C], where each position counts as a row.
        target: the same rows, encoded and decoded.

    Returns:
        `rows`; `kl_t1`, `kl_t2`, `kl_t4` (Σ KL(teacher ‖ decoded), in nats); `top1` (rows whose largest class
        is the same); `mass_error` (largest |Σ p − 1|). Of samples, and where classes left out have nothing,
        `total_variation` (at the sample's temperature, or 1) stands in the place of KL.
    """
    exact_BC, target = exact_BC.flatten(0, -2), target.flat()
    if isinstance(target, SparseTarget) and target.tail == "renormalise":
        return _measure_without_tail(exact_BC, target, target.drawn_at or 1.0)
    found = {"rows": float(len(exact_BC))}
    for temperature in TEMPERATURES:
        exact_logp = torch.log_softmax(exact_BC.double() / temperature, dim=1)
        decoded_logp = target.log_probs(temperature).double()
        found[f"kl_t{temperature}"] = float(kl_terms(exact_logp, decoded_logp).sum())
    return {**found, **_agreement(exact_BC, target.log_probs(1).double().exp())}


def kl_terms(exact_logp_BC: Tensor, decoded_logp_BC: Tensor) -> Tensor:
    """What each class adds to KL(teacher ‖ decoded), [B, C], from log-probabilities."""
    p_BC = exact_logp_BC.exp()
    # 0 · log(0 / q) is 0, also where a class beyond half precision (a mask of −1e9) is decoded to −inf.
    return torch.where(p_BC > 0, p_BC * (exact_logp_BC - decoded_logp_BC), 0.0)


def _agreement(exact_BC: Tensor, probs_BC: Tensor) -> dict[str, float]:
    return {
        "top1": float((probs_BC.argmax(1) == exact_BC.argmax(1)).sum()),
        "mass_error": float((probs_BC.sum(1) - 1).abs().max()),
    }


def _measure_without_tail(exact_BC: Tensor, target: SparseTarget, temperature: float) -> dict[str, float]:
    """KL is infinite where classes have no weight: what can be said of a sample, or without a tail, is the distance."""
    exact_p_BC = torch.softmax(exact_BC.double() / temperature, dim=1)
    probs_BC = target.log_probs(temperature).double().exp()
    return {
        "rows": float(len(exact_BC)),
        "total_variation": float((probs_BC - exact_p_BC).abs().sum() / 2),
        **_agreement(exact_BC, probs_BC),
    }


def measure_feature(exact: Tensor, target: Target) -> dict[str, float]:
    """`rows`, Σ squared error and Σ squares: their ratio is the relative squared error."""
    values = exact.double()
    error = target.dense().values.double() - values
    return {
        "rows": float(len(exact)),
        "squared_error": float(error.square().sum()),
        "squares": float(values.square().sum()),
    }


def add(sums: Mapping[str, float], shard: Mapping[str, float]) -> dict[str, float]:
    """The sums over some shards, and over one more."""
    both = dict(sums)
    for name, value in shard.items():
        both[name] = max(both.get(name, 0.0), value) if name == "mass_error" else both.get(name, 0.0) + value
    return both


def total(measured: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums over shards to means over rows, as `mean` gives them."""
    sums: dict[str, float] = {}
    for shard in measured:
        sums = add(sums, shard)
    return mean(sums)


def merged(means: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Means of several additions to the means over all their rows; a ratio counts by its rows too."""
    sums: dict[str, float] = {}
    for found in means:
        rows = found.get("rows", 0.0)
        weighed = {k: v if k in ("rows", "mass_error") else v * rows for k, v in found.items()}
        sums = add(sums, weighed)
    rows = sums.get("rows", 0.0)
    return {k: v if k in ("rows", "mass_error") or not rows else v / rows for k, v in sums.items()}


def mean(summed: Mapping[str, float]) -> dict[str, float]:
    """Sums to means over rows.

    Returns:
        For logits: `rows`, mean `kl_t1`, `kl_t2`, `kl_t4`, `top1` agreement, largest `mass_error`. For features:
        `rows` and `relative_squared_error`.
    """
    sums = dict(summed)
    rows = sums.pop("rows", 0.0)
    if not rows:
        return {"rows": 0.0}
    if "squares" in sums:
        relative = sums["squared_error"] / sums["squares"] if sums["squares"] else 0.0
        return {"rows": rows, "relative_squared_error": relative}
    return {"rows": rows, **{k: v if k == "mass_error" else v / rows for k, v in sums.items()}}
