"""Teachers in a process of their own: the same bits, whose thread, what errors become, what a kill leaves behind."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import yaml
from test_service_command import ended, refused, started
from toy_service_models import colour_spec, running, views, wait_until

from services.app import create_app
from services.batching import Batcher
from services.client import TeacherClient
from services.device_process import Load, ProcessTeacher, TeacherGone, teachers_apart
from services.request_log import Apart
from services.settings import Settings
from services.teachers import ServedTeacher, open_served, servable
from services.work import TeacherFailed
from teacher_cache.errors import TeacherError
from teacher_cache.plan import load_here
from teacher_cache.spec import BuildSpec
from teacher_cache.teachers import Teacher
from teacher_cache.views import open_recipe

APART = ("--set", "service.apart=true")
MODELS = {
    "colour": "ColourNet",
    "fussy": "FussyNet",
    "where": "WhereNet",
    "there": "WhereNet",
    "drawn": "DrawnNet",
    "drawn-too": "DrawnNet",
    "wide-1": "WideNet",
    "wide-2": "WideNet",
    "bad": "ColourNet",
}


def spec_of(folder: Path, name: str) -> BuildSpec:
    """One toy as it is served."""
    wishes = {
        "fields": {"logits": {}} | ({"feature:relu": {"pool": "mean"}} if name == "colour" else {}),
        "arguments": {"clases": 7} if name == "bad" else {},
    }
    spec = colour_spec(folder, f"cache-{name}", name=name, model=f"toy_service_models:{MODELS[name]}", **wishes)
    threads = 2 if name == "wide-2" else 1
    return servable(spec.model_copy(update={"compute": spec.compute.model_copy(update={"threads": threads})}))


def loaded(load: Load, spec: BuildSpec) -> Teacher:
    """A teacher, as `open_parts` asks for it."""
    return load(spec, open_recipe(spec.views))


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BuildSpec]:
    """Teachers of one device; the last cannot be loaded."""
    folder = tmp_path_factory.mktemp("apart")
    return {name: spec_of(folder, name) for name in MODELS}


@pytest.fixture(scope="module")
def loads(specs: dict[str, BuildSpec]) -> Iterator[dict[str, Load]]:
    """All of them in one other process."""
    with teachers_apart(list(specs.values())) as waiting:
        yield dict(zip(specs, waiting, strict=True))


@pytest.fixture(scope="module")
def teachers(specs: dict[str, BuildSpec], loads: dict[str, Load]) -> dict[str, Teacher]:
    """Those that can be loaded."""
    return {name: loaded(load, specs[name]) for name, load in loads.items() if name != "bad"}


def fussy(number: int, count: int = 8) -> torch.Tensor:
    """Views of which the first makes `FussyNet` fail."""
    views_BCHW = views(count) | 8
    views_BCHW[0, 0, 0, 0] = number
    return views_BCHW


# ---------------------------------------------------------------- answers


def test_it_answers_with_the_bits_and_the_facts_of_one_in_this_process(
    specs: dict[str, BuildSpec], teachers: dict[str, Teacher]
) -> None:
    here, there = loaded(load_here, specs["colour"]), teachers["colour"]
    for fact in ("fingerprint", "fields", "device", "threads"):
        assert getattr(there, fact) == getattr(here, fact)
    # Other sizes in between: the memory that both see is another then.
    for count, seed in ((8, 1), (3, 2), (3, 3), (8, 4)):
        views_BCHW = views(count, seed)
        expected, found = here(views_BCHW), there(views_BCHW)
        assert found.keys() == expected.keys() == {"logits", "feature:relu"}
        for name, values in expected.items():
            assert torch.equal(found[name], values)
            assert found[name].dtype == values.dtype


def test_what_they_draw_when_they_are_made_is_their_own(
    specs: dict[str, BuildSpec], teachers: dict[str, Teacher]
) -> None:
    """All draw from one generator of their process."""
    with torch.random.fork_rng(devices=[]):
        here = loaded(load_here, specs["drawn"])
    assert teachers["drawn"].fingerprint == teachers["drawn-too"].fingerprint == here.fingerprint


def test_an_answer_stays_when_the_next_is_given(teachers: dict[str, Teacher]) -> None:
    first = teachers["where"](views(8))["logits"]
    before = first.clone()
    second = teachers["where"](views(8))["logits"]
    assert torch.equal(first, before)
    assert second[0, 2] == first[0, 2] + 1


def test_teachers_of_one_device_share_a_process_and_have_each_a_thread(teachers: dict[str, Teacher]) -> None:
    (here, there), (again, _) = (
        [tuple(teachers[name](views(8))["logits"][0, :2].int().tolist()) for name in ("where", "there")]
        for _ in range(2)
    )
    assert here[0] == there[0] != os.getpid()
    assert here[1] != there[1]
    assert again == here
    # The main thread of a process gives memory back after each pass, and fetches it again.
    assert here[0] not in (here[1], there[1])


def test_it_runs_on_as_many_threads_as_its_configuration_says(
    specs: dict[str, BuildSpec], teachers: dict[str, Teacher]
) -> None:
    """A sum of many numbers has other bits on two."""
    here, before, expected = loaded(load_here, specs["wide-1"]), torch.get_num_threads(), list[torch.Tensor]()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        expected.append(here(views(8))["logits"])
    torch.set_num_threads(before)
    assert not torch.equal(*expected)
    for _ in range(2):
        for threads in (1, 2):
            assert torch.equal(teachers[f"wide-{threads}"](views(8))["logits"], expected[threads - 1])


def test_only_a_process_that_talks_to_the_gpu_pins_memory(
    specs: dict[str, BuildSpec], teachers: dict[str, Teacher]
) -> None:
    """To pin it, a process needs a context on the GPU: the one that speaks HTTP has none."""
    here = open_served(specs["colour"])
    assert not here.pinned
    assert replace(here, device="cuda").pinned
    assert not replace(here, device="cuda", teacher=teachers["colour"]).pinned


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [(1, RuntimeError, "_OddError: odd"), (2, torch.OutOfMemoryError, "too large"), (4, ArithmeticError, "poison")],
)
def test_an_error_comes_back_with_its_place_and_the_teacher_goes_on(
    teachers: dict[str, Teacher], number: int, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as raised:
        teachers["fussy"](fussy(number))
    assert type(raised.value) is kind
    assert isinstance(raised.value.__cause__, Apart)
    place = raised.value.__cause__.at[-1]
    assert place.startswith("toy_service_models.py:")
    assert place.endswith(" forward")
    assert teachers["fussy"](views(8) | 8)["logits"].isfinite().all()


def test_one_that_cannot_be_loaded_says_so_as_it_would_here(
    specs: dict[str, BuildSpec], loads: dict[str, Load], teachers: dict[str, Teacher]
) -> None:
    """And the others of its process are there."""
    said = []
    for load in (load_here, loads["bad"]):
        with pytest.raises(TeacherError) as raised:
            loaded(load, specs["bad"])
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert "clases" in said[0]
    assert len(teachers["colour"](views(2))["logits"]) == 2


@contextlib.contextmanager
def batching(one: ServedTeacher) -> Iterator[Batcher]:
    """A warm batcher."""
    batcher = Batcher(one, 1000, 60.0)
    batcher.start()
    try:
        wait_until(lambda: batcher.warm)
        yield batcher
    finally:
        batcher.stop()


def test_a_poisoned_piece_fails_alone_and_the_log_says_where(
    specs: dict[str, BuildSpec], teachers: dict[str, Teacher], caplog: pytest.LogCaptureFixture
) -> None:
    one = open_served(specs["fussy"], load=lambda _spec, _recipe: teachers["fussy"])
    assert isinstance(one.teacher, ProcessTeacher)
    good = views(3, 5) | 8
    with batching(one) as batcher, caplog.at_level(logging.ERROR, "services"):
        answers = [batcher.submit(part, ("logits",), "me") for part in (good, fussy(4, 2), good.flip(0))]
        with pytest.raises(TeacherFailed):
            answers[1].result(20)
        assert len(answers[0].result(20)["logits"]) == len(answers[2].result(20)["logits"]) == 3
        assert not batcher.dead
    (record,) = [record for record in caplog.records if "failed on one request" in record.message]
    assert "ArithmeticError in toy_service_models.py:" in record.message
    assert any("forward.py" in frame for frame in record.facts["at"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("number", "why"), [(3, "SystemExit"), (5, "TeacherGone")], ids=["it exits", "it is killed"])
def test_a_model_that_ends_its_process_ends_the_service_and_nobody_waits(
    tmp_path: Path, number: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(tmp_path, "fussy")
    with teachers_apart([spec]) as (load,):
        app = create_app({"fussy": open_served(spec, load=load)}, Settings())
        batcher = app.state.service.batchers["fussy"]
        with running(app) as url:
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            assert httpx.get(f"{url}/livez").status_code == 200
            with TeacherClient(f"{url}/fussy") as client:
                answer = client.predict(views(8) | 8)
                assert answer.values is not None
            waiting = [batcher.submit(part, ("logits",), "me") for part in (fussy(number), views(8) | 8)]
            for one in waiting:
                with pytest.raises(CancelledError):
                    one.result(20)
            wait_until(lambda: batcher.dead)
            with pytest.raises(TeacherGone):
                app.state.service.teachers["fussy"].teacher(views(8))
            said = httpx.get(f"{url}/livez")
            assert (said.status_code, "thread of fussy has died" in said.text) == (503, True)
    (record,) = [record for record in caplog.records if "has died" in record.message]
    assert record.message.startswith(f"the thread of teacher fussy has died: {why} in ")


def test_a_process_that_dies_while_loading_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "colour.yaml"
    path.write_text(yaml.safe_dump(colour_spec(tmp_path, "cache").model_dump(mode="json")))
    monkeypatch.delenv("TEACHER_API_KEY", raising=False)
    killed = "teacher.model=toy_service_models:KilledNet"
    line = refused(monkeypatch, capsys, str(path), "--port", "0", "--set", killed)
    assert line.startswith("error: teacher.model: must load and run, and its process has ended (found: device-cpu")
    assert "with -9" in line


# ---------------------------------------------------------------- the command


@contextlib.contextmanager
def where(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A running server, its URL, and the process in which its model runs."""
    path = folder / "where.yaml"
    path.write_text(yaml.safe_dump(spec_of(folder, "where").model_dump(mode="json")))
    with started(path, "--log-level", "warning", *arguments) as (process, url):
        with TeacherClient(url) as client:
            found = client.predict(views(1)).values
        assert found is not None
        yield process, url, int(np.asarray(found)[0, 0])


def test_a_signal_to_the_whole_group_drains_and_leaves_no_process(tmp_path: Path) -> None:
    with where(tmp_path, *APART, "--set", "service.drain_seconds=1") as (process, url, model):
        assert model != process.pid
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.3)
        with TeacherClient(url) as client:
            assert client.predict(views(1)).values is not None
        assert ended(process) == (0, "")
        assert not Path(f"/proc/{model}").exists()


def test_a_server_that_is_killed_takes_its_model_along(tmp_path: Path) -> None:
    with where(tmp_path, *APART) as (process, _, model):
        process.kill()
        wait_until(lambda: not Path(f"/proc/{model}").exists())


def test_a_setting_has_the_model_beside_http(tmp_path: Path) -> None:
    with where(tmp_path) as (process, _, model):
        assert model == process.pid
