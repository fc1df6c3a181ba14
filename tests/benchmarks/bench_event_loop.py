"""How long the service's event loop stands still, for each kind of request: the goal is at most 10 ms.

    python tests/benchmarks/bench_event_loop.py [--json]

A server in a second process, its model in a third, with a key, books on a disk and an audit. On its loop a heartbeat
sleeps for a millisecond again and again and keeps the largest delay beyond that; this process sends each kind of
request many times, from several threads, and asks for it afterwards. The time in which the loop's thread was ready and
had no CPU (Linux's schedstat) is taken off; what remains is what the loop itself computes at a stretch, told apart,
and its waiting for the interpreter, which on a busy machine a thread may have that has no CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import numpy as np
import torch
import uvicorn
from bench_views import Rows, run
from starlette.types import Receive, Scope, Send
from torch import Tensor, nn

from services import keys
from services.app import create_app
from services.device_process import teachers_apart
from services.pauses import short_pauses
from services.policy import Policy
from services.server import HTTP
from services.settings import Settings
from services.state_folder import StateFolder
from services.teachers import open_served, servable
from services.wire import pack_images
from teacher_cache.spec import BuildSpec, parse

SHAPE, CLASSES, SIZE = (3, 64, 64), 1000, 64
BODY = 64 * 2**20
Ask = Callable[[httpx.Client], httpx.Response]


class Projection(nn.Module):
    """A model that costs little: a thousand classes from the first thousand pixels."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """float [B, 3, 64, 64] to [B, CLASSES]."""
        return images_BCHW.flatten(1)[:, :CLASSES] * 36


def configuration(folder: Path) -> BuildSpec:
    """It, with one image as its data."""
    np.save(folder / "images.npy", np.zeros((1, *SHAPE[1:], 3), np.uint8))
    described = {
        "cache": str(folder / "cache"),
        "source": {"kind": "numpy", "images": str(folder / "images.npy")},
        "views": {"recipe": [{"normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}}]},
        "teacher": {"name": "toy", "model": "bench_event_loop:Projection", "micro_batch": SIZE},
        "compute": {"device": "cpu", "threads": 1},
    }
    return servable(parse(BuildSpec, described, "benchmark"))


class Heartbeat:
    """Runs on the server's loop; `GET /gap` answers the largest since the last time, in milliseconds.

    Two of them: the delay of a beat, and what of a delay the loop's own thread has computed.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], object]) -> None:
        self._app, self._largest, self._own = app, 0.0, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            async with self._beating():
                await self._app(scope, receive, send)  # type: ignore[misc]
        elif scope.get("path") == "/gap":
            body = f"{self._largest * 1e3:.3f} {self._own * 1e3:.3f}".encode()
            self._largest = self._own = 0.0
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
        else:
            await self._app(scope, receive, send)  # type: ignore[misc]

    @contextlib.asynccontextmanager
    async def _beating(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._beat())
        yield
        task.cancel()

    async def _beat(self) -> None:
        while True:
            before, starved, own = time.monotonic(), _starved(), time.thread_time()
            await asyncio.sleep(0.001)
            gap = time.monotonic() - before - 0.001
            self._largest = max(self._largest, gap - (_starved() - starved))
            self._own = max(self._own, time.thread_time() - own)


def _starved() -> float:
    """Seconds in which this thread was ready to run and did not."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def serve(folder: Path, told: Connection) -> None:
    """In the second process."""
    torch.set_num_threads(1)
    spec, state = configuration(folder), folder / "state"
    policy = Policy(distinct_images=10**9, images_per_day=10**9)
    key = keys.add(StateFolder(state), "bench", policy)
    with teachers_apart([spec]) as (load,), socket.socket(proto=socket.IPPROTO_TCP) as listener:
        served = open_served(spec, load=load)
        settings = Settings(state=state, max_images=BODY // served.view_bytes, queue_images=10**6, queue_bytes=2**34)
        app = Heartbeat(create_app({"toy": served}, settings))
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        told.send((f"http://127.0.0.1:{listener.getsockname()[1]}", key))
        with short_pauses():
            uvicorn.Server(uvicorn.Config(app, http=HTTP, log_level="critical", ws="none")).run(sockets=[listener])


@contextlib.contextmanager
def served() -> Iterator[httpx.Client]:
    """A server that is ready, and a client with its key."""
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(Path(folder), theirs))
        process.start()
        url, key = ours.recv()
        headers = {"Authorization": f"Bearer {key}"}
        try:
            with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
                while client.get("/readyz").status_code != 200:
                    time.sleep(0.1)
                yield client
        finally:
            process.terminate()
            process.join()


def questions() -> dict[str, Ask]:
    """One request of each kind."""
    predict, drawn = "/v1/teachers/toy/predict", torch.Generator().manual_seed(1)
    tensors = {"Content-Type": "application/safetensors"}

    def images(count: int) -> Callable[[], bytes]:
        whole = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=drawn)
        return partial(pack_images, whole)

    largest, thousand, few = images((BODY - 4096) // (3 * 64 * 64))(), images(1024)(), images(8)()
    as_json = tensors | {"Accept": "application/json"}
    post = partial(_post, predict)
    return {
        "nothing": lambda client: client.get("/livez"),
        "a body of 64 MiB": post(largest, tensors, output="topk", k=1),
        "a body of 64 MiB that is no safetensors": post(bytes(BODY), tensors),
        "1,024 images, safetensors": post(thousand, tensors),
        "1,024 × 1,000 values of JSON": post(thousand, as_json),
        "1,024 × top-k 1,000 of JSON": post(thousand, as_json, output="topk", k=1000),
        "8 images": post(few, tensors),
        "404": lambda client: client.get("/no/such/path"),
        "cards": lambda client: client.get("/v1/teachers"),
        "usage": lambda client: client.get("/v1/usage"),
        "keys that are wrong": lambda client: client.get("/v1/teachers", headers={"Authorization": "Bearer no"}),
    }


def _post(path: str, body: bytes, headers: dict[str, str], **options: str | int) -> Ask:
    return lambda client: client.post(path, content=body, headers=headers, params=options)


def gap(client: httpx.Client, label: str, ask: Ask, rounds: int) -> Rows:
    """The largest delay of each round: what a kind of request does to the loop is in all of them, noise in some."""
    at_once = 2 if "1,0" in label or "64" in label else 8
    gaps, owns, started = [], [], time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        for _ in range(rounds):
            client.get("/gap")
            statuses = {one.status_code for one in pool.map(lambda _: ask(client), range(at_once))}
            delay, own = map(float, client.get("/gap").text.split())
            gaps.append(delay)
            owns.append(own)
    each = (time.monotonic() - started) / rounds / at_once
    shown, itself = (
        " / ".join(f"{value:.1f}" for value in (min(values), statistics.median(values), max(values)))
        for values in (gaps, owns)
    )
    rest = f"least, median and most of {rounds} rounds ({each * 1e3:.1f} ms a request, {statuses})"
    return {label: f"{shown} ms, itself {itself}: {rest}"}


def rows() -> Iterator[Callable[[int], Rows]]:
    """One after the other, at one server."""
    with served() as client:
        for label, ask in questions().items():
            yield partial(gap, client, label, ask)


if __name__ == "__main__":
    run(rows(), __doc__)
