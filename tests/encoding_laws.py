"""Every encoding by name, opened for the rows in hand, and what its stored bytes mean, stated a second time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings import (
    Columns,
    Dense,
    DenseU4Logits,
    DenseU8Logits,
    Encoding,
    FeatureHeadLogits,
    NucleusLogits,
    SampledLogits,
    Sequenced,
    Shared,
    TopKLogits,
    U8ChannelFeatures,
    blocks_of,
    open_encoding,
)
from teacher_cache.encodings.u8_channel import Ranges
from teacher_cache.fingerprint import key_digests
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
from teacher_cache.views.philox import view_words

Array = NDArray[np.float64]

LENGTH = 3
"""Positions of the sequences that laws are tried on."""
HEAD_CLASSES = 7
"""Classes of the head that `feature_head` is tried with; the rows that it encodes are the head's inputs."""
_ALL = 10**9
_TAILS = ("uniform", "ghost", "renormalise", "prior")
_FORMS = (("f16", "whole"), ("u8", "packed"), ("f16", "packed"), ("u8", "whole"))


def _top_k() -> dict[str, EncodingSpec]:
    """Every k with every tail, values and ids turning, so that each form meets each k and each tail but one."""
    found: dict[str, EncodingSpec] = {}
    for turn, (label, k) in enumerate({"1": 1, "5": 5, "all": _ALL}.items()):
        for place, tail in enumerate(_TAILS):
            values, ids = _FORMS[(turn + place) % len(_FORMS)]
            spec = TopK.model_validate({"kind": "top_k", "k": k, "values": values, "ids": ids, "tail": tail})
            found[f"top_{label} {values} {ids} {tail}"] = spec
    return found


SPECS: dict[str, EncodingSpec] = {
    "dense_f32": DenseF32(kind="dense_f32"),
    "dense_f16": DenseF16(kind="dense_f16"),
    "dense_bf16": DenseBF16(kind="dense_bf16"),
    "dense_u8": DenseU8(kind="dense_u8"),
    "dense_u8 row": DenseU8(kind="dense_u8", mode="row"),
    "dense_u4": DenseU4(kind="dense_u4"),
    **_top_k(),
    "nucleus 0.5 f16": Nucleus(kind="nucleus", mass=0.5, cap=8),
    "nucleus 0.99 u8": Nucleus(kind="nucleus", mass=0.99, cap=20, values="u8"),
    "nucleus 1 f16": Nucleus(kind="nucleus", mass=1.0, cap=_ALL),
    "nucleus 1 u8": Nucleus(kind="nucleus", mass=1.0, cap=3, values="u8"),
    "sampled threshold": SampledK(kind="sampled_k", k=5),
    "sampled replacement": SampledK(kind="sampled_k", k=6, scheme="replacement"),
    "sampled all": SampledK(kind="sampled_k", k=_ALL, temperature=2.0),
    "feature_head": FeatureHead(kind="feature_head"),
    "u8_channel": U8Channel(kind="u8_channel"),
}
SEQUENCES = [f"{name} of sequences" for name in SPECS]
ALL = [*SPECS, *SEQUENCES]
LOGITS = [name for name in ALL if "u8_channel" not in name]
SPARSE = [name for name in ALL if name.startswith(("top_", "nucleus"))]
SAMPLED = [name for name in ALL if name.startswith("sampled")]


def rows_for(name: str, values_BC: Tensor) -> Tensor:
    """Rows as a named encoding takes them: [B, C], or LENGTH positions [B, T, C] that differ in what they hold."""
    if "sequences" not in name:
        return values_BC
    return torch.stack([values_BC, values_BC.flip(1), values_BC / 2], dim=1)


