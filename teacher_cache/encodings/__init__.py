"""Step 4, encoding: what is kept of a field, with a declared and measured error."""

from __future__ import annotations

from typing import assert_never

from teacher_cache.encodings.base import Columns, Encoding, Part, row_bytes
from teacher_cache.encodings.dense import Dense
from teacher_cache.encodings.dense_u8 import DenseU8 as DenseU8Logits
from teacher_cache.encodings.sampled import SampledLogits
from teacher_cache.encodings.target import DenseTarget, SparseTarget, Steps, Target, joined
from teacher_cache.encodings.top_k import TopKLogits
from teacher_cache.errors import SpecError
from teacher_cache.spec import DenseBF16, DenseF16, DenseF32, DenseU8, EncodingSpec, SampledK, TopK

__all__ = [
    "Columns",
    "Dense",
    "DenseTarget",
    "DenseU8Logits",
    "Encoding",
    "Part",
    "SampledLogits",
    "SparseTarget",
    "Steps",
    "Target",
    "TopKLogits",
    "joined",
    "open_encoding",
    "row_bytes",
]


def open_encoding(spec: EncodingSpec, shape: tuple[int, ...], field: str) -> Encoding:
    """The encoding that a configuration names, for rows of a shape.

    Args:
        spec: kind and parameters.
        shape: of one row of the field, as the teacher gives it.
        field: the field's name, for messages.
    """
    match spec:
        case DenseF32():
            return Dense(shape, "float32")
        case DenseF16():
            return Dense(shape, "float16")
        case DenseBF16():
            return Dense(shape, "bfloat16")
        case DenseU8():
            return DenseU8Logits(shape[0], spec.step if spec.mode == "fixed" else None)
        case TopK() | SampledK() if spec.k > shape[0]:
            where, rule = f"teacher.fields.{field}.encoding.k", f"must be at most {shape[0]}, the classes"
            raise SpecError(where, rule, spec.k, "Lower it, or use dense_f16.")
        case SampledK():
            return SampledLogits(shape[0], spec.k, spec.temperature, spec.scheme)
        case TopK():
            return TopKLogits(shape[0], spec.k)
    assert_never(spec)
