"""Every block of the README is executed, in order, in a fresh folder, as a reader would."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import s3_server
import yaml

from teacher_cache.spec import BuildSpec, parse

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)

SHORTER = {
    "digits_teacher.yaml": ("epochs: 30", "epochs: 3"),
    "digits_compare.yaml": ("epochs: 30", "epochs: 2"),
}
"""The demo's configurations are run whole by the slow test below; here what the commands do is enough."""


class Reader:
    """Someone who types the blocks: one shell folder, one Python session, servers that run beside."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.names, self.patch = folder, {"__name__": "readme"}, patch
        self.store = ExitStack()
        self.options, self.store_port = s3_server.apart(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.servers: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def shell(self, block: str) -> None:
        for line in block.splitlines():
            words = shlex.split(line.replace("8000", self.port).replace("8333", str(self.store_port)))
            if words[0] == "pip":
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                assert set(re.findall(r"\[(\w+)\]", line)) <= set(extras)
                assert any(one.startswith(words[-1]) for one in extras["test"])
            elif words[0] == "export":
                for name, _, value in (word.partition("=") for word in words[1:]):
                    self.patch.setenv(name, value)
                    self.environment[name] = value
            elif words[0] == "weed":
                command = [str(BIN / "weed"), *words[1:], *self.options]
                endpoint = f"http://127.0.0.1:{self.store_port}"
                self.store.enter_context(s3_server.running(command, endpoint, self.folder, self.folder))
            elif words[0] == "make":
                makefile = (ROOT / "Makefile").read_text()
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"the Makefile has no {words[1]}"
            elif words[0] == "teacher-serve":
                self.servers.append(subprocess.Popen(words, cwd=self.folder, env=self.environment))
                self._wait()
            else:
                subprocess.run(words, cwd=self.folder, env=self.environment, check=True, capture_output=True)

    def _wait(self) -> None:
        for _ in range(600):
            assert self.servers[-1].poll() is None, "teacher-serve ended"
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        pytest.fail("teacher-serve did not become ready")

    def python(self, block: str) -> None:
        exec(compile(block.replace("8000", self.port), "README.md", "exec"), self.names)

    def stop(self) -> None:
        self.store.close()
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name, (said, shorter) in SHORTER.items():
        path = tmp_path / "examples" / name
        assert path.read_text().count(said) == 1
        path.write_text(path.read_text().replace(said, shorter))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    someone = Reader(tmp_path, monkeypatch)
    yield someone
    someone.stop()


@pytest.mark.timeout(480)
def test_every_block_runs(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [kind for kind, _ in BLOCKS]
    assert set(kinds) == {"bash", "python", "yaml", "text"}, "a block of a kind that nobody executes"
    for kind, block in BLOCKS:
        if kind == "bash":
            reader.shell(block)
        elif kind == "python":
            reader.python(block)
        elif kind == "yaml":
            parse(BuildSpec, yaml.safe_load(block), "README.md")
    printed = capsys.readouterr().out
    assert "('0', '1'" in printed, "the served card's class names"
    assert reader.names["probabilities"].shape == (2, 10)  # type: ignore[attr-defined]
    assert list((reader.folder / "runs/copies").iterdir()), "files of the cache in the object store"


def test_the_tree_is_the_tree() -> None:
    """Every package and module that the README names is there, and every package module is named or covered."""
    (text,) = [block for kind, block in BLOCKS if kind == "text" and "shard_job.py" in block]
    folder = ""
    for line in text.splitlines():
        names = re.split(r"\s{2,}", line.strip())
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
        for name in names[:-1]:
            if name.endswith(("/", ".py", ".md", ".toml", ".txt")) or "*" in name:
                prefix = folder if line.startswith(" ") else ""
                assert list(ROOT.glob(f"{prefix}{name.rstrip('/')}")), f"{prefix}{name} is not there"
    for package in ("teacher_cache", "student_train", "services"):
        for module in (ROOT / package).glob("*.py"):
            covered = module.name in text or module.name.startswith(("__init__", "report"))
            private = module.stem in {"fingerprint", "imports"}
            assert covered or private, f"{module.name} is missing from the README's tree"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_ends_with_its_result() -> None:
    """`make demo`'s own script, in the checkout: what the README promises of it."""
    subprocess.run([sys.executable, "examples/demo.py"], cwd=ROOT, check=True, capture_output=True)
    result: dict[str, Any] = json.loads((ROOT / "runs/demo/result.json").read_text())
    assert result["rows"] == 600
    assert result["views"] == 8
    assert result["verify_ok"] is True
    assert result["served_equals_cached"] is True
    assert result["teacher_accuracy"] > 0.95
    assert result["ce_accuracy"]["mean"] > 0.8
    assert result["kd_accuracy"]["mean"] > 0.8
    page = (ROOT / "runs/demo/report.html").read_text()
    assert page.count("<svg") >= 4