def _head(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    weight_CD = torch.randn(HEAD_CLASSES, width, generator=generator) / math.sqrt(width)
    return weight_CD, torch.randn(HEAD_CLASSES, generator=generator)


def constants_of(name: str, values: Tensor) -> Shared | None:
    """What a named encoding reads beside its rows, measured on these very rows."""
    spec = SPECS[name.removesuffix(" of sequences")]
    rows_NC = values.flatten(0, -2)
    if isinstance(spec, TopK) and spec.tail == "prior":
        mean_C = torch.log_softmax(rows_NC.double(), dim=1).mean(0)
        return Shared(name, {"prior": torch.log_softmax(mean_C, dim=0).float()})
    if not isinstance(spec, U8Channel | FeatureHead):
        return None
    ranges = Ranges(0)
    ranges.see(rows_NC)
    found = {key: torch.from_numpy(array) for key, array in ranges.constants().items()}
    if isinstance(spec, FeatureHead):
        found["weight"], found["bias"] = _head(values.shape[-1])
    return Shared(name, found)


def opened(name: str, values: Tensor) -> Encoding:
    """An encoding by name for rows like these; k and cap are lowered to C."""
    spec, width = SPECS[name.removesuffix(" of sequences")], values.shape[-1]
    shape = tuple(values.shape[1:])
    if isinstance(spec, TopK | SampledK):
        spec = spec.model_copy(update={"k": min(spec.k, width)})
    elif isinstance(spec, Nucleus):
        spec = spec.model_copy(update={"cap": min(spec.cap, width)})
    elif isinstance(spec, FeatureHead):
        spec, shape = spec.model_copy(update={"width": width}), (*shape[:-1], HEAD_CLASSES)
    field = "feature:x" if isinstance(spec, U8Channel) else "logits"
    return open_encoding(spec, shape, field, constants_of(name, values))


def words_for(encoding: Encoding, rows: int, view: int = 0, first: int = 0) -> NDArray[np.uint32]:
    """The random words of rows `first`, `first` + 1, … in a view."""
    keys = key_digests([str(row) for row in range(first, first + rows)])
    return view_words(keys, view, 9, blocks_of(encoding), 3)


def encode(encoding: Encoding, values: Tensor, view: int = 0, first: int = 0) -> dict[str, NDArray[Any]]:
    """Rows to parts, whatever the encoding: a sampled one draws with the words of rows `first`, `first` + 1, …."""
    inner = encoding.inner if isinstance(encoding, Sequenced) else encoding
    if not isinstance(inner, SampledLogits):
        return encoding.encode(values)
    assert isinstance(encoding, Sequenced | SampledLogits)
    return encoding.encode_drawn(values, words_for(encoding, len(values), view, first))


def temperatures_of(encoding: Encoding) -> tuple[float, ...]:
    """Those at which its targets can be read."""
    inner = encoding.inner if isinstance(encoding, Sequenced) else encoding
    return (inner.temperature,) if isinstance(inner, SampledLogits) else (0.5, 1.0, 4.0)


def exact_logits(encoding: Encoding, values: Tensor) -> Array:
    """The teacher's logits [N, C] of rows, every position one: of a head's inputs what the head makes of them."""
    inner = encoding.inner if isinstance(encoding, Sequenced) else encoding
    rows_NC = values.flatten(0, -2).double().numpy()
    if isinstance(inner, FeatureHeadLogits):
        weight_CD, bias_C = (tensor.double().numpy() for tensor in _head(values.shape[-1]))
        return np.asarray(rows_NC @ weight_CD.T + bias_C)
    return np.asarray(rows_NC)


def positions(encoding: Encoding, columns: Columns) -> Iterator[tuple[Encoding, dict[str, NDArray[Any]]]]:
    """The stored numbers of each row, of sequences of each position: ragged ones cut to their own length."""
    if not isinstance(encoding, Sequenced):
        # Dense values and features of sequences have no positions of their own: their parts are [T, C].
        flat = columns if columns["values"].ndim < 3 else {"values": np.vstack([*columns["values"]])}
        for row in range(len(flat["values"])):
            stored = {name: np.asarray(column[row]) for name, column in flat.items()}
            yield encoding, _cut(encoding, stored, 0, int(stored.get("count", 0)))
        return
    ragged = {part.name for part in encoding.inner.parts if part.ragged}
    for row in range(len(columns["values"])):
        first = 0
        for place in range(encoding.length):
            names = set(columns) - {"count", "lengths"}
            stored = {name: np.asarray(columns[name][row]) for name in names}
            stored = {name: value if name in ragged else value[place] for name, value in stored.items()}
            count = int(columns["lengths"][row, place]) if ragged else 0
            yield encoding.inner, _cut(encoding.inner, stored, first, count)
            first += count
        assert not ragged or first == int(columns["count"][row])


def _cut(encoding: Encoding, stored: dict[str, NDArray[Any]], first: int, count: int) -> dict[str, NDArray[Any]]:
    ragged = {part.name for part in encoding.parts if part.ragged}
    return {name: value[first : first + count] if name in ragged else value for name, value in stored.items()}


def kept_of(encoding: TopKLogits | NucleusLogits, stored: dict[str, NDArray[Any]]) -> tuple[Array, list[int]]:
    """Depths (logit less maximum) and class numbers of one row, read as FORMAT.md has them."""
    values = stored["values"]
    depths = -64 * (values.astype(float) / 255) ** 2 if values.dtype == np.uint8 else values.astype(float)
    if isinstance(encoding, NucleusLogits) or encoding.ids == "whole":
        return depths, [int(number) for number in stored["indices"]]
    bits = max(1, math.ceil(math.log2(encoding.classes)))
    stream = int.from_bytes(stored["indices"].tobytes(), "little")
    return depths, [stream >> place * bits & 2**bits - 1 for place in range(encoding.k)]


def meant(encoding: Encoding, stored: dict[str, NDArray[Any]]) -> Array:
    """The logits [C], up to a constant, that the stored numbers of one row mean, in float64 and in plain steps."""
    values = stored["values"]
    if isinstance(encoding, Dense):
        if encoding.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(float)
    if isinstance(encoding, DenseU8Logits):
        return -float(np.float32(stored["step"] if encoding.step is None else encoding.step)) * values.astype(float)
    if isinstance(encoding, DenseU4Logits):
        levels = [level for byte in values.tolist() for level in (byte & 15, byte >> 4)]
        return -float(stored["step"]) * np.array(levels[: encoding.classes], dtype=float)
    if isinstance(encoding, FeatureHeadLogits | U8ChannelFeatures):
        assert encoding.shared is not None
        common = {name: tensor.double().numpy() for name, tensor in encoding.shared.tensors.items()}
        features = common["low"] + common["step"] * values
        return np.asarray(common["weight"] @ features + common["bias"] if "weight" in common else features)
    if isinstance(encoding, SampledLogits):
        least = np.log(np.float64(stored["threshold"])) if stored.get("threshold", 0) > 0 else -np.inf
        logits = np.full(encoding.classes, -np.inf)
        logits[stored["indices"]] = encoding.temperature * np.maximum(values.astype(float), least)
        return logits
    assert isinstance(encoding, TopKLogits | NucleusLogits)
    return _with_tail(encoding, *kept_of(encoding, stored), float(stored["tail_logmass"]))


def _with_tail(encoding: TopKLogits | NucleusLogits, depths: Array, ids: list[int], tail_logmass: float) -> Array:
    logits = np.full(encoding.classes, -np.inf)
    rest = np.setdiff1d(np.arange(encoding.classes), ids)
    policy = "uniform" if isinstance(encoding, NucleusLogits) else encoding.tail
    if len(rest) and policy in ("uniform", "ghost"):
        logits[rest] = min(tail_logmass - math.log(len(rest)), depths[-1])
    elif len(rest) and policy == "prior" and tail_logmass > -np.inf:
        assert isinstance(encoding, TopKLogits)
        assert encoding.prior is not None
        # Below −10³ the prior says nothing but that it has never seen the class.
        prior = np.maximum(encoding.prior.tensors["prior"].double().numpy()[rest], -1e3)
        logits[rest] = np.minimum(prior - np.logaddexp.reduce(prior) + tail_logmass, depths[-1])
    logits[ids] = depths
    return logits


def rounding(name: str, values: Tensor) -> float:
    """How far float32 log-probabilities may be off by arithmetic alone: more where logits are large or summed up."""
    if name.startswith(("dense_f32", "dense_f16", "dense_bf16", "feature_head", "u8_channel")):
        return 2e-6 + 4e-6 * float(values.abs().max())
    if name.startswith(("dense_u8 row", "dense_u4")):
        return 2e-6 + 1e-6 * float(values.abs().max())
    # A prior of −10³ nats is known to 6e-5.
    return 1e-4 if "prior" in name else 2e-6


def log_softmax(logits: Array) -> Array:
    """Over the last axis, −∞ where a logit is."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
