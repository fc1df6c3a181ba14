"""What a row of each encoding and of each published layout costs and loses, on the same logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from published_layouts import Record, published
from torch import Tensor

from teacher_cache.calibrate import candidates
from teacher_cache.encodings import DenseTarget, Encoding, open_encoding
from teacher_cache.encodings.base import stored_bytes
from teacher_cache.encodings.constants import needs_constants
from teacher_cache.encodings.scales import Shared
from teacher_cache.errors import NonFiniteError
from teacher_cache.spec import EncodingSpec, Nucleus, TopK

TEMPERATURES = (1, 4)
BUDGETS = (16, 32, 64, 128, 256, 512, 1024, 2048)
KS = (1, 2, 3, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256, 512, 1024)
PRIOR_KS = (1, 5, 20, 100, 512)
FLOOR = 1e-8
TIE = 1.001
"""Errors this close are equal: both round, and rounding should not decide."""
CHUNK = 2**21
"""Logits that are worked on at once: larger temporaries are asked of the system anew each time."""


class Subject(Protocol):
    """What is measured: one of our encodings, or a published layout."""

    @property
    def name(self) -> str: ...
    @property
    def beside(self) -> int: ...
    def encode(self, logits_BC: Tensor) -> Record: ...
    def stored_bytes(self, record: Record) -> int: ...
    def log_probs(self, record: Record, temperature: float) -> Tensor: ...


@dataclass(frozen=True)
class Ours:
    """One of our encodings, measured as a published layout is."""

    spec: EncodingSpec
    classes: int
    calibration_BC: Tensor | None = None
    """Rows that are not measured, for encodings that read constants."""
    beside: int = 0

    @property
    def name(self) -> str:
        """Kind, and every choice that is not the usual one."""
        chosen = self.spec.model_dump(exclude_defaults=True, exclude={"kind"})
        return " ".join([self.spec.kind, *(f"{key}={value}" for key, value in chosen.items())])

    @cached_property
    def encoding(self) -> Encoding:
        """With the teacher's mean over the calibration rows where it reads that."""
        if not needs_constants(self.spec):
            return open_encoding(self.spec, (self.classes,))
        assert self.calibration_BC is not None, "left out where there is nothing to calibrate on"
        mean_C = self.calibration_BC.log_softmax(1).logsumexp(0) - math.log(len(self.calibration_BC))
        return open_encoding(self.spec, (self.classes,), shared=Shared("bench", {"prior": mean_C}))

    def encode(self, logits_BC: Tensor) -> Record:
        """float32 [B, C] to its parts."""
        return self.encoding.encode(logits_BC)

    def stored_bytes(self, record: Record) -> int:
        """All parts; of ragged ones what is filled."""
        return stored_bytes(self.encoding, record) * len(next(iter(record.values())))

    def log_probs(self, record: Record, temperature: float) -> Tensor:
        """As a loss reads them, float64 [B, C]; without the rounding of float32 where that can be had."""
        target = self.encoding.decode(record)
        if isinstance(target, DenseTarget):
            return torch.log_softmax(target.dense().values.double() / temperature, dim=1)
        return target.log_probs(temperature).double()


def ours(classes: int) -> Iterator[EncodingSpec]:
    """What may be chosen automatically, and what may be configured, each once."""
    listed: list[EncodingSpec] = list(candidates(classes))
    for k in (k for k in KS if k < classes):
        listed.append(TopK(kind="top_k", k=k, values="u8", ids="packed"))
        if k in PRIOR_KS:
            listed.append(TopK(kind="top_k", k=k, values="u8", ids="packed", tail="prior"))
    cap = min(classes, 512)
    listed += [Nucleus(kind="nucleus", mass=mass, cap=cap, values="u8") for mass in (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)]
    seen: list[EncodingSpec] = []
    for spec in listed:
        if spec not in seen:
            seen.append(spec)
            yield spec


@dataclass(frozen=True)
class Exact:
    """The teacher's answer at one temperature."""

    temperature: int
    p_BC: Tensor
    """float64."""
    plogp_B: Tensor
    """Σ p log p."""

    @staticmethod
    def at(logits_BC: Tensor, temperature: int) -> Exact:
        """From float32 logits [B, C]."""
        logp_BC = torch.log_softmax(logits_BC.double() / temperature, dim=1)
        return Exact(temperature, logp_BC.exp(), (logp_BC.exp() * logp_BC).sum(1))

    def of(self, rows_B: Tensor) -> Exact:
        """Some of the rows."""
        return Exact(self.temperature, self.p_BC[rows_B], self.plogp_B[rows_B])

    def kl(self, decoded_BC: Tensor) -> Tensor:
        """KL(teacher ‖ decoded) of each row, from log-probabilities [B, C]; inf where a class with mass has none."""
        terms_BC = (self.p_BC * decoded_BC).masked_fill_(self.p_BC == 0, 0.0)
        return self.plogp_B - terms_BC.sum(1)


