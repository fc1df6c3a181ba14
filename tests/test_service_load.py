"""How busy a teacher is: the last ten seconds, counted exactly, told to whoever may ask that teacher."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_service_models import ToyTeacher, open_gate, running, serving, toy_served, views, wait_until

from services import keys
from services.app import create_app
from services.load import SECONDS, Load, Pace
from services.policy import Policy
from services.settings import Settings
from services.state_folder import StateFolder
from services.wire import pack_images

TENSORS = {"Content-Type": "application/safetensors"}


class Clock:
    """Seconds that a test moves."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_nothing_has_run() -> None:
    pace = Load().pace()
    assert (pace.images_per_second, pace.fill(8)) == (0.0, None)


def test_what_is_older_than_ten_seconds_does_not_count() -> None:
    clock = Clock()
    load = Load(clock)
    load.add(30)
    clock.now += 4
    load.add(50)
    assert load.pace() == Pace(2, 80)
    assert load.pace().images_per_second == 8.0
    clock.now += SECONDS - 4 - 0.05
    assert load.pace() == Pace(2, 80)
    clock.now += 0.05
    assert load.pace() == Pace(1, 50)
    clock.now += 1000
    assert load.pace() == Pace(0, 0)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 64)), max_size=60))
def test_it_counts_what_a_list_of_all_batches_would(steps: list[tuple[int, int]]) -> None:
    clock, ticks = Clock(), 1000
    load = Load(clock)
    events: list[tuple[int, int]] = []
    for later, images in steps:
        ticks += later
        clock.now = ticks / 10 + 0.05
        load.add(images)
        events.append((ticks, images))
        recent = [images for tick, images in events if tick > ticks - SECONDS * 10]
        assert load.pace() == Pace(len(recent), sum(recent))


def test_fill_is_a_share_of_the_rows() -> None:
    assert Pace(batches=4, images=16).fill(8) == 0.5
    assert Pace(batches=1, images=8).fill(8) == 1.0


def test_its_memory_does_not_grow_with_the_batches() -> None:
    clock = Clock()
    load = Load(clock)
    for number in range(5000):
        clock.now = 100 + number * 0.013
        load.add(1)
    assert len(load._ticks) <= SECONDS * 10


def test_several_threads_lose_nothing() -> None:
    calls, start = itertools.count(), threading.Barrier(4)
    # Eight seconds in all, in many ticks; and threads that change places as often as they can.
    load = Load(lambda: next(calls) * 0.0002)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def adds() -> None:
        start.wait()
        for _ in range(5000):
            load.add(3)
            load.pace()

    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(adds) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(before)
    assert load.pace() == Pace(20_000, 60_000)


@pytest.mark.parametrize("name", ["add", "pace"])
def test_one_thread_at_a_time_is_at_the_counts(name: str) -> None:
    load = Load(Clock())
    thread = threading.Thread(target={"add": lambda: load.add(1), "pace": load.pace}[name])
    with load._lock:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join(20)
    assert not thread.is_alive()


def load_of(client: httpx.Client, **headers: str) -> dict[str, Any]:
    answer = client.get("/v1/load", headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_endpoint_says_what_waits_and_what_was_computed() -> None:
    teacher = ToyTeacher()
    with serving(toy_served(teacher), queue_images=50, max_images=20) as client, ThreadPoolExecutor(3) as pool:
        assert load_of(client) == {
            "seconds": SECONDS,
            "draining": False,
            "teachers": [
                {
                    "name": "toy",
                    "images_waiting": 0,
                    "queue_images": 50,
                    "images_per_second": 0.0,
                    "batch_fill": None,
                }
            ],
        }

        def ask(count: int) -> int:
            body = pack_images(views(count, seed=count))
            return client.post("/v1/teachers/toy/predict", content=body, headers=TENSORS).status_code

        first = pool.submit(ask, 8)
        assert teacher.entered.acquire(timeout=20)
        others = [pool.submit(ask, count) for count in (5, 7)]
        wait_until(lambda: load_of(client)["teachers"][0]["images_waiting"] == 12)
        teacher.gate.set()
        assert [done.result() for done in (first, *others)] == [200, 200, 200]
        # The thread counts a batch once its answers are on their way.
        wait_until(lambda: load_of(client)["teachers"][0]["images_per_second"] == 2.0)
        (found,) = load_of(client)["teachers"]
        assert (found["images_waiting"], found["batch_fill"]) == (0, 20 / 24)


def test_a_key_is_told_of_its_own_teachers_only_and_the_audit_is_not_filled(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    every, one = keys.add(folder, "every", Policy()), keys.add(folder, "one", Policy(teachers=("b",)))
    served = {name: toy_served(open_gate(ToyTeacher()), name=name) for name in ("a", "b")}
    app = create_app(served, Settings(state=tmp_path))
    with running(app) as url, httpx.Client(base_url=url) as client:
        names = {
            key: [found["name"] for found in load_of(client, Authorization=f"Bearer {key}")["teachers"]]
            for key in (every, one)
        }
        assert names == {every: ["a", "b"], one: ["b"]}
        assert client.get("/v1/load").status_code == 401
        assert client.get("/v1/usage", headers={"Authorization": f"Bearer {one}"}).status_code == 200
    lines = [json.loads(line) for line in folder.audit.read_text().splitlines()]
    assert [(line["status"], line["route"]) for line in lines] == [(401, None), (200, "/v1/usage")]


def test_a_load_that_cannot_be_told_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_load: Load) -> Pace:
        raise ArithmeticError

    monkeypatch.setattr(Load, "pace", fails)
    key = keys.add(StateFolder(tmp_path), "alice", Policy())
    with serving(toy_served(open_gate(ToyTeacher())), state=tmp_path) as client:
        assert client.get("/v1/load", headers={"Authorization": f"Bearer {key}"}).status_code == 500
    (line,) = StateFolder(tmp_path).audit.read_text().splitlines()
    assert (json.loads(line)["status"], json.loads(line)["decision"]) == (500, "failed")


@pytest.mark.parametrize("draining", [False, True])
def test_a_server_on_its_way_out_says_so(draining: bool) -> None:
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings())
    app.state.service.draining = draining
    with running(app) as url, httpx.Client(base_url=url) as client:
        assert load_of(client)["draining"] is draining


def test_on_its_way_out_it_ends_the_connections_of_those_it_answers() -> None:
    """Nobody's next question is under way on a connection while that is closed."""
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings())
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        for draining, told in ((False, None), (True, "close")):
            app.state.service.draining = draining
            for path, status in (("/livez", 200), ("/v1/teachers", 200), ("/nowhere", 404)):
                answer = client.get(path)
                assert (answer.status_code, answer.headers.get("connection")) == (status, told)
