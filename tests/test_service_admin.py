"""The admin's port: metrics and load for all on this machine, drain and keys for the owner, nothing for browsers."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_service_command import config, ended, ready, refused, started
from toy_service_models import ToyTeacher, open_gate, running, toy_served, views, wait_until

from services import keys
from services.admin import Admin
from services.app import create_app
from services.client import Prediction, TeacherClient
from services.policy import Policy
from services.settings import Settings
from services.state_folder import StateFolder
from teacher_cache.errors import SpecError

__all__ = ["config"]


@contextmanager
def administered(folder: Path | None, drained: list[bool] | None = None) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """A service, and its admin's endpoints: a client of each."""
    found = [] if drained is None else drained
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings(state=folder))
    admin = Admin(app.state.service, app.state.metrics, lambda: found.append(True))
    with running(app) as url, running(admin.app()) as beside:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        with httpx.Client(base_url=url) as client, httpx.Client(base_url=beside) as owner:
            if folder is not None:
                owner.headers["Authorization"] = f"Bearer {StateFolder(folder).admin_token.read_text().strip()}"
            yield client, owner


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state folder that is not there yet."""
    return tmp_path / "state"


def test_metrics_and_load_need_no_token(folder: Path) -> None:
    with administered(folder) as (_, owner):
        del owner.headers["Authorization"]
        answer = owner.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        names = {family.name for family in text_string_to_metric_families(answer.text)}
        assert {"teacher_serve_requests", "process_resident_memory_bytes"} <= names
        load = owner.get("/load").json()
        assert load == {"draining": False, "not_ready": [], "teachers": {"toy": {"images_waiting": 0, "warm": True}}}


def test_keys_are_added_used_listed_and_revoked(folder: Path) -> None:
    with administered(folder) as (client, owner):

        def status(key: str) -> int:
            return client.get("/v1/teachers", headers={"Authorization": f"Bearer {key}"}).status_code

        made = owner.post("/keys", json={"name": "alice", "policy": {"images_per_day": 5, "outputs": ["topk"]}})
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        key = made.json()["key"]
        assert status(key) == 200
        listed = owner.get("/keys").json()
        assert [(one["name"], one["state"]) for one in listed] == [("alice", "valid")]
        assert listed[0]["policy"]["images_per_day"] == 5
        assert key not in owner.get("/keys").text
        assert "hmac" not in owner.get("/keys").text
        assert owner.delete("/keys/alice").json() == {"name": "alice", "revoked": True}
        assert owner.delete("/keys/alice").json() == {"name": "alice", "revoked": False}
        assert status(key) == 401


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "alice"}, "name"),
        ({"name": "A b"}, "keys"),
        ({"policy": {}}, "name"),
        ({"name": "bob", "limits": {}}, "limits"),
        ({"name": "bob", "policy": {"images_per_dya": 5}}, "images_per_dya"),
        ({"name": "bob", "policy": {"largest_k": 5}}, "largest_k"),
        ([], "body"),
    ],
)
def test_wrong_keys_are_refused_and_nothing_is_made(folder: Path, body: Any, field: str) -> None:
    keys.add(StateFolder(folder), "alice", Policy())
    with administered(folder) as (_, owner):
        answer = owner.post("/keys", json=body)
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["field"].startswith(field)
        assert len(owner.get("/keys").json()) == 1
        assert owner.delete("/keys/bob").status_code == 404


CHANGES = [("POST", "/drain"), ("GET", "/keys"), ("POST", "/keys"), ("DELETE", "/keys/alice")]


@pytest.mark.parametrize(("method", "place"), CHANGES)
def test_only_the_owner_of_the_folder_changes_anything(folder: Path, method: str, place: str) -> None:
    drained: list[bool] = []
    key = keys.add(StateFolder(folder), "alice", Policy())
    with administered(folder, drained) as (_, owner):
        for given in ("", "Bearer", "Bearer wrong", f"Bearer {key}", owner.headers["Authorization"][:-1], "Basic x"):
            answer = owner.request(method, place, json={"name": "mallory"}, headers={"Authorization": given})
            assert answer.status_code == 401
            assert key not in answer.text
        assert StateFolder(folder).admin_token.stat().st_mode & 0o777 == 0o600
    assert not drained
    assert [(one["name"], one["state"]) for one in _listed(folder)] == [("alice", "valid")]


def _listed(folder: Path) -> list[dict[str, Any]]:
    from datetime import UTC, datetime

    return keys.listed(StateFolder(folder), datetime.now(UTC))


@pytest.mark.parametrize(("method", "place"), CHANGES)
def test_without_a_folder_nobody_is_the_owner(method: str, place: str) -> None:
    drained: list[bool] = []
    with administered(None, drained) as (_, owner):
        answer = owner.request(method, place, json={"name": "mallory"}, headers={"Authorization": "Bearer x"})
        assert answer.status_code == 403
        assert answer.json()["field"] == "state"
        assert owner.get("/metrics").status_code == 200
    assert not drained


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Host": "localhost@evil.example"},
        {"Host": "[::1].evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-origin"},
    ],
)
def test_browsers_and_other_names_are_refused_everywhere(folder: Path, headers: dict[str, str]) -> None:
    drained: list[bool] = []
    with administered(folder, drained) as (_, owner):
        for method, place in [("GET", "/metrics"), ("GET", "/load"), *CHANGES, ("GET", "/nowhere")]:
            answer = owner.request(method, place, json={"name": "mallory"}, headers=headers)
            assert answer.status_code == 403, place
            assert "evil" not in answer.text
        assert owner.get("/metrics", headers={"Host": "localhost:9"}).status_code == 200
        assert owner.get("/metrics", headers={"Host": "[::1]:9"}).status_code == 200
        assert owner.get("/metrics", headers={"Host": "[::1]"}).status_code == 200
    assert not drained


@pytest.mark.parametrize("client", [("192.0.2.7", 5), ("::ffff:192.0.2.7", 5), None])
def test_another_machine_is_refused_even_where_a_proxy_lets_it_through(client: tuple[str, int] | None) -> None:
    from services.admin import _stranger

    scope = {"type": "http", "headers": [(b"host", b"localhost")], "client": client}
    problem = _stranger(scope)
    assert problem is not None
    assert (problem.status, problem.field) == (403, "address")
    assert _stranger({**scope, "client": ("::1", 5)}) is None


# ---------------------------------------------------------------- the process


def admin_of(process: subprocess.Popen[str]) -> str:
    """The URL on its second line."""
    assert process.stdout is not None
    return process.stdout.readline().rpartition(" at ")[2].strip()


def test_it_stays_until_the_last_answer_has_left(config: Path, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    key = keys.add(folder, "alice", Policy())
    slow = ("--set", "teacher.model=toy_service_models:SlowNet", "--set", "service.drain_seconds=0.8")
    with started(config, "--state", str(folder.path), "--set", "service.admin_port=0", *slow) as (process, url):
        admin = admin_of(process)
        token = {"Authorization": f"Bearer {folder.admin_token.read_text().strip()}"}
        answers: list[Prediction] = []
        with TeacherClient(url, key) as client:
            # Four batches of half a second each.
            asking = threading.Thread(target=lambda: answers.append(client.predict(views(32))))
            asking.start()
            wait_until(lambda: "in_flight 1.0" in httpx.get(f"{admin}/metrics").text)
            for _ in range(2):
                assert httpx.post(f"{admin}/drain", headers=token).json() == {"status": "draining"}
            assert ready(url) == 503
            wait_until(lambda: ready(url) == 0)
            # The door is closed, and the admin still sees what goes on.
            assert asking.is_alive()
            assert httpx.get(f"{admin}/load").json()["draining"] is True
            assert "teacher_serve_draining 1.0" in httpx.get(f"{admin}/metrics").text
            asking.join()
        code, errors = ended(process)
    assert code == 0
    assert answers[0].values is not None
    assert {json.loads(line)["level"] for line in errors.splitlines()} == {"info"}
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{admin}/load")


def test_a_signal_ends_both_and_connections_that_stay_open_do_not_hold_it_up(config: Path) -> None:
    quick = ("--set", "service.drain_seconds=0", "--set", "service.admin_port=0")
    with started(config, *quick) as (process, _), httpx.Client(base_url=admin_of(process)) as client:
        assert client.get("/load").status_code == 200
        begun = time.monotonic()
        process.terminate()
        assert ended(process)[0] == 0
        assert time.monotonic() - begun < 20, "half a minute is what it waits for answers under way"


def test_its_port_is_another_one_and_free(config: Path, monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(SpecError, match="admin_port"):
        Settings(port=8000, admin_port=8000)
    assert Settings(port=0, admin_port=0).admin_port == 0
    monkeypatch.setattr("services.__main__.open_served", None)  # Not reached: loading may take a minute.
    from services.server import LOOPBACK, bind

    with bind(LOOPBACK, 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(monkeypatch, capsys, str(config), "--port", "0", "--set", f"service.admin_port={port}")
    assert "service.admin_port: must be free" in line
