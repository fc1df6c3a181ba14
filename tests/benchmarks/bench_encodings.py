"""Encodings on one core: encode, decode, and what decoding adds to a training step.

    python tests/benchmarks/bench_encodings.py [--json]

`encode` reads float32 rows, 256 of 1,000 classes or 16 of 128,000; its GB/s are of what it reads, and `× memcpy` is its
time over that of a copy of the same bytes into memory that is there already. `decode` takes 256 rows from the stored
parts to what a loss at T = 2 needs: log-probabilities of the kept classes and of the others where the target is sparse,
of all classes where it is dense, the values themselves where it is a feature. `bare decode` stops at the target, which
still has the stored types: dense ones are not even copied. Both count stored bytes, and are compared with a copy of
them. Results are new tensors each time: of 128,000 classes, getting the memory for them is part of the time.

The step is a plain one of ResNet-20, cross-entropy and SGD, on 128 images of 32×32; `decode ÷ step` is the share of
`decode` above for the batch, `(decode + KD − CE) ÷ step` what distilling from the target costs in place of the labels.

Whatever is compared is timed in turns within one run; a figure is the median over the rounds, a ratio the median of the
rounds' ratios. There are no more than 5 rounds of 128,000 classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_losses import step as loss_step
from bench_views import Rows, in_turns, ratio, run
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional

from student_train.losses import soft_target_loss
from student_train.students import resnet20_cifar
from teacher_cache.encodings import Encoding, SampledLogits, Shared, SparseTarget, U8ChannelFeatures, open_encoding
from teacher_cache.encodings.base import stored_bytes
from teacher_cache.encodings.u8_channel import Ranges
from teacher_cache.spec import EncodingSpec

SHAPES = ((256, 1_000), (16, 128_000))
"""Rows to encode, and classes: ImageNet, and the vocabulary of a language model."""
MANY = 10_000
"""From so many classes on, rounds are few."""
DECODED = 256
IMAGES = 128
WIDTH = 512
"""D, of features."""
TEMPERATURE = 2.0
SPEC: TypeAdapter[EncodingSpec] = TypeAdapter(EncodingSpec)


def kinds(classes: int) -> Iterator[dict[str, Any]]:
    """Every encoding; of few classes at most half are kept."""
    yield from ({"kind": kind} for kind in ("dense_f32", "dense_f16", "dense_bf16", "dense_u4"))
    yield from ({"kind": "dense_u8", "mode": mode} for mode in ("fixed", "row"))
    for k in sorted({min(most, classes // 2) for most in (10, 100)}):
        yield {"kind": "top_k", "k": k}
        yield {"kind": "top_k", "k": k, "values": "u8", "ids": "packed"}
    yield {"kind": "nucleus", "mass": 0.95, "cap": min(256, classes // 2), "values": "u8"}
    for scheme in ("threshold", "replacement"):
        yield {"kind": "sampled_k", "k": min(12, classes // 2), "temperature": TEMPERATURE, "scheme": scheme}
    yield {"kind": "feature_head", "width": WIDTH}
    if classes < MANY:  # It knows no classes: once is enough.
        yield {"kind": "u8_channel"}


@dataclass(frozen=True)
class Case:
    """One encoding, and rows for it."""

    name: str
    encoding: Encoding
    values: Tensor
    """float32 [B, C] logits, or [B, D] where a feature is encoded."""

    @staticmethod
    def of(chosen: dict[str, Any], rows: int, classes: int) -> Case:
        """Random rows; constants are measured on them."""
        generator = torch.Generator().manual_seed(0)
        name = " ".join(f"{key}={value}" if key != "kind" else value for key, value in chosen.items())
        if chosen["kind"] not in ("feature_head", "u8_channel"):
            encoding = open_encoding(SPEC.validate_python(chosen), (classes,))
            return Case(name, encoding, 3 * torch.randn(rows, classes, generator=generator))
        features_BD = torch.randn(rows, WIDTH, generator=generator).relu()
        ranges = Ranges(0)
        ranges.see(features_BD)
        constants = {name: torch.from_numpy(array) for name, array in ranges.constants().items()}
        shape = (WIDTH,)
        if chosen["kind"] == "feature_head":
            constants["weight"] = torch.randn(classes, WIDTH, generator=generator) / 8
            constants["bias"] = torch.zeros(classes)
            shape = (classes,)
        encoding = open_encoding(SPEC.validate_python(chosen), shape, shared=Shared("bench", constants))
        return Case(name, encoding, features_BD)

    def encode(self) -> dict[str, NDArray[Any]]:
        """The stored parts of all rows."""
        if not isinstance(self.encoding, SampledLogits):
            return self.encoding.encode(self.values)
        generator = np.random.Generator(np.random.Philox(0))
        words_BW = generator.integers(0, 2**32, (len(self.values), 4 * self.encoding.blocks), np.uint32)
        return self.encoding.encode_drawn(self.values, words_BW)

    def stored(self, rows: int) -> dict[str, NDArray[Any]]:
        """Parts of that many rows, again and again the same."""
        return {name: np.resize(column, (rows, *column.shape[1:])) for name, column in self.encode().items()}

    def decode(self, columns: dict[str, NDArray[Any]]) -> object:
        """What a loss needs of the parts."""
        target = self.encoding.decode(columns)
        if isinstance(self.encoding, U8ChannelFeatures):
            return target.dense()
        if isinstance(target, SparseTarget):
            return target.log_probs_sparse(TEMPERATURE)
        return target.log_probs(TEMPERATURE)

    def loss(self, columns: dict[str, NDArray[Any]], logits_BC: Tensor) -> Tensor:
        """Decoding, and the loss of a student's logits."""
        return soft_target_loss(logits_BC, self.encoding.decode(columns), TEMPERATURE)


