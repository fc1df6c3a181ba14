"""Choosing an encoding by its error: every candidate measured on real logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from teacher_cache.encodings import DenseTarget, Target, open_encoding
from teacher_cache.encodings.base import stored_bytes
from teacher_cache.encodings.calibration import Calibration, Measured
from teacher_cache.encodings.fidelity import kl_terms
from teacher_cache.errors import NonFiniteError, SpecError
from teacher_cache.spec import Auto, DenseF16, DenseF32, DenseU4, DenseU8, EncodingSpec, Nucleus, TopK

_STEPS = (0.0625, 0.125, 0.25, 0.5)
_MASSES = (0.9, 0.95, 0.99, 0.999)
_NUCLEUS_CAP = 256
_KS = (1, 2, 3, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256, 512, 1024)


def calibrate(wanted: Auto, exact_BC: Tensor) -> Calibration:
    """Measures every candidate on real logits, and picks the smallest that keeps the bound.

    Args:
        wanted: the bound, the temperatures at which it must hold, and the bytes that a row may take.
        exact_BC: float32, the teacher's answers to a sample of rows.

    Raises:
        SpecError: nothing keeps the bound within the bytes; the message says what would.
    """
    table = sorted(_measured(exact_BC, wanted.temperatures), key=lambda item: (item.bytes, item.worst))
    for item in table:
        if item.worst <= wanted.max_kl and (wanted.max_bytes is None or item.bytes <= wanted.max_bytes):
            return Calibration(chosen=item.encoding, rows=len(exact_BC), table=tuple(table))
    small = [item for item in table if wanted.max_bytes is None or item.bytes <= wanted.max_bytes]
    enough = [item for item in table if item.worst <= wanted.max_kl]
    parts = []
    if enough:
        parts.append(f"max_kl {wanted.max_kl:g} takes {enough[0].bytes} bytes a row ({enough[0].name})")
    if small:
        best = min(small, key=lambda item: item.worst)
        parts.append(f"{best.bytes} bytes a row lose {best.worst:.3g} ({best.name})")
    rule = f"no encoding loses at most {wanted.max_kl:g} nats in at most {wanted.max_bytes or 'any number of'} bytes"
    raise SpecError("teacher.fields.logits.encoding", rule, "; ".join(parts), "Allow more of one of them.")


def candidates(classes: int) -> Iterator[EncodingSpec]:
    """Everything that may be picked, for so many classes."""
    yield DenseF32(kind="dense_f32")
    yield DenseF16(kind="dense_f16")
    yield DenseU4(kind="dense_u4")
    for step in _STEPS:
        yield DenseU8(kind="dense_u8", step=step)
    for k in _KS:
        if k < classes:
            yield TopK(kind="top_k", k=k, values="u8", ids="packed")
    if classes > _NUCLEUS_CAP:
        for mass in _MASSES:
            yield Nucleus(kind="nucleus", mass=mass, cap=_NUCLEUS_CAP, values="u8")


def _measured(exact_BC: Tensor, temperatures: tuple[float, ...]) -> Iterator[Measured]:
    for spec in candidates(exact_BC.shape[1]):
        encoding = open_encoding(spec, tuple(exact_BC.shape[1:]), "logits")
        try:
            columns = encoding.encode(exact_BC)
        except NonFiniteError:
            # What cannot hold these logits is no candidate; dense_f32 always can.
            continue
        size = stored_bytes(encoding, columns)
        yield _measure(spec, size, exact_BC.double(), encoding.decode(columns), temperatures)


def _measure(
    spec: EncodingSpec, size: int, exact_BC: Tensor, target: Target, temperatures: tuple[float, ...]
) -> Measured:
    kl, gradient = {}, {}
    for temperature in temperatures:
        exact_logp_BC = torch.log_softmax(exact_BC / temperature, dim=1)
        decoded_logp_BC = _log_probs(target, temperature)
        p_BC, decoded_BC = exact_logp_BC.exp(), decoded_logp_BC.exp()
        kl[f"{temperature:g}"] = max(0.0, float(kl_terms(exact_logp_BC, decoded_logp_BC).sum(1).mean()))
        away = (p_BC - 1 / p_BC.shape[1]).norm(dim=1).mean()
        gradient[f"{temperature:g}"] = float((decoded_BC - p_BC).norm(dim=1).mean() / away.clamp(min=1e-12))
    p_BC, decoded_BC = exact_BC.softmax(1), _log_probs(target, 1.0).exp()
    return Measured(
        encoding=spec,
        bytes=size,
        kl=kl,
        total_variation=float((decoded_BC - p_BC).abs().sum(1).mean() / 2),
        top1=float((decoded_BC.argmax(1) == p_BC.argmax(1)).double().mean()),
        gradient_error=gradient,
    )


def _log_probs(target: Target, temperature: float) -> Tensor:
    """In double precision where that can be had: dense_f32 must not seem to lose what float32's logarithms do."""
    if isinstance(target, DenseTarget):
        return torch.log_softmax(target.dense().values.double() / temperature, dim=1)
    return target.log_probs(temperature).double()
