"""`teacher-serve` as a process: it starts, answers, drains and ends with 0; wrong requests end with 2."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from toy_service_models import colour_spec, views, wait_until

import teacher_cache as tc
from services.__main__ import main
from services.client import Prediction, TeacherClient
from services.server import LOOPBACK, bind

TESTS = str(Path(__file__).parent)
HERE = ("--set", "service.apart=false")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file."""
    folder = tmp_path_factory.mktemp("command")
    path = folder / "colour.yaml"
    path.write_text(yaml.safe_dump(colour_spec(folder, "cache").model_dump(mode="json")))
    return path


def command(config: Path, *arguments: str, key: str | None = None) -> subprocess.Popen[str]:
    """Starts the command, in a group of its own."""
    environment = {**os.environ, "PYTHONPATH": TESTS}
    environment.pop("TEACHER_API_KEY", None)
    if key is not None:
        environment["TEACHER_API_KEY"] = key
    return subprocess.Popen(
        [sys.executable, "-m", "services", str(config), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextmanager
def started(config: Path, *arguments: str, key: str | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and the URL that it printed; its model is in the same process, unless another word is said."""
    process = command(config, "--port", "0", *HERE, *arguments, key=key)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.rpartition(" at ")[2].strip()
        assert url.startswith("http://"), process.communicate()
        wait_until(lambda: ready(url) == 200, 60)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def ready(url: str) -> int:
    """The status of readyz, 0 where nobody listens."""
    try:
        return httpx.get(f"{url.rpartition('/')[0]}/readyz").status_code
    except httpx.TransportError:
        return 0


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_it_answers_drains_and_ends_with_0(config: Path) -> None:
    slow = ("--set", "teacher.model=toy_service_models:SlowNet", "--set", "service.drain_seconds=1")
    with started(config, "--name", "mine", *slow, key="some-key") as (process, url):
        assert url.endswith("/mine")
        answers: list[Prediction] = []
        with TeacherClient(url, "some-key") as client:
            assert client.card().name == "mine"
            # Four batches of half a second: they outlive the second in which the door is still open.
            asking = threading.Thread(target=lambda: answers.append(client.predict(views(32))))
            asking.start()
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            statuses = [ready(url) for _ in range(3) if time.sleep(0.1) is None]
            asking.join()
        code, errors = ended(process)
    assert statuses[-1] == 503
    assert answers[0].values is not None
    assert answers[0].values.shape == (32, 7)
    assert code == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    assert {line["level"] for line in lines} == {"info"}
    (predicted,) = [line for line in lines if line.get("images")]
    assert (predicted["images"], predicted["status"], predicted["key"]) == (32, 200, "TEACHER_API_KEY")
    assert "some-key" not in errors


LOAD = """
import collections, json, sys, threading, httpx
from services.wire import pack_images, unpack_tensors
from toy_service_models import views
base, names, found, over = sys.argv[1], sys.argv[2].split(","), collections.Counter(), threading.Event()
headers = {"Content-Type": "application/safetensors", "X-Deadline-Ms": "60000"}
def ask(number):
    with httpx.Client(timeout=60) as client:
        while not over.is_set():
            count = 1 + (number + sum(found.values())) % 8
            url = f"{base}/v1/teachers/{names[number % len(names)]}/predict"
            images = views(count, 1000 * number + sum(found.values()))
            try:
                answer = client.post(url, content=pack_images(images), headers=headers)
                whole = answer.status_code != 200 or unpack_tensors(answer.content)["values"].shape == (count, 7)
                found[str(answer.status_code) if whole else "torn"] += 1
            except httpx.HTTPError as error:
                found[repr(error)] += 1
threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
[thread.start() for thread in threads]
print("asking", flush=True)
while httpx.get(f"{base}/readyz").json().get("value") != "draining":
    pass
over.set()
[thread.join() for thread in threads]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_under_load_everything_that_was_taken_on_is_answered(config: Path, tmp_path: Path) -> None:
    """Two teachers, full queues, requests on their way to each: all that were sent while the door was open."""
    other = tmp_path / "other.yaml"
    described = yaml.safe_load(config.read_text())
    described["teacher"]["name"] = "other"
    other.write_text(yaml.safe_dump(described))
    limits = ("service.drain_seconds=3", "service.max_images=8", "service.queue_images=8")
    slow = ["--log-level=warning", *(word for limit in limits for word in ("--set", limit))]
    with started(config, str(other), "--set", "teacher.model=toy_service_models:SlowNet", *slow) as (process, url):
        base = url.rpartition("/")[0]
        asking = [sys.executable, "-c", LOAD, base, "colour,other"]
        with subprocess.Popen(asking, env=dict(os.environ), stdout=subprocess.PIPE, text=True) as load:
            assert load.stdout is not None
            assert load.stdout.readline() == "asking\n"
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            found = json.loads(load.communicate(timeout=60)[0])
        code, errors = ended(process)
    assert found.keys() == {"200", "503"}
    assert min(found.values()) > 1
    assert (code, errors) == (0, "")


def test_several_teachers_are_served_side_by_side(config: Path, tmp_path: Path) -> None:
    """Each has its own number of threads, and the bits of its own serial build."""
    wide = {"model": "toy_service_models:WideNet", "fields": {"logits": {"encoding": "dense_f32"}}}
    configs, caches = [], {}
    for threads in (1, 2):
        spec = colour_spec(tmp_path, f"cache-{threads}", name=f"wide-{threads}", **wide)
        spec = spec.model_copy(update={"compute": spec.compute.model_copy(update={"threads": threads})})
        tc.build(spec, executor="serial")
        caches[spec.teacher.name] = tc.open(tmp_path / f"cache-{threads}")
        configs.append(tmp_path / f"{threads}.yaml")
        configs[-1].write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    rows = list(range(8))  # The first micro-batch of the first shard.
    expected = {name: torch.as_tensor(cache.read("logits", view=0, rows=rows).values) for name, cache in caches.items()}
    assert not torch.equal(expected["wide-1"], expected["wide-2"])
    with started(configs[0], str(configs[1]), "--set", "service.max_images=8") as (process, url):
        base = url.rpartition("/")[0]
        assert [one["name"] for one in httpx.get(f"{base}/v1/teachers").json()["teachers"]] == ["wide-1", "wide-2"]
        clients = {name: TeacherClient(f"{base}/{name}") for name in caches}
        with ThreadPoolExecutor(8) as pool:
            images = torch.as_tensor(caches["wide-1"].render(view=0, rows=rows))
            asked = [
                (name, pool.submit(clients[name].predict, images)) for name in (*caches, *caches) for _ in range(4)
            ]
            for name, answer in asked:
                assert torch.equal(torch.as_tensor(answer.result(30).values), expected[name])
        for client in clients.values():
            client.close()
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0


def test_the_served_key_is_required(config: Path) -> None:
    quiet = ("--log-level", "warning")
    with started(config, "--set", "service.max_images=8", *quiet, key="some-key") as (process, url):
        base = url.rpartition("/")[0]
        assert httpx.get(f"{base}/v1/teachers").status_code == 401
        answer = httpx.get(f"{base}/v1/teachers", headers={"Authorization": "Bearer some-key"}).json()
        assert answer["teachers"][0]["limits"]["images"] == 8
        process.send_signal(signal.SIGINT)
        code, errors = ended(process)
    assert (code, errors) == (0, "")


def test_answers_are_not_held_back_by_nagle() -> None:
    with bind(LOOPBACK, 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # asyncio sets TCP_NODELAY on such sockets only


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the entry point here; it must end with 2 and one line, which is returned."""
    monkeypatch.setattr(sys, "argv", ["teacher-serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_a_port_in_use_is_said_at_once(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("services.__main__.open_served", None)  # Not reached: loading may take a minute.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(monkeypatch, capsys, str(config), "--port", str(port))
    assert line.startswith(f"error: --port: must be free on this machine (found: {port}). ")
    assert "0 takes a free one" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "host: needs an api_key"),
        (["--host", "192.0.2.1"], "host: needs an api_key"),
        (["--set", "service.max_imgaes=3"], "Did you mean `max_images`?"),
        (
            [*HERE, "--set", "service.max_images=4", "--port", "0"],
            "max_images: must allow a whole micro-batch",
        ),
        (["--set", "service.max_images"], "--set: must be KEY=VALUE"),
        (["--set", "service.port=9"], "--set"),
        (["--set", "service.state=folder"], "--state"),
        (["--state", "/proc/none", "--port", "0"], "state: must be a writable folder"),
        (["--set", "teacher.micro_batch=0"], "teacher.micro_batch"),
        (["--name", "no/slash"], "teacher.name"),
        (["SAME"], "teacher.name: must be another for each teacher"),
        (["SAME", "--name", "mine"], "--name: names one teacher"),
        (
            [*HERE, "--set", "service.queue_bytes=9", "--port", "0"],
            "queue_bytes: must hold the largest request to colour",
        ),
        (["--port", "65536"], "port"),
    ],
)
def test_wrong_requests_end_with_2_and_one_line(
    config: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TEACHER_API_KEY", raising=False)
    given = [str(config) if argument == "SAME" else argument for argument in arguments]
    assert words in refused(monkeypatch, capsys, str(config), *given)


def test_an_address_of_another_machine_is_explained(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", "some-key")
    line = refused(monkeypatch, capsys, str(config), "--host", "192.0.2.1", "--port", "0")
    assert "--host: cannot be bound" in line


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml" in refused(monkeypatch, capsys, "none.yaml")
