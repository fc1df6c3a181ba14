"""What the service's tests share: toy teachers, a server in a thread, and bodies to send."""

from __future__ import annotations

import io
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image
from starlette.types import ASGIApp
from torch import Tensor, nn

from services.app import create_app
from services.server import HTTP
from services.settings import Settings
from services.teachers import ServedTeacher
from teacher_cache.fingerprint import fingerprint
from teacher_cache.spec import BuildSpec, parse

CLASSES = 7
SHAPE = (3, 8, 8)
POISON = 250
"""An image whose first pixel is this makes `ToyTeacher` raise."""


class ColourNet(nn.Module):
    """Convolution, BatchNorm, ReLU, head on RGB: its bits depend on the order of summation, as real ones do."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.conv = nn.Conv2d(3, 32, 3, padding=1)
            self.norm = nn.BatchNorm2d(32)
            self.relu = nn.ReLU(inplace=True)
            self.head = nn.Linear(32 * 64, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.relu(self.norm(self.conv(images_BCHW))).flatten(1))
        return logits


class WideNet(ColourNet):
    """Adds the sum of many numbers, whose last bit depends on the number of threads that add it."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__(classes)
        self.register_buffer("many", torch.randn(200_000, generator=torch.Generator().manual_seed(1)))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return super().forward(images_BCHW) + self.get_buffer("many").sum()


class SlowNet(ColourNet):
    """Half a second a batch."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        time.sleep(0.5)
        return super().forward(images_BCHW)


class WhereNet(nn.Module):
    """Answers in which process and in which thread it runs, and how often it was asked."""

    calls = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.calls += 1
        here = (os.getpid(), threading.get_native_id(), self.calls)
        return torch.tensor([[*here, *[0] * (CLASSES - len(here))]] * len(images_BCHW), dtype=torch.float32)


class DrawnNet(ColourNet):
    """Draws its weights from the generator that all of a process share, and not all at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv.weight.data.normal_()
        time.sleep(0.3)
        self.head.weight.data.normal_()


class FussyNet(ColourNet):
    """Fails in its own way on a view whose first pixel says so; black ones pass."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        first_B = (images_BCHW[:, 0, 0, 0] * 255).round()
        failures = (_OddError(), torch.OutOfMemoryError("too large"), SystemExit(3), ArithmeticError("poison"))
        for number, error in enumerate(failures, 1):
            if (first_B == number).any():
                raise error
        if (first_B == 5).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images_BCHW)


class _OddError(Exception):
    """Holds what cannot be sent to another process."""

    def __init__(self) -> None:
        super().__init__("odd")
        self.lock = threading.Lock()


class KilledNet(nn.Module):
    """Its process does not survive loading it."""

    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        super().__init__()


@dataclass
class ToyTeacher:
    """A scripted teacher: exact answers, a record of its batches, a gate, and a poison."""

    batches: list[Tensor] = field(default_factory=list)
    """Copies of the non-empty batches that it was asked for, failed ones too."""
    gate: threading.Event = field(default_factory=threading.Event)
    """Non-empty batches wait for it."""
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released once for each non-empty batch."""
    threads: list[int] = field(default_factory=list)
    broken: bool = False
    fields: tuple[str, ...] = ("logits", "feature:pixels")
    fingerprint: str = fingerprint("teacher", 1, {"toy": True})

    def __call__(self, views_BCHW: Tensor) -> dict[str, Tensor]:
        self.threads.append(torch.get_num_threads())
        if self.broken:
            raise RuntimeError("/secret/path/weights.pt is broken")
        if views_BCHW.any():
            self.batches.append(views_BCHW.clone())
            self.entered.release()
            assert self.gate.wait(20)
            if (views_BCHW[:, 0, 0, 0] == POISON).any():
                raise ArithmeticError("/secret/path: poison")
        return {"logits": toy_logits(views_BCHW), "feature:pixels": views_BCHW.float()}


def toy_logits(views_BCHW: Tensor) -> Tensor:
    """What `ToyTeacher` answers, float32 [B, CLASSES]: exact, with ties."""
    flat_BC = views_BCHW.flatten(1)[:, :CLASSES].float()
    return flat_BC // 4 / 8


def toy_served(teacher: Any, *, micro_batch: int = 8, name: str = "toy", threads: int = 1) -> ServedTeacher:
    """A scripted teacher as it is served."""
    return ServedTeacher(
        name=name,
        teacher=teacher,
        view_shape=SHAPE,
        micro_batch=micro_batch,
        class_names=tuple(f"class {number}" for number in range(CLASSES)),
        field_shapes={"logits": (CLASSES,), "feature:pixels": SHAPE},
        pools={"logits": "none", "feature:pixels": "none"},
        threads=threads,
    )


def open_gate(teacher: ToyTeacher) -> ToyTeacher:
    """A teacher that answers at once."""
    teacher.gate.set()
    return teacher


def views(count: int, seed: int = 0) -> Tensor:
    """uint8 [count, 3, 8, 8], none of them empty or poisonous."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, POISON, (count, *SHAPE), dtype=torch.uint8, generator=generator)


def picture(kind: str, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> bytes:
    """An encoded image of (width, height)."""
    array = np.random.Generator(np.random.Philox(seed)).integers(0, 240, (size[1], size[0], 3))
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).convert(mode).save(buffer, kind, **LOSSLESS.get(kind, {}))
    return buffer.getvalue()


LOSSLESS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}}


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """Serves an application on loopback in a thread; gives its base URL."""
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=HTTP, log_level="critical", ws="none", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serving(served: ServedTeacher, **settings: Any) -> Iterator[httpx.Client]:
    """A warm service, and a client at its root."""
    app = create_app({served.name: served}, parse(Settings, settings, "test"))
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Polls; fails when it takes too long."""
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.01)


def colour_spec(folder: Path, cache: str, **teacher: Any) -> BuildSpec:
    """A build of 21 RGB images of 10×10, two views of 8×8, micro-batches of 8, shards of 10 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "images.npy").exists():
        words = np.random.Generator(np.random.Philox(2)).integers(0, 256, (21, 10, 10, 3))
        np.save(folder / "images.npy", words.astype(np.uint8))
    described = {
        "cache": str(folder / cache),
        "source": {
            "kind": "numpy",
            "images": str(folder / "images.npy"),
            "class_names": [f"class {number}" for number in range(CLASSES)],
        },
        "views": {"recipe": [{"pad_crop": {"size": 8, "padding": 1}}, "horizontal_flip"], "count": 2, "seed": 3},
        "teacher": {
            "name": "colour",
            "model": "toy_service_models:ColourNet",
            "micro_batch": 8,
            "fields": {"logits": {"encoding": "dense_f32"}, "feature:relu": {"pool": "mean"}},
            **teacher,
        },
        "store": {"shard_rows": 10, "chunk_rows": 5},
        "compute": {"device": "cpu", "threads": 1},
    }
    return parse(BuildSpec, described, "test")
