"""Whether two encoded answers can be one teacher's: compared where they are decoded, with bounds that follow.

Another processor rounds otherwise: a teacher's answers then differ by up to `NOISE` of their size. Call that δ, in the
units of a field. An encoding whose decoded values are off by at most e from what was encoded gives, of two answers
that differ by at most δ, decoded values that differ by at most e + δ + e: one level up or down is no fault. What is
larger is another answer. Every figure below is a difference divided by its bound, so that above 1 is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_cache.encodings import DenseTarget, Encoding, SampledLogits, Sequenced, SparseTarget, Target
from teacher_cache.encodings.scales import ROOT_RANGE, Channels, Head, Steps, from_levels

NOISE = {"fp32": 2.0**-8, "fp16": 2.0**-8, "bf16": 2.0**-5}
"""δ by the teacher's precision, relative to the largest value. float32 includes TF32, which GPUs convolve in by default
and of whose 11 bits a deep network loses three; bfloat16 has 8 of its own."""
_HALF = (2.0**-11, 2.0**-25)
_BFLOAT = (2.0**-8, 2.0**-134)
"""Rounding error, relative and at least."""
_LEAST = 2.0**-20
"""Of a field whose values are all 0."""
_NEGLIGIBLE = 100.0
"""Nats below the maximum at which a class has no weight, in float32 either: a mask of −1e9 is no size to measure by."""
_DRAWS = 0.25
"""Of a sample's mass, on average: draws flip where a cumulative sum meets its random number."""


def disagreement(stored: Target, fresh: Target, encoding: Encoding, noise: float, is_logits: bool) -> Tensor:
    """How far two answers to the same rows are apart, [rows] (of sequences: of all positions one after the other).

    Args:
        stored: what the cache holds.
        fresh: what the teacher answers now, encoded and decoded.
        encoding: of both.
        noise: δ relative to the largest value.
        is_logits: whether rows are logits: then what has no weight in a softmax sets no scale.

    Returns:
        The largest difference of each row over its bound; above 1 it cannot be rounding. NaN where one of two is NaN.
    """
    if isinstance(stored, DenseTarget) and isinstance(fresh, DenseTarget):
        # Of a head the levels are of its input, which is no logits.
        return _dense(stored, fresh, noise, is_logits and not isinstance(stored.scale, Head))
    assert isinstance(stored, SparseTarget), "one encoding gives one kind of target"
    assert isinstance(fresh, SparseTarget), "one encoding gives one kind of target"
    if stored.values_BK.ndim > 2:
        stored, fresh = stored.flat(), fresh.flat()
    if stored.drawn_at is None:
        return _sparse(stored, fresh, noise)
    drawn = encoding.inner if isinstance(encoding, Sequenced) else encoding
    assert isinstance(drawn, SampledLogits), "nothing else draws"
    return _drawn(stored, fresh, noise * stored.drawn_at, by_share=drawn.scheme == "replacement")


def _dense(stored: DenseTarget, fresh: DenseTarget, noise: float, is_logits: bool) -> Tensor:
    ours, theirs = _values(stored).double(), _values(fresh).double()
    sizes = torch.where(ours.isfinite(), ours.abs(), 0)
    if is_logits:
        seen = ours >= ours.amax(-1, keepdim=True) - _NEGLIGIBLE
        sizes = torch.where(seen, sizes, 0)
    scale = sizes.max().clamp(min=_LEAST)
    delta = noise * torch.maximum(scale, ours.abs())
    bound = delta + _error(stored, ours) + _error(fresh, theirs)
    return _ratio(ours, theirs, bound).flatten(1).amax(1)


def _ratio(ours: Tensor, theirs: Tensor, bound: Tensor) -> Tensor:
    # Equal infinities differ by NaN.
    return torch.where(ours == theirs, 0.0, (ours - theirs).abs() / bound)


def _values(target: DenseTarget) -> Tensor:
    """Decoded values; of a head its input, in which the levels are: what follows is in the manifest's constants."""
    if isinstance(target.scale, Head):
        return Channels(target.scale.shared).exact(target.values)
    return target.dense().values.float()


