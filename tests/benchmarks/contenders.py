"""Who is measured in `bench_service.py`: the bare loop and our service, each a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import torch
from load_requests import Question
from torch import Tensor

from services.pauses import own_threads
from services.wire import MEDIA_TYPE, pack_images
from teacher_cache.plan import open_parts
from teacher_cache.spec import load_spec

ROOT = Path(__file__).parents[2]
Call = Callable[[Tensor], dict[str, Tensor]]


def teacher_of(config: str) -> tuple[Call, tuple[int, int, int]]:
    """A configuration's teacher on one thread, and the (C, H, W) of its inputs."""
    own_threads(1)
    opened = open_parts(load_spec(Path(config), []))
    channels, height, width = opened.source.item(0).image_CHW.shape
    return opened.teacher, (channels, height, width)


def _bare(config: str, micro_batch: int, shape: tuple[int, int, int], asked: Connection) -> None:
    teacher, _ = teacher_of(config)
    drawn = torch.Generator().manual_seed(0)
    views = [torch.randint(0, 256, (micro_batch, *shape), dtype=torch.uint8, generator=drawn) for _ in range(4)]
    teacher(views[0])
    asked.send(None)
    while (seconds := asked.recv()) is not None:
        passes, started = 0, time.perf_counter()
        while (now := time.perf_counter() - started) < seconds:
            teacher(views[passes % len(views)])
            passes += 1
        asked.send(passes * micro_batch / now)


def _in_thread(*given: Any) -> None:
    # glibc gives memory back after each pass in the main thread, and fetches it again: a fifth slower. So where the
    # service has its model, the loop has it too.
    thread = threading.Thread(target=_bare, args=given)
    thread.start()
    thread.join()


@contextlib.contextmanager
def bare_loop(config: Path, micro_batch: int, shape: tuple[int, int, int]) -> Iterator[Callable[[float], float]]:
    """Seconds to images a second: the model again and again, on micro-batches that are in memory."""
    ours, theirs = multiprocessing.Pipe()
    given = (str(config), micro_batch, shape, theirs)
    process = multiprocessing.get_context("spawn").Process(target=_in_thread, args=given, daemon=True)
    process.start()
    theirs.close()

    def rate(seconds: float) -> float:
        ours.send(seconds)
        return float(ours.recv())

    try:
        ours.recv()
        yield rate
    finally:
        process.terminate()
        process.join()


@dataclass(frozen=True)
class Ours:
    """`teacher-serve`, as it is."""

    pid: int
    port: int
    name: str
    admin: str

    def question(self, images_BCHW: Tensor, deadline: float | None = None) -> Question:
        """These images, as safetensors.

        Args:
            images_BCHW: uint8; the load stamps them.
            deadline: seconds.
        """
        body, size = pack_images(images_BCHW), images_BCHW[0].numel()
        first = len(body) - size * len(images_BCHW)
        late = () if deadline is None else (("X-Deadline-Ms", str(int(deadline * 1000))),)
        headers = (("Content-Type", MEDIA_TYPE), *late)
        return Question(self.port, self._path, headers, body, tuple(range(first, len(body), size)))

    def named(self, body: bytes) -> Question:
        """A question by name."""
        return Question(self.port, self._path, (("Content-Type", "application/json"), ("Accept", MEDIA_TYPE)), body)

    @property
    def _path(self) -> str:
        return f"/v1/teachers/{self.name}/predict"

    def batches(self) -> int:
        """How many forward passes there have been."""
        return int(self._counted("batch_rows_count"))

    @contextlib.contextmanager
    def busy(self, shares: list[float]) -> Iterator[None]:
        """Appends the share of the time in here in which a batch was in the model: a slow machine does not lower it."""
        before, started = self._counted("batch_duration_seconds_sum"), time.perf_counter()
        yield
        shares.append((self._counted("batch_duration_seconds_sum") - before) / (time.perf_counter() - started))

    def _counted(self, name: str) -> float:
        text = httpx.get(f"{self.admin}/metrics").text
        found = re.search(rf'^teacher_serve_{name}{{teacher="{self.name}"}} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def resident(self) -> int:
        """Bytes of memory, of the server and of the processes that have its models."""
        pids = [str(self.pid)]
        for path in Path(f"/proc/{self.pid}/task").glob("*/children"):
            pids += path.read_text().split()
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def serve_ours(config: Path, name: str, *, from_cache: bool) -> Iterator[Ours]:
    """A server of its own, warm."""
    settings = [f"--set=service.from_cache={str(from_cache).lower()}", "--set=service.admin_port=0"]
    command = [sys.executable, "-m", "services", str(config), "--port=0", "--log-level=warning", *settings]
    with running(command, {}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "it is a pipe"
        said = [process.stdout.readline().split()[-1].decode() for _ in range(2)]
        port = int(said[0].split(":")[2].partition("/")[0])
        until_answered(lambda client: client.get(f"http://127.0.0.1:{port}/readyz"), process)
        yield Ours(process.pid, port, name, said[1])


@contextlib.contextmanager
def running(command: list[str], variables: dict[str, str], stdout: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts, ended at the end."""
    one = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    process = subprocess.Popen(command, env=os.environ | one, stdout=stdout, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            # Its own processes with it.
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until_answered(
    ask: Callable[[httpx.Client], httpx.Response], process: subprocess.Popen[bytes], seconds: float = 90
) -> None:
    """Waits until the answer is 200.

    Raises:
        RuntimeError: the process has ended, or takes too long.
    """
    until = time.monotonic() + seconds
    with httpx.Client(timeout=seconds) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if ask(client).status_code == 200:
                    return
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{process.args!r} did not start; what it says is above")
            time.sleep(0.2)