def copying(size: int) -> Callable[[], object]:
    """A copy of so many bytes into memory that is there already."""
    return partial(torch.ones(size, dtype=torch.uint8).copy_, torch.ones(size, dtype=torch.uint8))


def speed(seconds: list[float], copied: list[float], rows: int, size: int) -> str:
    """Rows and bytes in a second, and the time over that of the copy."""
    median = statistics.median(seconds)
    return f"{rows / median:,.0f} rows/s, {size / median / 1e9:.3f} GB/s, {ratio(seconds, copied):.1f} × memcpy"


def convert(rows: int, classes: int, rounds: int) -> Rows:
    """Every encoding of so many classes: encode, decode, bare decode."""
    found = {}
    for chosen in kinds(classes):
        case = Case.of(chosen, rows, classes)
        columns, read = case.stored(DECODED), case.values.nbytes
        size = DECODED * stored_bytes(case.encoding, columns)
        encode, copy_read, decode, bare, copy_stored = in_turns(
            rounds if classes < MANY else min(rounds, 5),
            case.encode,
            copying(read),
            partial(case.decode, columns),
            partial(case.encoding.decode, columns),
            copying(size),
        )
        place = f"{classes:,} classes, {case.name}"
        found[f"{place}: encode"] = speed(encode, copy_read, rows, read)
        found[f"{place}: decode"] = speed(decode, copy_stored, DECODED, size)
        microseconds = statistics.median(bare) * 1e6
        found[f"{place}: bare decode"] = f"{microseconds:,.0f} µs a batch, {ratio(bare, copy_stored):.2f} × memcpy"
    return found


def training_step(classes: int) -> Callable[[], None]:
    """Forward, backward and SGD of ResNet-20 with cross-entropy, on a batch of CIFAR's size."""
    network = resnet20_cifar(classes)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images_BCHW, labels_B = torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % classes

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(network(images_BCHW), labels_B).backward()
        optimizer.step()

    return step


def share(classes: int, rounds: int) -> Rows:
    """What decoding and distilling add to a training step, for a head of so many classes."""
    cases = [Case.of(chosen, IMAGES, classes) for chosen in kinds(classes)]
    stored = [case.stored(IMAGES) for case in cases]
    logits_BC, labels_B = torch.randn(IMAGES, classes, requires_grad=True), torch.arange(IMAGES) % classes
    works: list[Callable[[], object]] = [
        training_step(classes),
        loss_step(logits_BC, lambda student_BC: functional.cross_entropy(student_BC, labels_B)),
        *(partial(case.decode, columns) for case, columns in zip(cases, stored, strict=True)),
        # The last is a feature: its loss is another.
        *(loss_step(logits_BC, partial(case.loss, columns)) for case, columns in zip(cases[:-1], stored, strict=False)),
    ]
    step, hard, *rest = in_turns(rounds, *works)
    place = f"ResNet-20, {classes:,} classes"
    found = {f"{place}: step, ms": f"{statistics.median(step) * 1e3:.0f}"}
    for case, decode in zip(cases, rest, strict=False):
        found[f"{place}, {case.name}: decode ÷ step"] = f"{ratio(decode, step):.3%}"
    for case, distil in zip(cases, rest[len(cases) :], strict=False):
        added = ratio([ours - theirs for ours, theirs in zip(distil, hard, strict=True)], step)
        found[f"{place}, {case.name}: (decode + KD − CE) ÷ step"] = f"{added:.3%}"
    return found


if __name__ == "__main__":
    shapes = (partial(convert, rows, classes) for rows, classes in SHAPES)
    run((*shapes, partial(share, 10), partial(share, 1_000)), __doc__)