def _error(target: DenseTarget, values: Tensor) -> Tensor:
    """How far decoded values may be from what was encoded, within the encoding's range; clamping moves none apart."""
    if isinstance(target.scale, Steps):
        step, maximum = target.scale.step_B.double()[..., None], target.scale.maximum_B.double()[..., None]
        # The maximum is added after rounding to float32, so the sum rounds too.
        return step / 2 + _rounding(maximum, _HALF) + _rounding(values, (2.0**-22, 0.0))
    if isinstance(target.scale, Channels | Head):
        return target.scale.shared.on(values.device)["step"].double() / 2 + _rounding(values, (2.0**-22, 0.0))
    if target.values.dtype == torch.float32:
        return torch.zeros_like(values)
    return _rounding(values, _BFLOAT if target.values.dtype == torch.bfloat16 else _HALF)


def _rounding(values: Tensor, of: tuple[float, float]) -> Tensor:
    relative, least = of
    return values.abs() * relative + least


@dataclass(frozen=True)
class _Kept:
    """The kept classes of rows: logits less the maximum, sorted down, and what they may be off by."""

    logits_BK: Tensor
    """float64; 0 beyond a row's own places."""
    error_BK: Tensor
    ids_BK: Tensor
    """int64; the number of classes beyond a row's own places."""
    count_B: Tensor
    tail_B: Tensor
    """log Σ exp of the classes left out, less the maximum."""
    least: float
    """Where stored values end: what is further down is stored as this."""

    @property
    def inside_BK(self) -> Tensor:
        return torch.arange(self.logits_BK.shape[1]) < self.count_B[:, None]

    @property
    def smallest_B1(self) -> Tensor:
        return self.logits_BK.gather(1, self.count_B[:, None] - 1)

    def behind(self, count_B: Tensor) -> Tensor:
        """log Σ exp of all classes that are not among the first `count_B`, [B]; what has no weight counts alike."""
        left_out = self.inside_BK & (torch.arange(self.logits_BK.shape[1]) >= count_B[:, None])
        inner_B = torch.where(left_out, self.logits_BK, -torch.inf).logsumexp(1)
        return torch.logaddexp(inner_B, self.tail_B).clamp(min=-_NEGLIGIBLE)


def _kept(target: SparseTarget) -> _Kept:
    levels = target.values_BK.dtype == torch.uint8
    logits_BK = (from_levels(target.values_BK) if levels else target.values_BK).double()
    count_B = torch.full((len(target),), logits_BK.shape[1]) if target.count_B is None else target.count_B.long()
    inside_BK = torch.arange(logits_BK.shape[1]) < count_B[:, None]
    logits_BK = torch.where(inside_BK, logits_BK, 0)
    error_BK = _rounding(logits_BK, _HALF)
    if levels:
        # Half a level of the root, 4/255 of eight: depth = root², and the root itself is known to half a level.
        error_BK = 4 / 255 * (2 * (logits_BK.abs().sqrt() + 4 / 255) + 4 / 255)
    ids_BK = torch.where(inside_BK, target.indices_BK.long(), target.classes)
    tail_B, least = target.tail_logmass_B.double(), -ROOT_RANGE if levels else -math.inf
    return _Kept(logits_BK, error_BK, ids_BK, count_B, tail_B, least)


