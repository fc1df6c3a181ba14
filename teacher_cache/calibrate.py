"""Choosing an encoding by its error: real rows through the real teacher, every candidate measured on them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.encodings import DenseTarget, Target, open_encoding, row_bytes
from teacher_cache.encodings.calibration import Calibration, Measured
from teacher_cache.encodings.fidelity import kl_terms
from teacher_cache.errors import NonFiniteError, SourceError, SpecError
from teacher_cache.loader import ViewLoader
from teacher_cache.spec import Auto, DenseF16, DenseF32, DenseU8, EncodingSpec, TopK
from teacher_cache.teachers import Teacher, padded
from teacher_cache.views.philox import view_words

ROWS = 256
_ADDRESS = 2**16 - 2
_STEPS = (0.0625, 0.125, 0.25, 0.5)
_KS = (1, 2, 3, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256, 512, 1024)


def calibrate(
    wanted: Auto, teacher: Teacher, loader: ViewLoader, digests_N: NDArray[np.uint64], micro_batch: int
) -> Calibration:
    """Measures every candidate on a seeded sample of rows, and picks the smallest that keeps the bound.

    Args:
        wanted: the bound, the temperatures at which it must hold, and the bytes that a row may take.
        teacher: asked in micro-batches, as the build asks it.
        loader: renders view 0 of the sampled rows.
        digests_N: key digests of all rows: the sample does not depend on their order.
        micro_batch: rows in one question.

    Raises:
        SpecError: nothing keeps the bound within the bytes; the message says what would.
    """
    exact_BC = _sampled_logits(teacher, loader, digests_N, micro_batch)
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


def _sampled_logits(teacher: Teacher, loader: ViewLoader, digests_N: NDArray[np.uint64], micro_batch: int) -> Tensor:
    """The teacher's logits, float32 [at most ROWS, C], of the rows with the smallest Philox words."""
    words = view_words(digests_N, 0, _ADDRESS, 1, loader.recipe.seed)[:, 0]
    rows = np.argsort(words, kind="stable")[:ROWS]
    found = []
    for first in range(0, len(rows), micro_batch):
        decoded = loader.decode(rows[first : first + micro_batch])
        if not decoded.images:
            continue
        pixels = loader.views(decoded, 0).pixels_BCHW
        found.append(teacher(padded(pixels, micro_batch))["logits"][: len(pixels)].float().cpu())
    if not found:
        raise SourceError("source", "has no sample that can be decoded among those sampled", len(rows), "Check it.")
    return torch.cat(found)


def candidates(classes: int) -> Iterator[EncodingSpec]:
    """Everything that may be picked, for so many classes."""
    yield DenseF32(kind="dense_f32")
    yield DenseF16(kind="dense_f16")
    for step in _STEPS:
        yield DenseU8(kind="dense_u8", step=step)
    for k in _KS:
        if k < classes:
            yield TopK(kind="top_k", k=k)


def _measured(exact_BC: Tensor, temperatures: tuple[float, ...]) -> Iterator[Measured]:
    for spec in candidates(exact_BC.shape[1]):
        encoding = open_encoding(spec, tuple(exact_BC.shape[1:]), "logits")
        try:
            target = encoding.decode(encoding.encode(exact_BC))
        except NonFiniteError:
            # What cannot hold these logits is no candidate; dense_f32 always can.
            continue
        yield _measure(spec, row_bytes(encoding), exact_BC.double(), target, temperatures)


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
