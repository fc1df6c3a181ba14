"""Which of a teacher's answers a cache can give in place of the model, and in which forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from services.answers import transform
from services.options import Wanted
from teacher_cache.encodings import (
    Dense,
    DenseTarget,
    DenseU4Logits,
    DenseU8Logits,
    Encoding,
    FeatureHeadLogits,
    SparseTarget,
    TopKLogits,
    U8ChannelFeatures,
    row_bytes,
)
from teacher_cache.encodings.scales import from_levels
from teacher_cache.plan import Opened, numerics_fingerprint
from teacher_cache.reader import Cache
from teacher_cache.spec import FidelitySpec, base_of

_EVERY_VALUE = (Dense, DenseU8Logits, DenseU4Logits, FeatureHeadLogits, U8ChannelFeatures)


class HeldField(NamedTuple):
    """One field of a cache."""

    name: str
    """As `Cache.read` takes it."""
    encoding: Encoding
    exact: bool
    """Whether what is read has the very bits that the served teacher would answer in a build."""


Held = Mapping[str, tuple[HeldField, ...]]
"""By the teacher's field, the most exact one first."""
Chosen = Mapping[str, HeldField]


def held_by(cache: Cache, opened: Opened) -> Held:
    """The fields of a cache that are this teacher's answers."""
    found: dict[str, list[HeldField]] = {}
    for name in cache.fields:
        additions = cache.additions_of(name)
        if any(item.identity.teacher != opened.teacher.fingerprint for item in additions):
            continue
        encoding = cache.encoding_of(name)
        alike = all(
            item.identity.numerics == numerics_fingerprint(opened, FidelitySpec.model_validate(item.spec["fidelity"]))
            for item in additions
        )
        exact = alike and isinstance(encoding, Dense) and encoding.dtype == "float32"
        # `logits@small` of another teacher is `its-name/logits@small`.
        field = base_of(name.rpartition("/")[2])
        found.setdefault(field, []).append(HeldField(name, encoding, exact))
    return {field: tuple(sorted(ways, key=_best_first)) for field, ways in found.items()}


def _best_first(way: HeldField) -> tuple[bool, int]:
    return not way.exact, -row_bytes(way.encoding)


def choose(held: Held, wanted: Wanted, *, exact: bool) -> Chosen | None:
    """The fields to read for what is wanted; None where what the cache keeps does not give it.

    Args:
        held: what there is.
        wanted: what was asked for.
        exact: whether only the teacher's own bits will do.
    """
    chosen = {}
    for field in wanted.fields:
        known = [way for way in held.get(base_of(field), ()) if way.exact or not exact]
        ways = [way for way in known if _gives(way.encoding, wanted)]
        if not ways:
            return None
        chosen[field] = ways[0]
    return chosen


def _gives(encoding: Encoding, wanted: Wanted) -> bool:
    """All values give every form. What sparse ones leave out is known as a mass, and at T = 1 only."""
    if isinstance(encoding, _EVERY_VALUE):
        return True
    few = wanted.output == "topk" and wanted.temperature == 1.0 and wanted.rounding is None
    return isinstance(encoding, TopKLogits) and few and wanted.k <= encoding.k


def read(cache: Cache, chosen: Chosen, wanted: Wanted, view: int, rows: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of an answer to these rows, from the cache alone.

    Raises:
        CorruptionError: a stored byte is not the one that was committed.
    """
    targets = {field: cache.read(way.name, view, rows) for field, way in chosen.items()}
    sparse = targets.get("logits")
    whole = {field: target.dense() for field, target in targets.items() if isinstance(target, DenseTarget)}
    answer = transform({field: target.values.float() for field, target in whole.items()}, wanted)
    return {**answer, **_few(sparse, wanted.k)} if isinstance(sparse, SparseTarget) else answer


def _few(target: SparseTarget, k: int) -> dict[str, Tensor]:
    """The first k of what is kept, as `answers.top_k` gives them."""
    values = target.values_BK
    logits_BK = from_levels(values) if values.dtype == torch.uint8 else values.float()
    # What was rounded to one value when it was stored stands in the order of the classes.
    by_class_BK = target.indices_BK.long().argsort(dim=1)
    order_BK = by_class_BK.gather(1, logits_BK.gather(1, by_class_BK).argsort(dim=1, descending=True, stable=True))
    sorted_BK, tail_B = logits_BK.gather(1, order_BK), target.tail_logmass_B.float()
    total_B = torch.logaddexp(sorted_BK.logsumexp(1), tail_B)
    return {
        "values": sorted_BK[:, :k] - total_B[:, None],
        "indices": target.indices_BK.int().gather(1, order_BK)[:, :k],
        "tail_logmass": torch.logaddexp(sorted_BK[:, k:].logsumexp(1), tail_B) - total_B,
    }