def _sparse(stored: SparseTarget, fresh: SparseTarget, noise: float) -> Tensor:
    """Compares what does not jump where two classes change places: sorted values, the tail behind a place, the sum.

    Each is a function of the logits that moves by at most δ where they do (an order statistic, a log-sum-exp), less
    the maximum, which moves by δ too. So ties may swap, and a nucleus may end a class earlier.
    """
    ours, theirs = _kept(stored), _kept(fresh)
    lse_B, other_B = stored.lse_B.double(), fresh.lse_B.double()
    depth_BK = torch.where(ours.logits_BK > -_NEGLIGIBLE, -ours.logits_BK, 0)
    delta = noise * torch.maximum(depth_BK.max(), lse_B.abs().max()).clamp(min=_LEAST)
    shift_BK = 2 * torch.maximum(delta, noise * ours.logits_BK.abs())
    other_shift_BK = 2 * torch.maximum(delta, noise * theirs.logits_BK.abs())
    both_B = torch.minimum(ours.count_B, theirs.count_B)
    shared_BK = ours.inside_BK & theirs.inside_BK
    bound_BK = shift_BK + ours.error_BK + theirs.error_BK
    tail_B, other_tail_B = ours.behind(both_B), theirs.behind(both_B)
    # What is behind a place is a sum of kept values and the rounded tail: off by the worst of its parts.
    worst_B = 2 * delta + torch.where(tail_B > -_NEGLIGIBLE, bound_BK.amax(1), 0)
    loose_B = worst_B + _rounding(tail_B, _HALF) + _rounding(other_tail_B, _HALF)
    found = (
        _ratio(lse_B, other_B, delta + _rounding(lse_B, _HALF) + _rounding(other_B, _HALF)),
        _ratio(tail_B, other_tail_B, loose_B),
        _ratio(ours.logits_BK, theirs.logits_BK, bound_BK).masked_fill(~shared_BK, 0).amax(1),
        _changed_places(ours, theirs, shift_BK),
        _changed_places(theirs, ours, other_shift_BK),
    )
    return torch.stack(found).amax(0)


def _changed_places(ours: _Kept, theirs: _Kept, shift_BK: Tensor) -> Tensor:
    """Class by class: one that both keep has its value in both; one that the other left out was at its edge, [B]."""
    there_BK, found_BK = _looked_up(ours.ids_BK, theirs.ids_BK)
    # What is left out is no larger than the smallest that is kept, nor than all that is left out together.
    edge_B1 = torch.minimum(theirs.smallest_B1, theirs.tail_B[:, None]).clamp(min=theirs.least)
    value_BK = torch.where(there_BK, theirs.logits_BK.gather(1, found_BK), edge_B1)
    error_BK = torch.where(there_BK, theirs.error_BK.gather(1, found_BK), theirs.error_BK.amax(1, keepdim=True))
    above_BK = ours.logits_BK - value_BK
    distance_BK = torch.where(there_BK, above_BK.abs(), above_BK.clamp(min=0))
    ratio_BK = distance_BK / (shift_BK + ours.error_BK + error_BK)
    return ratio_BK.masked_fill(~ours.inside_BK, 0).amax(1)


def _looked_up(ids_BK: Tensor, among_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Which ids are among others of their row, and at which place, [B, K]."""
    sorted_BK, places_BK = among_BK.sort(dim=1)
    at_BK = torch.searchsorted(sorted_BK, ids_BK).clamp(max=among_BK.shape[1] - 1)
    return sorted_BK.gather(1, at_BK) == ids_BK, places_BK.gather(1, at_BK)


def _drawn(stored: SparseTarget, fresh: SparseTarget, noise: float, by_share: bool) -> Tensor:
    """Samples: the weights of the classes that both drew, and how much of the mass is on others.

    A class drawn by one alone is no fault by itself; shares of draws with replacement move with each that flips.
    """
    ours, theirs = stored.values_BK.double(), fresh.values_BK.double()
    ids_BK = stored.indices_BK.long()
    there_BK, found_BK = _looked_up(ids_BK, fresh.indices_BK.long())
    weights_BK, same_BK = ours.exp(), theirs.gather(1, found_BK)
    overlap_BK = torch.where(there_BK, torch.minimum(weights_BK, same_BK.exp()), 0.0)
    apart = 1 - overlap_BK.sum(1) / weights_BK.sum(1)
    found_B = (apart.mean() / _DRAWS).expand(len(ours))
    if by_share:
        return found_B
    visible_BK = there_BK & (ours > -_NEGLIGIBLE)
    scale = torch.where(visible_BK, ours.abs(), 0).max().clamp(min=1)
    ratio_BK = _ratio(ours, same_BK, 2 * noise * scale + _rounding(ours, (2.0**-22, 2.0**-22)))
    return torch.maximum(found_B, ratio_BK.masked_fill(~visible_BK, 0).amax(1))
