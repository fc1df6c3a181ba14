"""Building on a Ray cluster that is there: which one is joined, how many workers fit, and the same bytes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from toy_builds import toy_spec, tree

from teacher_cache import precompute
from teacher_cache.build import build
from teacher_cache.errors import SpecError
from teacher_cache.spec import ComputeSpec

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture
def initialised(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `ray.init` was asked for; nothing is started."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **given: found.append(given))
    return found


def test_without_an_address_it_starts_its_own_whatever_runs_beside(initialised: list[dict[str, Any]]) -> None:
    for address in (None, ""):
        precompute._connect(address, ComputeSpec(device="cpu", workers=3, threads=2), 2)
        assert initialised[-1]["address"] == "local"
        assert initialised[-1]["num_cpus"] == 4


def test_with_an_address_it_joins_and_brings_nothing(initialised: list[dict[str, Any]]) -> None:
    precompute._connect("head:6379", ComputeSpec(device="cpu", workers=3), 9)
    assert initialised[0]["address"] == "head:6379"
    assert "num_cpus" not in initialised[0]


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_given: object) -> None:
        raise ConnectionError("none there")

    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(SpecError, match="RAY_ADDRESS") as refused:
        precompute._connect("head:6379", ComputeSpec(device="cpu"), 1)
    assert refused.value.value == "head:6379"


def test_the_handler_of_sigterm_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", lambda **_given: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    try:
        mine = signal.signal(signal.SIGTERM, lambda *_arguments: None)
        own = signal.getsignal(signal.SIGTERM)
        precompute._connect("head:6379", ComputeSpec(device="cpu"), 1)
        assert signal.getsignal(signal.SIGTERM) is own
        assert own is not mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_workers_fit_on_nodes_not_across_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": True, "Resources": {}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert precompute._room(ComputeSpec(device="cpu", threads=1), False) == 6
    assert precompute._room(ComputeSpec(device="cpu", threads=2), False) == 2
    assert precompute._room(ComputeSpec(device="cpu", threads=2), True) == 1
    with pytest.raises(SpecError, match=r"compute\.threads"):
        precompute._room(ComputeSpec(device="cpu", threads=4), False)


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A cluster of one node with two cores, as `ray start` makes it; what the environment says to join it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray")  # Sockets lie in it, whose paths must be short.
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"]
    command += ["--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            yield {**token, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_build_joins_the_cluster_and_writes_the_same_bytes(
    head: dict[str, str], arrays: Path, tmp_path: Path
) -> None:
    """The command, as it stands in the compose file; the cluster goes on when it has ended."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_spec(tmp_path / "ray", arrays).model_dump(mode="json")))
    environment = {**os.environ, **head}
    command = [sys.executable, "-m", "teacher_cache.cli", "build", str(path), "--executor", "ray"]
    for cache in ("ray", "again"):
        again = [*command, "--set", f"cache={tmp_path / cache}"]
        done = subprocess.run(again, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
    large = [*command, "--set", f"cache={tmp_path / 'large'}", "--set", "compute.threads=3"]
    refused = subprocess.run(large, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert "more than the running Ray cluster has" in refused.stderr
    build(toy_spec(tmp_path / "serial", arrays), "serial")
    assert tree(tmp_path / "ray") == tree(tmp_path / "again") == tree(tmp_path / "serial")
