"""Record layouts of published systems that store teacher outputs, written anew to be measured beside ours.

Bytes are what each system keeps of the *target*; a seed or parameters of the view that its record also holds are
counted apart (`beside`). Decoding and softening follow the system's own training code; T = 1 is the only temperature
that TinyViT, FKD, ml-dr and Megatron train at, so for them T is the power 1 ⁄ T of the decoded probabilities.
"""

from __future__ import annotations

import gzip
import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numcodecs import Zstd
from numpy.typing import NDArray
from torch import Tensor

Record = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout(ABC):
    """One system's record of a row."""

    classes: int
    """C, the length of the teacher's logits."""
    k: int
    """How many classes are kept."""

    @property
    @abstractmethod
    def name(self) -> str:
        """System and parameters."""

    @property
    def beside(self) -> int:
        """Bytes of a row that say how the view was made, not what the teacher answered."""
        return 0

    @abstractmethod
    def encode(self, logits_BC: Tensor) -> Record:
        """float32 [B, C] to the arrays that are stored, one row of each for a row."""

    def stored_bytes(self, record: Record) -> int:
        """Bytes that all rows of a record take, compressed where the system compresses."""
        return sum(column.nbytes for column in record.values())

    @abstractmethod
    def log_probs(self, record: Record, temperature: float) -> Tensor:
        """What the system's student is taught at T, float64 [B, C] of mass 1; −inf where it teaches no mass."""


def softened(probs_BC: Tensor, temperature: float) -> Tensor:
    """Probabilities to log-probabilities at T; what is below 0 teaches no mass."""
    return torch.log_softmax(probs_BC.double().clamp(min=0).log() / temperature, dim=1)


