"""A question for which there is no room is turned away before it is parsed, and as whoever parses it would."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from toy_service_models import ToyTeacher, colour_spec, open_gate, running, serving, toy_served, views, wait_until

import teacher_cache as tc
from services import keys
from services.app import create_app
from services.library import Library
from services.policy import Policy
from services.routes import PREDICT as ROUTE
from services.settings import Settings
from services.state_folder import StateFolder
from services.teachers import open_served
from services.wire import pack_images

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}


@contextmanager
def full(
    tmp_path: Path, library: Library | None = None, **given: Any
) -> Iterator[tuple[httpx.Client, dict[str, str], Any]]:
    """A service whose queue is full, a header for each of two keys, and the app."""
    folder = StateFolder(tmp_path / "state")
    policies = {"all": Policy(), "other": Policy(teachers=("other",))}
    headers = {name: f"Bearer {keys.add(folder, name, policy)}" for name, policy in policies.items()}
    teacher = ToyTeacher()
    settings = Settings(state=tmp_path / "state", max_images=8, queue_images=8, **given)
    app = create_app({"toy": replace(toy_served(teacher), library=library)}, settings)
    with running(app) as base, httpx.Client(base_url=base, timeout=30) as client:
        waiting = [threading.Thread(target=ask, args=(client, headers["all"], seed)) for seed in range(2)]
        waiting[0].start()
        assert teacher.entered.acquire(timeout=20)
        waiting[1].start()
        wait_until(lambda: client.get("/readyz").status_code == 503)
        try:
            yield client, headers, app
        finally:
            teacher.gate.set()
            [thread.join() for thread in waiting]


def ask(client: httpx.Client, key: str, seed: int = 0, **headers: str) -> httpx.Response:
    content = pack_images(views(8, seed))
    return client.post(PREDICT, content=content, headers={**TENSORS, "Authorization": key, **headers})


def library(folder: Path, *, cached: bool, built: bool = False) -> Library:
    """The samples of a configuration, as every teacher has them that a configuration names."""
    spec = colour_spec(folder / "data", "local")
    if built:
        tc.build(spec, executor="serial")
    found = open_served(spec, from_cache=cached).library
    assert found is not None
    return found


@pytest.mark.parametrize("cached", [None, False, True], ids=["no samples", "never cached", "not cached yet"])
def test_it_is_refused_unparsed_and_counted_as_that_question(
    cached: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*_given: object) -> None:
        raise AssertionError("it was parsed")

    samples = None if cached is None else library(tmp_path, cached=cached)
    with full(tmp_path, samples) as (client, headers, app):
        monkeypatch.setattr("services.predicting.media_type_of", parsed)
        answer = ask(client, headers["all"])
        assert (answer.status_code, answer.json()["field"]) == (503, "queue")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["content-type"] == "application/problem+json"
        labels = f'method="POST",route="{ROUTE}",status="503",teacher="toy"'
        counted = f"teacher_serve_requests_total{{{labels}}} 1.0"
        # The last of an answer may arrive before it is counted.
        wait_until(lambda: counted in app.state.metrics.text("")[0].decode())
    lines = (tmp_path / "state" / "audit.jsonl").read_text().splitlines()
    assert sum(f'"{ROUTE}"' in line and '"refused"' in line for line in lines) == 1


def test_who_may_not_ask_this_teacher_learns_nothing_of_its_queue(tmp_path: Path) -> None:
    with full(tmp_path) as (client, headers, _):
        assert ask(client, headers["other"]).status_code == 403
        assert client.post(PREDICT, content=b"").status_code == 401
        late = ask(client, headers["all"], **{"X-Deadline-Ms": "soon"})
        assert (late.status_code, late.json()["field"]) == (400, "X-Deadline-Ms")


def test_a_deadline_that_passes_meanwhile_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond may be over before the queue is looked at."""
    monkeypatch.setattr("services.turnstile.deadline_in", lambda _header, arrived: arrived - 1)
    with serving(toy_served(open_gate(ToyTeacher()))) as client:
        assert client.post(PREDICT, content=pack_images(views(1)), headers=TENSORS).status_code == 200


def test_other_questions_pass(tmp_path: Path) -> None:
    with full(tmp_path) as (client, headers, _):
        asked = {"Authorization": headers["all"]}
        assert client.get("/v1/teachers/toy", headers=asked).status_code == 200
        assert client.get(PREDICT, headers=asked).status_code == 405


def test_a_journal_may_have_the_answer(tmp_path: Path) -> None:
    with full(tmp_path, journal=tmp_path / "journal") as (client, headers, _):
        cards = {"Authorization": headers["all"], "Content-Type": "nonsense"}
        assert client.post(PREDICT, content=b"", headers=cards).status_code == 415


def test_a_cache_may_have_the_answer(tmp_path: Path) -> None:
    with full(tmp_path, library(tmp_path, cached=True, built=True)) as (client, headers, _):
        asked = {"keys": ["images/3"], "views": [1]}
        found = client.post(PREDICT, json=asked, headers={"Authorization": headers["all"]})
        assert (found.status_code, found.json()["status"]) == (200, ["cached"])


def test_what_no_model_is_to_be_asked_passes(tmp_path: Path) -> None:
    with full(tmp_path, library(tmp_path, cached=False)) as (client, headers, _):
        asked = {"keys": ["images/3"], "views": [1]}
        found = client.post(f"{PREDICT}?cache=only", json=asked, headers={"Authorization": headers["all"]})
        assert found.status_code == 404


def test_past_the_turnstile_it_is_refused_before_its_body(tmp_path: Path) -> None:
    """Where a journal might have the answer, but is not to be asked."""
    with full(tmp_path, journal=tmp_path / "journal") as (client, headers, _):
        place = client.base_url
        with contextlib.closing(http.client.HTTPConnection(place.host, place.port, timeout=10)) as link:
            link.putrequest("POST", f"{PREDICT}?cache=bypass")
            for name, value in {**TENSORS, "Authorization": headers["all"], "Content-Length": "200"}.items():
                link.putheader(name, value)
            link.endheaders()
            assert link.getresponse().status == 503
