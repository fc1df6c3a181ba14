"""Step 4, encoding: what is kept of a field, with a declared and measured error."""

from __future__ import annotations

from typing import assert_never

from teacher_cache.encodings.base import Columns, Encoding, Part, row_bytes
from teacher_cache.encodings.dense import Dense
from teacher_cache.encodings.dense_target import DenseTarget
from teacher_cache.encodings.dense_u4 import DenseU4 as DenseU4Logits
from teacher_cache.encodings.dense_u8 import DenseU8 as DenseU8Logits
from teacher_cache.encodings.feature_head import FeatureHead as FeatureHeadLogits
from teacher_cache.encodings.nucleus import NucleusLogits
from teacher_cache.encodings.sampled import SampledLogits
from teacher_cache.encodings.scales import Shared, Steps
from teacher_cache.encodings.sequences import Sequenced
from teacher_cache.encodings.sparse_target import SparseTarget
from teacher_cache.encodings.target import Target, joined
from teacher_cache.encodings.top_k import TopKLogits
from teacher_cache.encodings.u8_channel import U8Channel as U8ChannelFeatures
from teacher_cache.errors import SpecError
from teacher_cache.spec import (
    DenseBF16,
    DenseF16,
    DenseF32,
    DenseU4,
    DenseU8,
    EncodingSpec,
    FeatureHead,
    Nucleus,
    SampledK,
    TopK,
    U8Channel,
)

__all__ = [
    "Columns",
    "Dense",
    "DenseTarget",
    "DenseU4Logits",
    "DenseU8Logits",
    "Encoding",
    "FeatureHeadLogits",
    "NucleusLogits",
    "Part",
    "SampledLogits",
    "Sequenced",
    "Shared",
    "SparseTarget",
    "Steps",
    "Target",
    "TopKLogits",
    "U8ChannelFeatures",
    "blocks_of",
    "joined",
    "open_encoding",
    "row_bytes",
]

_MOST_BLOCKS = 2**16


def open_encoding(
    spec: EncodingSpec, shape: tuple[int, ...], field: str = "logits", shared: Shared | None = None
) -> Encoding:
    """The encoding that a configuration names, for rows of a shape.

    Args:
        spec: kind and parameters.
        shape: of one row of the field, as the teacher gives it: [C] or, of sequences, [T, C] for logits.
        field: the field's name: it tells channels from positions, and stands in messages.
        shared: the constants of the field, for encodings that read any; without them only `parts` can be asked for.

    Raises:
        SpecError: it does not fit the shape.
    """
    match spec:
        case DenseF32():
            return Dense(shape, "float32")
        case DenseF16():
            return Dense(shape, "float16")
        case DenseBF16():
            return Dense(shape, "bfloat16")
        case U8Channel():
            return U8ChannelFeatures(shape, shared)
    encoding = _of_vectors(spec, shape[-1], field, shared)
    if len(shape) == 1:
        return encoding
    sequenced = Sequenced(encoding, shape[0])
    if sequenced.blocks >= _MOST_BLOCKS:
        where, rule = f"teacher.fields.{field}.encoding.k", f"draws at most {_MOST_BLOCKS - 1} blocks a row"
        raise SpecError(where, rule, sequenced.blocks, "Lower it, or use `scheme: threshold`.")
    return sequenced


def _of_vectors(
    spec: DenseU8 | DenseU4 | TopK | SampledK | Nucleus | FeatureHead, classes: int, field: str, shared: Shared | None
) -> Encoding:
    match spec:
        case TopK() | SampledK() if spec.k > classes:
            where, rule = f"teacher.fields.{field}.encoding.k", f"must be at most {classes}, the classes"
            raise SpecError(where, rule, spec.k, "Lower it, or use dense_f16.")
        case Nucleus() if spec.cap > classes:
            where, rule = f"teacher.fields.{field}.encoding.cap", f"must be at most {classes}, the classes"
            raise SpecError(where, rule, spec.cap, "Lower it.")
        case DenseU8():
            return DenseU8Logits(classes, spec.step if spec.mode == "fixed" else None)
        case DenseU4():
            return DenseU4Logits(classes)
        case SampledK():
            return SampledLogits(classes, spec.k, spec.temperature, spec.scheme)
        case TopK():
            return TopKLogits(classes, spec.k, spec.values, spec.ids, spec.tail, shared)
        case Nucleus():
            return NucleusLogits(classes, spec.mass, spec.cap, spec.values)
        case FeatureHead():
            assert spec.width is not None, "planning has found it"
            return FeatureHeadLogits(classes, spec.width, shared)
    assert_never(spec)


def blocks_of(encoding: Encoding) -> int:
    """Philox blocks of four words that an encoding draws for a row; 0 where it draws nothing."""
    return encoding.blocks if isinstance(encoding, SampledLogits | Sequenced) else 0