@dataclass
class Point:
    """One subject, measured; sums over rows until `mean` has divided them."""

    name: str
    ours: bool
    beside: int
    bytes: float = 0.0
    raw: float = 0.0
    """Bytes before a layout's own general compression; those of ours are the same."""
    total_variation: float = 0.0
    top1: float = 0.0
    kl: dict[int, float] = field(default_factory=lambda: dict.fromkeys(TEMPERATURES, 0.0))
    floored: dict[int, float] = field(default_factory=lambda: dict.fromkeys(TEMPERATURES, 0.0))
    """KL where it is finite, else with every class at 1e-8 at least: what is compared."""
    infinite: float = 0.0
    """Share of rows whose KL is infinite at T = 1."""

    def add(self, decoded_BC: Tensor, exact: Exact) -> None:
        """Some more rows, as they are decoded at one temperature."""
        kl_B = exact.kl(decoded_BC)
        self.kl[exact.temperature] += float(kl_B.sum())
        endless_B = kl_B.isinf()
        if bool(endless_B.any()):
            raised_BC = torch.logaddexp(decoded_BC[endless_B], torch.tensor(FLOOR).double().log()).log_softmax(1)
            kl_B[endless_B] = exact.of(endless_B).kl(raised_BC)
        self.floored[exact.temperature] += float(kl_B.sum())
        if exact.temperature == 1:
            self.infinite += float(endless_B.sum())
            self.total_variation += float((decoded_BC.exp() - exact.p_BC).abs().sum() / 2)
            self.top1 += float((decoded_BC.argmax(1) == exact.p_BC.argmax(1)).sum())

    def mean(self, rows: int) -> Point:
        """Sums to means; KL below 0 is rounding."""
        self.kl = {key: max(0.0, value / rows) for key, value in self.kl.items()}
        self.floored = {key: max(0.0, value / rows) for key, value in self.floored.items()}
        for name in ("bytes", "raw", "infinite", "total_variation", "top1"):
            setattr(self, name, getattr(self, name) / rows)
        return self

    def within(self, other: Point, temperatures: Iterable[int]) -> bool:
        """Whether it loses at most what another does."""
        return all(self.floored[each] <= other.floored[each] * TIE for each in temperatures)


def measure(logits_BC: Tensor, calibration_BC: Tensor | None) -> list[Point]:
    """Everything that can hold these logits, from the smallest to the largest."""
    rows, classes = logits_BC.shape
    specs = [spec for spec in ours(classes) if calibration_BC is not None or not needs_constants(spec)]
    subjects: list[Subject] = [*(Ours(spec, classes, calibration_BC) for spec in specs), *published(classes)]
    chunks = logits_BC.split(max(1, CHUNK // classes))
    exact = [[Exact.at(chunk_BC, temperature) for temperature in TEMPERATURES] for chunk_BC in chunks]
    points = []
    for subject in subjects:
        try:
            records = [subject.encode(chunk_BC) for chunk_BC in chunks]
        except NonFiniteError:
            continue
        whole = {name: np.concatenate([record[name] for record in records]) for name in records[0]}
        point = Point(subject.name, isinstance(subject, Ours), subject.beside, subject.stored_bytes(whole))
        point.raw = point.bytes if point.ours else sum(column.nbytes for column in whole.values())
        for record, part in zip(records, exact, strict=True):
            for each in part:
                point.add(subject.log_probs(record, each.temperature), each)
        points.append(point.mean(rows))
    return sorted(points, key=lambda point: (point.bytes, point.floored[1]))


def front(points: Sequence[Point], temperature: int) -> list[Point]:
    """Those that no smaller or equal one beats, from the smallest to the largest."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.bytes, each.floored[temperature])):
        if not best or point.floored[temperature] < best[-1].floored[temperature]:
            best.append(point)
    return best


def budgets(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For each budget and temperature the best of ours and of the published ones, as (name, KL)."""
    rows = []
    for budget in BUDGETS:
        for each in TEMPERATURES:
            row: dict[str, Any] = {"bytes": budget, "temperature": each}
            for side, mine in (("ours", True), ("published", False)):
                fits = [point for point in points if point.ours == mine and point.bytes <= budget]
                best = min(fits, key=lambda point: point.floored[each], default=None)
                row[side] = None if best is None else (best.name, best.floored[each])
            rows.append(row)
    return rows


def ratios(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For each published point its bytes ÷ the smallest of ours that loses no more: at T = 1, at T = 4, at both."""
    rows = []
    for theirs in (point for point in points if not point.ours):
        row: dict[str, Any] = {"published": theirs.name, "bytes": theirs.bytes}
        for label, wanted in (("1", (1,)), ("4", (4,)), ("both", TEMPERATURES)):
            enough = [point for point in points if point.ours and point.within(theirs, wanted)]
            best = min(enough, key=lambda point: point.bytes, default=None)
            row[label] = None if best is None else (best.name, best.bytes, theirs.bytes / best.bytes)
        rows.append(row)
    return rows
