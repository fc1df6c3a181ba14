"""Keys: never stored, never guessed by time, taken up and ended while the server runs, and asked for everywhere."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route
from toy_service_models import ToyTeacher, open_gate, running, serving, toy_served, views, wait_until

from services import identity, keys
from services.__main__ import main
from services.app import create_app
from services.books import Books
from services.identity import OPEN_PATHS
from services.page import PATHS
from services.policy import Policy
from services.settings import Settings
from services.state_folder import StateFolder
from services.wire import pack_images
from teacher_cache.errors import SpecError

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    """A folder that is not there yet."""
    return StateFolder(tmp_path / "state")


def bearer(key: str) -> dict[str, str]:
    """The header."""
    return {"Authorization": f"Bearer {key}"}


def status(client: httpx.Client, key: str, place: str = "/v1/teachers") -> int:
    """Of a request with this key."""
    return client.get(place, headers=bearer(key)).status_code


@contextmanager
def served(folder: StateFolder, **settings: Any) -> Iterator[httpx.Client]:
    """A server with this folder."""
    with serving(toy_served(open_gate(ToyTeacher())), state=folder.path, **settings) as client:
        yield client


# ---------------------------------------------------------------- the file


def test_the_file_has_a_digest_under_the_secret_and_not_the_key(folder: StateFolder) -> None:
    key = keys.add(folder, "alice", Policy(images_per_day=5))
    text = folder.keys.read_text()
    secret = bytes.fromhex(folder.secret.read_text())
    assert json.loads(text)["keys"]["alice"]["policy"] == {"images_per_day": 5}
    found = json.loads(text)["keys"]["alice"]["hmac_sha256"]
    assert found == hmac.new(secret, key.encode(), hashlib.sha256).hexdigest()
    assert len(secret) == 32
    assert len(key) >= 43
    for file in folder.path.iterdir():
        assert key.removeprefix("ts_") not in file.read_text()
        assert file.stat().st_mode & 0o777 == 0o600
    assert folder.path.stat().st_mode & 0o777 == 0o700


def test_two_keys_are_not_alike_and_names_are_not_used_twice(folder: StateFolder) -> None:
    assert keys.add(folder, "alice", Policy()) != keys.add(folder, "bob", Policy())
    with pytest.raises(SpecError, match="must be new"):
        keys.add(folder, "alice", Policy())
    assert keys.revoke(folder, "alice") is True
    assert keys.revoke(folder, "alice") is False
    with pytest.raises(SpecError, match="must be new"):
        keys.add(folder, "alice", Policy())
    with pytest.raises(SpecError, match=r"alice, bob"):
        keys.revoke(folder, "carol")


@pytest.mark.parametrize("name", ["", "TEACHER_API_KEY", "(no key)", "two words", "a/b", "-a", "x" * 65, "é", "a\n"])
def test_names_are_plain(folder: StateFolder, name: str) -> None:
    with pytest.raises(SpecError):
        keys.add(folder, name, Policy())
    assert not folder.keys.exists()


def test_a_failed_replacement_leaves_the_keys_of_before(folder: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.add(folder, "alice", Policy())
    before = folder.keys.read_bytes()

    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(SpecError, match="No space"):
            keys.add(folder, "bob", Policy())
    assert folder.keys.read_bytes() == before
    assert {file.name for file in folder.path.iterdir()} == {"keys.json", "keys.lock", "secret"}


def test_commands_at_the_same_time_lose_nothing(folder: StateFolder) -> None:
    def add_many(number: int) -> None:
        for count in range(5):
            keys.add(folder, f"key-{number}-{count}", Policy())

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add_many, range(4)))
    assert len(keys.read(folder.keys).keys) == 20


def test_a_secret_that_is_open_gone_or_broken_is_refused(folder: StateFolder) -> None:
    keys.add(folder, "alice", Policy())
    folder.secret.chmod(0o640)
    with pytest.raises(SpecError, match="chmod 600"):
        Books(Settings(state=folder.path))
    folder.secret.chmod(0o600)
    folder.secret.write_text("short")
    with pytest.raises(SpecError, match="64 hexadecimal"):
        Books(Settings(state=folder.path))
    folder.secret.unlink()
    with pytest.raises(SpecError, match="secret of its keys"):
        Books(Settings(state=folder.path))
    assert not folder.secret.exists(), "a new one would make every key a wrong one, in silence"


BROKEN = {
    "text": "nothing",
    "a list": "[]",
    "another format": '{"format": 2}',
    "an unknown limit": '{"keys": {"a": {"hmac_sha256": "%s", "created": "2026-01-01T00:00:00Z", '
    '"policy": {"image_per_day": 3}}}}' % ("0" * 64),
    "one key under two names": '{"keys": {"a": %s, "b": %s}}'
    % (('{"hmac_sha256": "%s", "created": "2026-01-01T00:00:00Z"}' % ("0" * 64),) * 2),
    "a key in the clear": '{"keys": {"a": {"key": "ts_1", "created": "2026-01-01T00:00:00Z"}}}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_at_the_start(folder: StateFolder, name: str) -> None:
    keys.add(folder, "alice", Policy())
    folder.keys.write_text(BROKEN[name])
    with pytest.raises(SpecError):
        Books(Settings(state=folder.path))


def test_a_folder_has_one_server(folder: StateFolder) -> None:
    first = Books(Settings(state=folder.path))
    with pytest.raises(SpecError, match="another server"):
        Books(Settings(state=folder.path))
    first.close()
    Books(Settings(state=folder.path)).close()


def test_beyond_loopback_a_valid_key_is_needed(folder: StateFolder) -> None:
    with pytest.raises(SpecError, match="host"):
        Settings(host="0.0.0.0")
    settings = Settings(host="0.0.0.0", state=folder.path)
    with pytest.raises(SpecError, match="needs a valid key"):
        Books(settings)
    keys.add(folder, "late", Policy(expires=datetime.now(UTC) - timedelta(seconds=1)))
    keys.add(folder, "gone", Policy())
    keys.revoke(folder, "gone")
    with pytest.raises(SpecError, match="needs a valid key"):
        Books(settings)
    keys.add(folder, "alice", Policy())
    Books(settings).close()


# ---------------------------------------------------------------- the door


def requests_of(routes: list[Any]) -> Iterator[tuple[str, str]]:
    """Method and path of everything that an application answers; whatever is not a plain route fails."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from requests_of(inner.routes)
            continue
        assert isinstance(route, Route), f"{route} is of a kind that this test does not walk"
        for method in route.methods or ():
            yield method, re.sub(r"\{[^}]*\}", "toy", route.path)


