"""The log: one object a line, facts of every request, nothing that a stranger wrote; nobody waits for its reader.

Metrics and the audit are held to the same.
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import httpx
import pytest
from torch import Tensor
from toy_service_models import POISON, ToyTeacher, open_gate, picture, running, toy_served, views, wait_until

from services import keys
from services.app import create_app
from services.logs import Level, logging_to
from services.policy import Policy
from services.settings import Settings
from services.state_folder import StateFolder
from services.wire import pack_images

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}
SECRET = "s3cr3t-0f-somebody"


class Talkative(ToyTeacher):
    """Its errors quote what it was asked."""

    def __call__(self, views_BCHW: Tensor) -> dict[str, Tensor]:
        try:
            return super().__call__(views_BCHW)
        except ArithmeticError:
            raise ArithmeticError(f"{SECRET}: {views_BCHW.flatten().tolist()}") from None


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is logged at `info` in a test; read it after the server has ended."""
    stream = io.StringIO()
    with logging_to(stream, Level.INFO):
        yield stream


def lines(stream: io.StringIO, count: int) -> list[dict[str, Any]]:
    """So many lines of requests, once they are written."""

    def found() -> list[dict[str, Any]]:
        parsed = [json.loads(line) for line in stream.getvalue().splitlines()]
        return [line for line in parsed if line["logger"] == "services.requests"]

    wait_until(lambda: len(found()) >= count)
    assert len(found()) == count
    return found()


def test_each_request_has_one_line_of_facts(stream: io.StringIO, tmp_path: Path) -> None:
    key = keys.add(StateFolder(tmp_path / "state"), "alice", Policy(largest_k=2, outputs=("topk",)))
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings(state=tmp_path / "state"))
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        asked = {**TENSORS, "Authorization": f"Bearer {key}", "X-Request-Id": "mine"}
        body = pack_images(views(3))
        answer = client.post(f"{PREDICT}?output=topk&k=2", content=body, headers=asked)
        client.post(f"{PREDICT}?output=topk&k=3", content=body, headers=asked)
        client.get("/nowhere")
        good, refused, stranger = lines(stream, 3)
    assert answer.status_code == 200
    times = good.pop("parts")
    assert list(times) == ["body", "decode", "queue", "model", "encode", "record"]
    assert sum(times.values()) <= good.pop("seconds")
    assert good.pop("time").endswith("+00:00")
    assert "POST /v1/teachers/{name}/predict 200" in good.pop("message")
    assert good == {
        "level": "info",
        "logger": "services.requests",
        "request_id": "mine",
        "key": "alice",
        "teacher": "toy",
        "method": "POST",
        "route": "/v1/teachers/{name}/predict",
        "status": 200,
        "limit": None,
        "images": 3,
        "bytes_in": len(body),
        "bytes_out": len(answer.content),
        "cache_hits": 0,
        "cache_misses": 0,
    }
    assert (refused["status"], refused["limit"], refused["key"]) == (403, "largest_k", "alice")
    assert (stranger["status"], stranger["key"], stranger["route"]) == (401, None, None)


def test_good_probes_are_not_worth_a_line_and_bad_ones_are(stream: io.StringIO) -> None:
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings())
    with running(app) as url:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        before = len(stream.getvalue().splitlines())
        httpx.get(f"{url}/livez")
        assert httpx.get(f"{url}/v1/load").status_code == 200
        app.state.service.draining = True
        httpx.get(f"{url}/readyz")
        wait_until(lambda: len(stream.getvalue().splitlines()) > before)
    last = json.loads(stream.getvalue().splitlines()[before])
    assert (last["route"], last["status"]) == ("/readyz", 503)


def secretive(client: httpx.Client, key: str) -> list[httpx.Response]:
    """Requests with a secret in every place where one can be."""
    good, bearer = pack_images(views(1)), {"Authorization": f"Bearer {key}"}
    poison = views(1)
    poison[0, 0, 0, 0] = POISON
    secret_png = picture("PNG")[:60] + SECRET.encode()
    header = {
        "User-Agent": SECRET,
        "Referer": f"http://{SECRET}/",
        "Cookie": f"session={SECRET}",
        "Content-Disposition": f'attachment; filename="{SECRET}.png"',
        "X-Forwarded-For": SECRET,
        "X-Request-Id": f"{SECRET} <",
        SECRET: SECRET,
    }
    asked: list[tuple[str, str, bytes, dict[str, str]]] = [
        ("POST", PREDICT, good, header),
        ("POST", PREDICT, good, {"Authorization": f"Basic {SECRET}"}),
        ("POST", PREDICT, good, {"Authorization": f"Bearer wrong-{SECRET}"}),
        ("POST", PREDICT, SECRET.encode(), {}),
        ("POST", PREDICT, pack_images(poison), {}),
        ("POST", PREDICT, secret_png, {"Content-Type": "image/png"}),
        ("POST", PREDICT, b'{"images": "' + SECRET.encode(), {"Content-Type": "application/json"}),
        ("POST", PREDICT, good, {"Content-Type": f"text/{SECRET}"}),
        ("POST", PREDICT, good, {"Accept": SECRET}),
        ("POST", PREDICT, good, {"If-Match": f'"{SECRET}"'}),
        ("GET", f"/{SECRET}/{SECRET}?{SECRET}={SECRET}", b"", {}),
        ("GET", f"/v1/teachers/{SECRET}", b"", {}),
        (SECRET.upper().replace("-", ""), "/v1/teachers", b"", {}),
    ]
    return [
        client.request(method, place, content=body, headers={**TENSORS, **bearer, **extra})
        for method, place, body, extra in asked
    ]


