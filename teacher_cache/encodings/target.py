"""Targets: what the cache gives back, typed, still in the small type in which it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from teacher_cache.encodings.dense_target import DenseTarget
from teacher_cache.encodings.scales import Steps
from teacher_cache.encodings.sparse_target import SparseTarget

Target = DenseTarget | SparseTarget


def joined(targets: Sequence[Target]) -> Target:
    """The rows of several targets of one field, one after the other."""
    first = targets[0]
    if len(targets) == 1:
        return first
    if isinstance(first, DenseTarget):
        return _joined_dense(first, [target for target in targets if isinstance(target, DenseTarget)])
    rows = [target.arrays() for target in targets if isinstance(target, SparseTarget)]
    together: dict[str, Any] = {name: torch.cat([arrays[name] for arrays in rows]) for name in first.arrays()}
    return replace(first, **together)


def _joined_dense(first: DenseTarget, targets: Sequence[DenseTarget]) -> DenseTarget:
    values = torch.cat([target.values for target in targets])
    if not isinstance(first.scale, Steps):
        return DenseTarget(values, first.scale)
    steps = [target.scale for target in targets if isinstance(target.scale, Steps)]
    step_B, maximum_B = (torch.cat(parts) for parts in zip(*((s.step_B, s.maximum_B) for s in steps), strict=True))
    return DenseTarget(values, Steps(step_B, maximum_B))