def test_every_route_but_the_probes_and_the_page_asks_for_a_key(folder: StateFolder) -> None:
    key = keys.add(folder, "alice", Policy())
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings(state=folder.path))
    asked = set(requests_of(app.routes))
    assert {("GET", "/v1/usage"), ("POST", PREDICT), ("GET", "/openapi.json"), ("GET", "/livez"), ("GET", "/")} <= asked
    with running(app) as url, httpx.Client(base_url=url) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        for method, path in asked:
            without = client.request(method, path)
            wrong = client.request(method, path, headers=bearer("ts_wrong"))
            if path in OPEN_PATHS | PATHS:
                assert without.status_code == 200
                continue
            assert without.status_code == wrong.status_code == 401, (method, path)
            assert client.request(method, path, headers=bearer(key)).status_code != 401
    assert {"/livez", "/readyz"} == OPEN_PATHS


def test_keys_come_and_go_while_the_server_runs(folder: StateFolder) -> None:
    with served(folder) as client:
        assert client.get("/v1/teachers").status_code == 401, "a folder without keys lets nobody in"
        alice = keys.add(folder, "alice", Policy())
        assert status(client, alice) == 200
        bob = keys.add(folder, "bob", Policy())
        assert (status(client, alice), status(client, bob)) == (200, 200)
        keys.revoke(folder, "alice")
        assert (status(client, alice), status(client, bob)) == (401, 200)
        folder.keys.unlink()
        assert status(client, bob) == 401


def test_a_file_that_breaks_lets_nobody_in_until_it_is_repaired(folder: StateFolder) -> None:
    alice, environment = keys.add(folder, "alice", Policy()), "from-the-environment"
    whole = folder.keys.read_bytes()
    with served(folder, api_key=environment) as client:
        assert status(client, alice) == 200
        folder.keys.write_bytes(whole[:-20])
        answer = client.get("/v1/teachers", headers=bearer(alice))
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert str(folder.path) not in answer.text
        assert status(client, environment) == 200
        folder.keys.write_bytes(whole)
        assert status(client, alice) == 200


