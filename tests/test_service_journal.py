"""The service's journal: an answer is on the disk before it leaves, a build takes it over, and a build that asks a
service by name sends no image."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from test_paid_build import accounts, data_of
from test_service_cache import KEYS, Counting, told
from toy_service_models import colour_spec, running, wait_until

import teacher_cache as tc
from services import keys as key_store
from services.app import create_app
from services.client import TeacherClient
from services.journal_file import NAME
from services.policy import Policy
from services.settings import Settings
from services.state_folder import StateFolder
from services.status import Status
from services.teachers import open_served
from teacher_cache.errors import BuildError, ServiceError, TeacherError
from teacher_cache.spec import BuildSpec, parse
from teacher_cache.teachers import TorchTeacher

QUESTIONS = 10
"""Micro-batches of the toy build."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data set, and the cache `local` that the local teacher built."""
    folder = tmp_path_factory.mktemp("kept")
    tc.build(colour_spec(folder, "local"), executor="serial")
    return folder


@dataclass
class Server:
    """A running service."""

    url: str
    client: TeacherClient
    http: httpx.Client
    teacher: Counting
    stop: Callable[[], None]


Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts services; settings as keywords."""
    with ExitStack() as everything:

        def start(spec: BuildSpec, **given: Any) -> Server:
            stack = everything.enter_context(ExitStack())
            limits = parse(Settings, given, "test")
            plain = open_served(spec, from_cache=limits.from_cache)
            teacher = Counting(plain.teacher)
            app = create_app({"colour": replace(plain, teacher=teacher, example_CHW=None)}, limits)
            base = stack.enter_context(running(app))
            wait_until(lambda: app.state.service.not_ready() == [])
            client = stack.enter_context(TeacherClient(f"{base}/colour"))
            http = stack.enter_context(httpx.Client(base_url=base, timeout=20))
            return Server(f"{base}/colour", client, http, teacher, stack.close)

        yield start


def elsewhere(spec: BuildSpec, cache: Path, **teacher: Any) -> BuildSpec:
    """The same build in another place, its teacher changed."""
    changed = spec.teacher.model_dump() | teacher
    return parse(BuildSpec, spec.model_dump() | {"cache": str(cache), "teacher": changed}, "test")


# ---------------------------------------------------------------- kept before it leaves


def test_what_was_computed_once_is_not_computed_again_even_after_a_restart(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    spec = colour_spec(folder, "unused")
    for first in (True, False):
        server = serve(spec, journal=tmp_path / "journal")
        found = server.client.predict_named(KEYS[:8], 1)
        assert told(found.status) == {Status.COMPUTED if first else Status.KEPT}
        # A neighbour of the same micro-batch: computed with the others.
        assert server.client.predict_named([KEYS[3]], 1, cache="only").status == (Status.KEPT,)
        uploaded = server.client.predict(tc.open(folder / "local").render(view=0, rows=[3, 9]))
        assert told(uploaded.status) == {Status.COMPUTED if first else Status.KEPT}
        assert len(server.teacher.asked) == (2 if first else 0)
        # Another form of the same answer: k and temperature are no part of the question.
        soft = server.client.predict_named([KEYS[5]], 1, output="topk", k=2, temperature=3)
        assert soft.status == (Status.KEPT,)
        server.stop()


def test_the_answer_is_on_the_disk_before_it_leaves(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(colour_spec(folder, "unused"), journal=tmp_path / "journal")
    server.client.predict_named([KEYS[0]])
    # Another process's view of the file: what is not committed is not there.
    with sqlite3.connect(tmp_path / "journal" / NAME) as db:
        assert db.execute("SELECT count(*) FROM answers").fetchone() == (1,)
        assert db.execute("SELECT count(*) FROM tries").fetchone() == (0,)

    def full(*_: object, **__: object) -> None:
        raise BuildError("journal", "the journal cannot be used: disk I/O error", "teacher.journal", "Free space.")

    with monkeypatch.context() as broken:
        broken.setattr("services.answer_table.AnswerTable.put", full)
        answer = server.http.post("/v1/teachers/colour/predict", json={"keys": [KEYS[10]]})
        assert (answer.status_code, answer.json()["field"]) == (503, "journal")
        assert answer.headers["retry-after"] == "5"
    answer = server.http.post("/v1/teachers/colour/predict", json={"keys": [KEYS[10]]})
    assert answer.json()["status"] == ["computed"], "nothing was kept of the answer that did not leave"


def test_refresh_computes_anew_and_bypass_leaves_no_trace(folder: Path, tmp_path: Path, serve: Serve) -> None:
    spec, path = colour_spec(folder, "unused"), "/v1/teachers/colour/predict"
    plain = serve(spec)
    refused = plain.http.post(path, json={"keys": [KEYS[0]]}, params={"cache": "refresh"})
    assert (refused.status_code, refused.json()["field"]) == (400, "cache")
    server = serve(spec, journal=tmp_path / "journal")
    assert told(server.client.predict_named([KEYS[0]], cache="bypass").status) == {Status.COMPUTED}
    with pytest.raises(ServiceError, match="must be in the cache or the journal"):
        server.client.predict_named([KEYS[0]], cache="only")
    server.client.predict_named([KEYS[0]])
    database = sqlite3.connect(tmp_path / "journal" / NAME)
    with database:
        database.execute("UPDATE answers SET data = x'00', checksum = 1")
    database.close()
    assert told(server.client.predict_named([KEYS[0]], cache="refresh").status) == {Status.COMPUTED}
    found = server.client.predict_named([KEYS[0]], cache="only")
    assert told(found.status) == {Status.KEPT}
    assert found.values is not None
    target = tc.open(folder / "local").read("logits", view=0, rows=[0])
    assert isinstance(target, tc.DenseTarget)
    assert torch.equal(found.values, target.values)


def test_a_damaged_answer_is_computed_again(folder: Path, tmp_path: Path, serve: Serve) -> None:
    server = serve(colour_spec(folder, "unused"), journal=tmp_path / "journal")
    exact = server.client.predict_named([KEYS[0]]).values
    database = sqlite3.connect(tmp_path / "journal" / NAME)
    with database:
        database.execute("UPDATE answers SET data = zeroblob(length(data))")
    database.close()
    again = server.client.predict_named([KEYS[0]])
    assert told(again.status) == {Status.COMPUTED}
    assert again.values is not None
    assert exact is not None
    assert torch.equal(again.values, exact)


def test_a_full_journal_keeps_no_more_and_answers_go_on(folder: Path, tmp_path: Path, serve: Serve) -> None:
    spec = colour_spec(folder, "unused")
    server = serve(spec, journal=tmp_path / "journal", journal_bytes=1)
    for _ in range(2):
        assert told(server.client.predict_named([KEYS[0]]).status) == {Status.COMPUTED}


# ---------------------------------------------------------------- a build takes it over


def test_a_build_adopts_what_a_service_has_computed_and_its_bytes_are_the_same(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, journal = colour_spec(folder, "unused"), tmp_path / "journal"
    server = serve(spec, journal=journal)
    for view in (0, 1):
        server.client.predict_named(KEYS[:20], view, fields=["logits", "feature:relu"])
    # The last micro-batch is left to the build: rows 20 of both views.
    asked: list[int] = []
    real = TorchTeacher.__call__

    def call(self: TorchTeacher, views_BCHW: torch.Tensor, labels_B: torch.Tensor | None = None) -> Any:
        asked.append(int(views_BCHW.flatten(1).any(1).sum()))
        return real(self, views_BCHW, labels_B)

    monkeypatch.setattr(TorchTeacher, "__call__", call)
    ours = elsewhere(spec, tmp_path / "cache", journal=str(journal))
    tc.build(ours, executor="serial")
    assert data_of(tmp_path / "cache") == data_of(folder / "local")
    # Planning looks at one micro-batch, and at an empty one.
    assert asked.count(1) == 2
    assert len([rows for rows in asked if rows > 1]) <= 1
    assert str(journal) not in (tmp_path / "cache" / "manifest.json").read_text()
    assert tc.verify(tmp_path / "cache", recompute=8).ok


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"micro_batch": 4}])
def test_answers_that_were_computed_otherwise_are_not_adopted(
    folder: Path, tmp_path: Path, serve: Serve, change: dict[str, Any]
) -> None:
    spec, journal = colour_spec(folder, "unused"), tmp_path / "journal"
    server = serve(elsewhere(spec, tmp_path / "x", **change), journal=journal)
    server.client.predict_named(KEYS, 0, fields=["logits", "feature:relu"])
    tc.build(elsewhere(spec, tmp_path / "cache", journal=str(journal)), executor="serial")
    assert data_of(tmp_path / "cache") == data_of(folder / "local")


def test_a_journal_that_is_not_there_is_no_empty_one(folder: Path, tmp_path: Path) -> None:
    spec = elsewhere(colour_spec(folder, "unused"), tmp_path / "cache", journal=str(tmp_path / "typo"))
    with pytest.raises(TeacherError, match=r"teacher.journal.*service.journal=FOLDER"):
        tc.build(spec, executor="serial")
    assert not (tmp_path / "typo").exists()


# ---------------------------------------------------------------- a build asks by name


@pytest.mark.parametrize("cached", [False, True])
def test_a_build_over_the_services_data_set_sends_no_image(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    def no(*_: object) -> None:
        raise AssertionError("no image is to be sent")

    monkeypatch.setattr("services.paid_questions.ask_images", no)
    server = serve(colour_spec(folder, "local"), from_cache=cached)
    spec = elsewhere(colour_spec(folder, "unused"), tmp_path / "cache", model=server.url)
    tc.build(spec, executor="serial")
    assert data_of(tmp_path / "cache") == data_of(folder / "local")
    account = accounts(tmp_path / "cache.journal")
    assert (account.requests, account.images) == (QUESTIONS, 2 * len(KEYS)), "fillings cost nothing"
    # The features are kept in half precision, which is not what a build may take.
    assert len(server.teacher.asked) == QUESTIONS


def test_exact_bits_come_from_the_services_cache_and_the_rest_is_computed(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    fields = {"logits": {"encoding": "dense_f32"}}
    local = colour_spec(folder, "logits-only", fields=fields)
    tc.build(local, executor="serial")
    server = serve(local)
    spec = elsewhere(local, tmp_path / "cache", model=server.url)
    tc.build(spec, executor="serial")
    assert data_of(tmp_path / "cache") == data_of(Path(local.cache))
    # Two full micro-batches of each view, 8 of 10 rows, come from the cache; the three with fillings do not.
    assert len(server.teacher.asked) == 6


def test_images_are_sent_where_the_views_are_others(folder: Path, tmp_path: Path, serve: Serve) -> None:
    """Another seed: the same names, other pixels. Nothing wrong is taken, and no more questions by name are asked."""
    ours = colour_spec(folder, "unused")
    theirs = ours.model_copy(update={"views": ours.views.model_copy(update={"seed": 77})})
    server = serve(theirs)
    spec = elsewhere(ours, tmp_path / "cache", model=server.url, concurrency=1)
    tc.build(spec, executor="serial")
    assert data_of(tmp_path / "cache") == data_of(folder / "local")
    assert len(server.teacher.asked) == QUESTIONS
    account = accounts(tmp_path / "cache.journal")
    assert (account.requests, account.images) == (QUESTIONS, 8 * QUESTIONS)


def test_a_key_that_may_bring_no_images_builds_by_name_or_not_at_all(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    state = StateFolder(tmp_path / "state")
    key = key_store.add(state, "trainer", Policy(by_id_only=True, datasets=("numpy",)))
    other = key_store.add(state, "stranger", Policy(by_id_only=True, datasets=("digits",)))
    spec = colour_spec(folder, "unused")
    app = create_app({"colour": open_served(spec)}, Settings(state=tmp_path / "state"))
    with running(app) as base:
        wait_until(lambda: app.state.service.not_ready() == [])
        url = f"{base}/colour"
        tc.build(elsewhere(spec, tmp_path / "cache", model=url, api_key=key), executor="serial")
        assert data_of(tmp_path / "cache") == data_of(folder / "local")
        with pytest.raises(TeacherError, match="must be allowed to bring images"):
            tc.build(elsewhere(spec, tmp_path / "none", model=url, api_key=other), executor="serial")
        with TeacherClient(url, other) as client, pytest.raises(ServiceError, match="datasets"):
            client.lookup(KEYS[:1])
        with TeacherClient(url, key) as client:
            for ask in (client.lookup, client.predict_named):
                with pytest.raises(ServiceError, match=r"planned views only.*view 2"):
                    ask(KEYS[:2], [0, 2])