def test_a_secret_in_any_place_is_nowhere_in_log_audit_and_metrics(stream: io.StringIO, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    key = keys.add(folder, "alice", Policy())
    app = create_app({"toy": toy_served(open_gate(Talkative()))}, Settings(state=folder.path))
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        answers = secretive(client, key)
        found = [answer.status_code for answer in answers]
        assert found == [200, 401, 401, 422, 500, 422, 415, 415, 200, 412, 404, 404, 405]
        lines(stream, len(answers))
        kept = {
            "log": stream.getvalue(),
            "audit": folder.audit.read_text(),
            "metrics": app.state.metrics.text("")[0].decode(),
        }
    for name, text in kept.items():
        for secret in (SECRET, SECRET.upper().replace("-", ""), key, "Bearer"):
            assert secret not in text, name
    # What a client wrote itself may be quoted back to it: the option, the path, the type; never the body or a header.
    for answer in (answers[number] for number in (0, 1, 2, 3, 4, 5, 6, 8)):
        assert SECRET.encode() not in answer.content
        assert key.encode() not in answer.content


def test_a_defect_is_logged_by_its_type_and_place_alone(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr("services.predicting.respond", fails)
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings())
    with running(app) as url:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        answer = httpx.post(url + PREDICT, content=pack_images(views(1)), headers={**TENSORS, "X-Request-Id": "one"})
        lines(stream, 1)
    assert answer.status_code == 500
    assert SECRET not in stream.getvalue()
    (defect,) = (line for line in map(json.loads, stream.getvalue().splitlines()) if "at" in line)
    assert defect["message"].startswith("request one failed: RuntimeError in test_service_logs.py:")
    assert defect["at"][-1].endswith(" fails")
    assert defect["level"] == "error"


def logged(stream: TextIO, level: Level) -> None:
    """A line of each kind."""
    with logging_to(stream, level):
        logging.getLogger("services").debug("ours in detail")
        logging.getLogger("services").info("ours %s", "here", extra={"facts": {"key": "alice", "images": 2}})
        logging.getLogger("PIL.PngImagePlugin").debug(SECRET)
        logging.getLogger("somebody").info(SECRET)
        logging.getLogger("somebody").warning("theirs")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("python's", UserWarning, stacklevel=1)
        try:
            raise KeyError("lost")
        except KeyError:
            logging.getLogger("services").exception("broken")


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (Level.DEBUG, ["ours in detail", "ours here", "theirs", "broken"]),
        (Level.INFO, ["ours here", "theirs", "broken"]),
        (Level.WARNING, ["theirs", "broken"]),
        (Level.ERROR, ["broken"]),
    ],
)
def test_each_level_has_its_lines_and_others_are_heard_at_their_worst_only(level: Level, expected: list[str]) -> None:
    stream = io.StringIO()
    logged(stream, level)
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in found if "python's" not in line["message"]] == expected
    assert any("python's" in line["message"] for line in found) == (level is not Level.ERROR)
    assert "KeyError: 'lost'" in found[-1]["error"]
    assert SECRET not in stream.getvalue()


def test_at_a_terminal_lines_are_for_people() -> None:
    stream = Terminal()
    logged(stream, Level.INFO)
    assert "INFO     ours here key=alice images=2\n" in stream.getvalue()
    assert "KeyError: 'lost'" in stream.getvalue()


def test_logging_is_as_it_was_afterwards() -> None:
    before = [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in ("", "services")]
    logged(io.StringIO(), Level.DEBUG)
    after = [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in ("", "services")]
    assert after == before


def test_a_reader_that_does_not_read_stops_nobody_and_is_told_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.logs._MOST", 10)
    reading, writing = os.pipe()
    found: list[str] = []
    with os.fdopen(reading) as reader, os.fdopen(writing, "w") as pipe:
        with logging_to(pipe, Level.INFO):
            for number in range(5000):
                logging.getLogger("services").info("%d %s", number, "x" * 100)
            reads = threading.Thread(target=lambda: found.extend(reader))
            reads.start()
            wait_until(lambda: len(found) > 100)
            logging.getLogger("services").info("again")
        pipe.close()
        reads.join()
    messages = [json.loads(line)["message"] for line in found]
    assert messages[-1] == "again"
    lost = [message for message in messages if "were lost" in message]
    assert sum(int(message.split()[0]) for message in lost) + len(messages) - len(lost) == 5001