def test_an_expired_key_is_told_so(folder: StateFolder) -> None:
    key = keys.add(folder, "late", Policy(expires=datetime.now(UTC) + timedelta(seconds=1)))
    with served(folder) as client:
        assert status(client, key) == 200
        wait_until(lambda: status(client, key) != 200)
        for place in ("/v1/teachers", "/v1/usage", "/openapi.json"):
            answer = client.get(place, headers=bearer(key))
            assert (answer.status_code, answer.json()["field"]) == (403, "expires")


def test_the_environments_key_has_all_rights_and_a_name(folder: StateFolder) -> None:
    with served(folder, api_key="all-rights") as client:
        answer = client.post(PREDICT, content=pack_images(views(3)), headers={**TENSORS, **bearer("all-rights")})
        assert answer.status_code == 200
        usage = client.get("/v1/usage", headers=bearer("all-rights")).json()
    assert (usage["key"], usage["images"]) == ("TEACHER_API_KEY", 3)


def test_every_key_is_compared_in_constant_time(folder: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No way out of the comparison early: all digests, for the first key, for the last, and for none."""
    found = [keys.add(folder, name, Policy()) for name in "abc"]
    compared: list[tuple[Any, Any]] = []

    class Counting:
        @staticmethod
        def compare_digest(one: Any, other: Any) -> bool:
            compared.append((one, other))
            return hmac.compare_digest(one, other)

    with served(folder, api_key="all-rights") as client:
        monkeypatch.setattr(identity, "hmac", Counting)
        for key in (*found, "wrong", "all-rights"):
            compared.clear()
            assert (status(client, key) == 200) == (key != "wrong")
            assert len(compared) == 4
            # Digests, and so of one length: the length of a key is not told either.
            assert {len(value) for pair in compared for value in pair} == {64}


# ---------------------------------------------------------------- the commands


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["teacher-serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_commands(folder: StateFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    state = ("--state", folder.path)
    limits = ("--set", "outputs=[topk]", "--set", "largest_k=3", "--set", "temperatures={low: 1, high: 4}")
    assert run(monkeypatch, "keys", "add", "alice", *state, *limits) == 0
    key = capsys.readouterr().out.strip()
    assert "\n" not in key
    with served(folder) as client:
        assert status(client, key) == 200
    assert run(monkeypatch, "keys", "list", *state) == 0
    shown = capsys.readouterr().out
    assert "alice" in shown
    assert "valid" in shown
    assert run(monkeypatch, "keys", "revoke", "alice", *state) == 0
    assert capsys.readouterr().out == "alice is revoked\n"
    assert run(monkeypatch, "keys", "list", "--json", *state) == 0
    shown = capsys.readouterr().out
    (listed,) = json.loads(shown)
    assert (listed["name"], listed["state"]) == ("alice", "revoked")
    assert listed["policy"]["temperatures"] == {"low": 1.0, "high": 4.0}
    assert "hmac" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["keys", "add", "Alice"], "Alice"),
        (["keys", "add", "a", "--set", "image_per_day=3"], "Did you mean `images_per_day`?"),
        (["keys", "add", "a", "--set", "largest_k=3"], "largest_k: has no effect"),
        (["keys", "add", "a", "--set", "outputs"], "must be KEY=VALUE"),
        (["keys", "add", "a", "--set", "outputs=["], "YAML"),
        (["keys", "add", "a", "--set", "outputs=[pickle]"], "outputs"),
        (["keys", "add", "a", "--set", "expires=2027-01-01"], "expires"),
        (["keys", "add", "a", "--set", "temperatures={low: 4, high: 1}"], "low ≤ high"),
        (["keys", "revoke", "a"], "must be one of the keys"),
    ],
)
def test_wrong_commands_end_with_2_and_one_line(
    folder: StateFolder,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *arguments, "--state", folder.path) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert shown.err.count("\n") == 1


def test_where_no_key_is_asked_for_a_page_elsewhere_cannot_ask_through_a_browser() -> None:
    """DNS rebinding: the name is another one, and means this machine."""
    with serving(toy_served(open_gate(ToyTeacher()))) as client:
        for host, status in (
            ("127.0.0.1:8000", 200),
            ("localhost", 200),
            ("[::1]:9", 200),
            ("evil.example:8000", 421),
            ("", 421),
        ):
            answer = client.get("/v1/teachers", headers={"Host": host})
            assert answer.status_code == status, host
        assert client.get("/livez", headers={"Host": "evil.example"}).status_code == 200
    with serving(toy_served(open_gate(ToyTeacher())), api_key="some-key") as client:
        headers = {"Host": "teachers.example", "Authorization": "Bearer some-key"}
        assert client.get("/v1/teachers", headers=headers).status_code == 200
