"""LitServe and mosec, which `bench_service.py` compares with: processes of their own, from a folder of theirs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from contenders import ROOT, running, until_answered
from load_requests import Question
from torch import Tensor

OTHERS = ("litserve", "mosec")
HERE = Path(__file__).parent
WAIT = 0.01
"""Seconds that the others wait for a batch to fill: mosec's own, and the same for LitServe, which has none."""
LOST_PATIENCE = 120
"""Seconds until they give a request up; no load here comes near."""


@contextlib.contextmanager
def serve_other(kind: str, others: Path, config: Path, images_BCHW: Tensor, micro_batch: int) -> Iterator[Question]:
    """LitServe or mosec; a question to it is these images, and a batch as many of those as a micro-batch holds."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    items = max(1, micro_batch // len(images_BCHW))
    given = {"BENCH_CONFIG": str(config), "BENCH_ITEMS": str(items), "BENCH_PORT": str(port)}
    given["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), str(others)])
    # mosec looks for its binary in the folders of scripts, of which the user's can be set.
    given["PYTHONUSERBASE"] = str(others)
    command = [sys.executable, str(HERE / f"served_by_{kind}.py")]
    if kind == "mosec":
        given |= {"MOSEC_PORT": str(port), "MOSEC_ADDRESS": "127.0.0.1", "MOSEC_LOG_LEVEL": "error"}
        given |= {"MOSEC_TIMEOUT": str(LOST_PATIENCE * 1000), "MOSEC_MAX_REQUEST_SIZE": str(2**26)}
    path = "/predict" if kind == "litserve" else "/inference"
    body, size = images_BCHW.numpy().tobytes(), images_BCHW[0].numel()
    headers = (("Content-Type", "application/octet-stream"),)
    with running(command, given, stdout=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}{path}"
        until_answered(lambda client: client.post(url, content=body, headers=dict(headers)), process)
        yield Question(port, path, headers, body, tuple(range(0, len(body), size)))


def versions(folder: Path) -> dict[str, str]:
    """Of those that lie there."""
    there = {one.name.lower(): one.version for one in distributions(path=[str(folder)])}
    return {kind: there[kind] for kind in OTHERS if kind in there}
