"""The container files, as far as that goes without an engine: linted, parsed, and every path and command tried."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import compose_spec
import httpx
import pytest
import yaml
from toy_builds import toy_spec, tree
from toy_service_models import ToyTeacher, open_gate, running, toy_served, wait_until

from services.__main__ import main
from services.app import create_app
from services.settings import Settings
from student_train.recipes import CompareSpec, FitSpec
from teacher_cache.build import build
from teacher_cache.spec import BuildSpec, parse, read_yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
TEXT = (ROOT / "docker/compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
JOB = SERVICES["precompute"]["command"][0]
"""The script that builds: it makes its container a node of the cluster first."""


def test_what_is_copied_is_there_and_is_every_package() -> None:
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.split(".")[0] for name in packages} <= set(copied)


def test_entry_points_are_console_scripts_and_nobody_is_root() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(re.findall(r'^ENTRYPOINT \["(.*)"\]$', DOCKERFILE, re.MULTILINE)) == set(scripts)
    # By its number, so that whoever runs it can see that it is not 0.
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["10001"]
    assert "--uid 10001" in DOCKERFILE


@pytest.mark.parametrize("command", [["hadolint", "docker/Dockerfile"], ["compose-lint", "docker/compose.yaml"]])
def test_the_linters_have_nothing_to_say_that_counts(command: list[str]) -> None:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def validated(text: str) -> None:
    """Raises what an engine would refuse."""
    compose_spec.PyCompose.from_json(json.dumps(yaml.safe_load(text))).validate()


def test_the_compose_file_is_one() -> None:
    validated(TEXT)
    with pytest.raises(ValueError, match="service_helthy"):
        validated(TEXT.replace("service_healthy", "service_helthy"))
    for service in SERVICES.values():
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]


def test_every_service_may_do_as_little_as_possible() -> None:
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert service["volumes"] == ["data:/data", "../examples:/data/examples:ro"]
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8000:8000"]


def test_compose_names_targets_and_configurations_that_exist() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    for service in SERVICES.values():
        assert service["build"]["target"] in targets
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    kinds = {"fit": FitSpec, "compare": CompareSpec, "build": BuildSpec}
    for words in (SERVICES["teacher"]["command"], SERVICES["train"]["command"], JOB.split("teacher-cache ")[1].split()):
        parse(kinds[words[0]], read_yaml(ROOT / words[1]), words[1])


class Reached(Exception):  # noqa: N818 - not an error
    """The teacher would be loaded now."""


def test_the_command_of_the_service_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Up to the loading of the teacher, with free ports in the place of the container's own."""
    found: list[BuildSpec] = []

    def reached(spec: BuildSpec, **_given: object) -> None:
        found.append(spec)
        raise Reached

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEACHER_API_KEY", "some-key")
    monkeypatch.setattr("services.__main__.open_served", reached)
    words = [word.replace("9000", "0") for word in SERVICES["serve"]["command"]]
    monkeypatch.setattr(sys, "argv", ["teacher-serve", *words, "--port", "0"])
    with pytest.raises(Reached):
        main()
    assert found[0].teacher.name == "wide_cnn"
    assert (tmp_path / "state").is_dir(), "kept on the volume"
    assert Settings().port == 8000, "which is published, and asked by the health check"


def test_the_health_check_of_the_service_tells_the_truth() -> None:
    (check,) = re.findall(r"^HEALTHCHECK .*\\\n\s+CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    _, *arguments = json.loads(check)
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings())
    with running(app) as url:
        command = [sys.executable, *(word.replace("http://127.0.0.1:8000", url) for word in arguments)]
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        assert subprocess.run(command, capture_output=True).returncode == 0
        app.state.service.draining = True
        assert subprocess.run(command, capture_output=True).returncode != 0


def healthy(check: list[str], environment: dict[str, str]) -> bool:
    """Whether a health check says so."""
    return subprocess.run(check, env=environment, capture_output=True).returncode == 0


@contextlib.contextmanager
def cluster(folder: Path, port: int) -> Iterator[tuple[dict[str, str], list[list[str]]]]:
    """The head and the worker with their commands of the compose file, on this machine; and their health checks."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **token, "RAY_TMPDIR": str(folder), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def here(words: list[str], nth: int) -> list[str]:
        text = json.dumps(words).replace("ray-head", "127.0.0.1").replace("6379", str(port))
        # Nodes on one machine share a folder, and the later ones' sockets are numbered.
        text = text.replace("sockets/raylet", f"sockets/raylet.{nth}")
        return list(json.loads(text.replace("/tmp/ray", f"{folder}/ray")))

    processes = []
    try:
        checks = []
        for nth, name in enumerate(("ray-head", "ray-worker")):
            service = SERVICES[name]
            command = [*service["entrypoint"], *here(service["command"], nth), "--node-ip-address=127.0.0.1"]
            log = (folder / f"{name}.log").open("w")
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT))
            log.close()
            checks.append(here(service["healthcheck"]["test"], nth)[1:])
            wait_until(partial(healthy, checks[-1], environment), 90)
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}, checks
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        # The job's node runs on in the background, and would look for its head for a while.
        for left in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if f"{folder}/ray/" in (left / "cmdline").read_text():
                    os.kill(int(left.name), signal.SIGKILL)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_the_job_builds_on_the_cluster_of_the_compose_file(arrays: Path, tmp_path: Path) -> None:
    """All three commands as they stand there, but for addresses and the configuration; the bytes are the usual."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_spec(tmp_path / "ray", arrays).model_dump(mode="json")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(f"/tmp/r{os.getpid()}")  # Sockets lie in it, whose paths must be short.
    folder.mkdir()
    with cluster(folder, port) as (environment, checks):
        script = JOB.replace("$$", "$").replace("examples/digits.yaml", str(path))
        script = script.replace("ray start", "ray start --node-ip-address=127.0.0.1")
        entrypoint = SERVICES["precompute"]["entrypoint"]
        done = subprocess.run([*entrypoint, script], env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert healthy(checks[0], environment)
    assert not healthy(checks[0], environment)
    build(toy_spec(tmp_path / "serial", arrays), "serial")
    assert tree(tmp_path / "ray") == tree(tmp_path / "serial")