def top_probs(logits_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest probabilities, float32 [B, K], and their classes."""
    values_BK, indices_BK = torch.softmax(logits_BC, dim=1).topk(k, dim=1)
    return values_BK, indices_BK


def evened(values_BK: Tensor, indices_BK: Tensor, classes: int) -> Tensor:
    """float32 [B, C]: what the kept probabilities lack of 1 is shared evenly, also where it is below 0."""
    lacking_B1 = (1 - values_BK.sum(1, keepdim=True)) / (classes - values_BK.shape[1] or math.nan)
    return lacking_B1.repeat(1, classes).scatter(1, indices_BK, values_BK)


@dataclass(frozen=True)
class TinyViT(Layout):
    """Wu et al., ECCV 2022; read from microsoft/Cream, `TinyViT/save_logits.py`, `main.py` and `dataset_wrapper.py`.

    float16 probabilities and int16 class numbers, after an int32 seed; k is 100 unless configured. The rest of the
    mass is shared evenly, and comes out below 0 where rounding took the kept ones above 1.
    """

    @property
    def name(self) -> str:
        return f"TinyViT k={self.k}"

    @property
    def beside(self) -> int:
        return 4

    def encode(self, logits_BC: Tensor) -> Record:
        values_BK, indices_BK = top_probs(logits_BC, self.k)
        return {"indices": indices_BK.to(torch.int16).numpy(), "values": values_BK.half().numpy()}

    def log_probs(self, record: Record, temperature: float) -> Tensor:
        values_BK, indices_BK = torch.from_numpy(record["values"]), torch.from_numpy(record["indices"])
        return softened(evened(values_BK.float(), indices_BK.long(), self.classes), temperature)


@dataclass(frozen=True)
class FKD(Layout):
    """Shen and Xing, ECCV 2022; read from szq0214/FKD, `FKD_SLG/generate_soft_label.py` and `utils_FKD.py`.

    `marginal_smoothing`: class numbers and probabilities in one float array [2, K] of a view, the rest shared evenly.
    float32 in that repository; its successors (`--use_fp16`) store float16, crop coordinates too, in which class
    numbers above 2,048 are no longer whole.
    """

    dtype: Literal["float16", "float32"] = "float16"

    @property
    def name(self) -> str:
        return f"FKD k={self.k} {'fp16' if self.dtype == 'float16' else 'fp32'}"

    @property
    def beside(self) -> int:
        """Four coordinates and a flip."""
        return 4 * np.dtype(self.dtype).itemsize + 1

    def encode(self, logits_BC: Tensor) -> Record:
        values_BK, indices_BK = top_probs(logits_BC, self.k)
        return {"label": torch.stack([indices_BK.float(), values_BK], dim=1).numpy().astype(self.dtype)}

    def log_probs(self, record: Record, temperature: float) -> Tensor:
        label_B2K = torch.from_numpy(record["label"]).float()
        return softened(evened(label_B2K[:, 1], label_B2K[:, 0].long(), self.classes), temperature)


@dataclass(frozen=True)
class DatasetReinforcement(Layout):
    """Faghri et al., ICCV 2023; read from apple/ml-dr, `reinforce.py`, `dr/utils.py`, `configs/imagenet/plus.yaml`.

    Python lists of float32 probabilities and class numbers, pickled (protocol 4) and gzipped as a whole; k = 10.
    `smooth` shares the rest evenly; a row whose float32 sum exceeds 1 becomes a softmax *of probabilities* over the
    kept classes instead, which is nearly flat. The parameters of the view, a few tens of bytes, are not counted.
    """

    @property
    def name(self) -> str:
        return f"ml-dr k={self.k}"

    def encode(self, logits_BC: Tensor) -> Record:
        values_BK, indices_BK = top_probs(logits_BC, self.k)
        return {"values": values_BK.numpy(), "indices": indices_BK.numpy()}

    def stored_bytes(self, record: Record) -> int:
        rows = list(zip(record["values"].tolist(), record["indices"].tolist(), strict=True))
        return len(gzip.compress(pickle.dumps(rows, protocol=4), compresslevel=6))

    def log_probs(self, record: Record, temperature: float) -> Tensor:
        values_BK, indices_BK = torch.from_numpy(record["values"]), torch.from_numpy(record["indices"])
        smooth_BC = evened(values_BK, indices_BK, self.classes)
        flat_BC = torch.zeros_like(smooth_BC).scatter(1, indices_BK, values_BK.softmax(1))
        over_B1 = 1 - values_BK.sum(1, keepdim=True) < 0
        return softened(torch.where(over_B1, flat_BC, smooth_BC), temperature)


@dataclass(frozen=True)
class Megatron(Layout):
    """NVIDIA/Megatron-LM 2026, `megatron/training/distillation/logits_saver.py`, `utils.py`, `cached_logits_loss.py`.

    float16 log-probabilities, the class numbers' low 16 bits and, packed by eight, their 17th bit; zstd level 3 over
    a payload. The loss adds a ghost class with the rest of the mass, at least 1e-8: evenly over the classes here.
    """

    @property
    def name(self) -> str:
        return f"Megatron k={self.k}"

    def encode(self, logits_BC: Tensor) -> Record:
        values_BK, indices_BK = logits_BC.topk(self.k, dim=1)
        indices = indices_BK.numpy()
        return {
            "values": (values_BK - logits_BC.logsumexp(1, keepdim=True)).half().numpy(),
            "indices_low": (indices & 0xFFFF).astype(np.uint16),
            "bit_17": np.packbits((indices >> 16).astype(bool), axis=1),
        }

    def stored_bytes(self, record: Record) -> int:
        return len(Zstd(level=3).encode(b"".join(column.tobytes() for column in record.values())))

    def log_probs(self, record: Record, temperature: float) -> Tensor:
        high_BK = np.unpackbits(record["bit_17"], axis=1, count=self.k).astype(np.int64)
        indices_BK = torch.from_numpy(high_BK << 16 | record["indices_low"])
        probs_BK = torch.from_numpy(record["values"]).float().exp()
        ghost_B1 = (1 - probs_BK.sum(1, keepdim=True)).clamp(min=1e-8) / max(self.classes - self.k, 1)
        return softened(ghost_B1.repeat(1, self.classes).scatter(1, indices_BK, probs_BK), temperature)


def published(classes: int) -> Iterator[Layout]:
    """Every layout at the k of its paper and around, as far as its types hold so many classes."""
    from distillkit_layout import distillkit

    for k in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500):
        if k > classes:
            break
        if classes <= 2**15:
            yield TinyViT(classes, k)
            yield DatasetReinforcement(classes, k)
        yield Megatron(classes, k)
    for k in (5, 10):
        if k <= classes <= 2**11:
            yield FKD(classes, k)
            yield FKD(classes, k, "float32")
    if classes >= 128:
        yield Megatron(classes, 128)
    yield from distillkit(classes)
