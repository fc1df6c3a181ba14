"""Budgets: exact under 50 clients at once, across restarts and kills; paid before the answer leaves, or given back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_service_models import (
    POISON,
    ToyTeacher,
    colour_spec,
    open_gate,
    serving,
    toy_served,
    views,
    wait_until,
)

from services import keys
from services.admission import image_digests
from services.app import create_app
from services.audit_verify import verify
from services.books import Books
from services.policy import Policy
from services.scribe import Scribe
from services.settings import Settings
from services.state_folder import StateFolder
from services.usage import SECOND, OverBudget, Ticket, Usage
from services.usage_file import UsageFile
from services.visit import Visit
from services.wire import pack_images
from teacher_cache.errors import SpecError

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}
NOON = int(datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()) * SECOND
DAY = 86_400 * SECOND


@contextmanager
def memory() -> Iterator[Usage]:
    """Counters that nobody keeps."""
    file = UsageFile(None)
    yield Usage(file)
    file.close()


def accepted(usage: Usage, ticket: Ticket, now: int = NOON) -> bool:
    """Whether it was reserved."""
    try:
        usage.reserve(ticket, now)
    except OverBudget:
        return False
    return True


# ---------------------------------------------------------------- what is decided


def test_a_day_ends_at_midnight_utc_and_says_when() -> None:
    policy = Policy(images_per_day=5)
    with memory() as usage:
        usage.reserve(first := Ticket("a", policy, 3), NOON)
        with pytest.raises(OverBudget) as over:
            usage.reserve(Ticket("a", policy, 3), NOON)
        assert (over.value.limit, over.value.retry_after) == ("images_per_day", 12 * 3600)
        usage.reserve(second := Ticket("a", policy, 2), NOON)
        assert not accepted(usage, Ticket("a", policy, 1))
        assert accepted(usage, Ticket("b", policy, 5)), "another key's budget is its own"
        usage.release(second)
        usage.settle(first)
        assert usage.report("a", policy, NOON).images_today_left == 2
        last, midnight = NOON + DAY // 2 - 1, NOON + DAY // 2
        assert not accepted(usage, Ticket("a", policy, 3), last)
        assert accepted(usage, Ticket("a", policy, 5), midnight)
        # What no day can hold is never worth waiting for.
        with pytest.raises(OverBudget) as over:
            usage.reserve(Ticket("a", policy, 6), NOON + DAY)
        assert over.value.retry_after is None


def test_what_is_reserved_before_midnight_is_paid_of_that_day() -> None:
    policy = Policy(images_per_day=5)
    with memory() as usage:
        usage.reserve(ticket := Ticket("a", policy, 4), NOON)
        usage.settle(ticket)
        assert usage.report("a", policy, NOON).images_today == 4
        assert usage.report("a", policy, NOON + DAY).images_today == 0
        assert usage.report("a", policy, NOON + DAY).images == 4


def test_only_what_is_reserved_is_settled_and_once() -> None:
    with memory() as usage:
        ticket = Ticket("a", Policy(), 1)
        with pytest.raises(ValueError, match="once"):
            usage.settle(ticket)
        usage.reserve(ticket, NOON)
        usage.settle(ticket)
        usage.release(ticket)
        assert usage.report("a", Policy(), NOON).images == 1
        with pytest.raises(ValueError, match="once"):
            usage.settle(ticket)


@pytest.mark.parametrize("pace", [1, 3, 7, 50, 1000])
def test_a_second_s_worth_may_come_at_once(pace: int) -> None:
    policy = Policy(images_per_second=pace)
    with memory() as usage:
        tickets = [Ticket("a", policy, 1) for _ in range(pace + 5)]
        assert sum(accepted(usage, ticket) for ticket in tickets) == pace
        assert sum(accepted(usage, Ticket("a", policy, 1), NOON + SECOND) for _ in range(pace + 5)) == pace
        usage.release(tickets[0])
        assert sum(accepted(usage, Ticket("a", policy, 1), NOON + SECOND) for _ in range(5)) == 1


def test_more_than_a_second_s_worth_is_paid_off_afterwards() -> None:
    policy = Policy(images_per_second=2)
    with memory() as usage:
        usage.reserve(Ticket("a", policy, 20), NOON)
        with pytest.raises(OverBudget) as over:
            usage.reserve(Ticket("a", policy, 1), NOON)
        assert over.value.limit == "images_per_second"
        wait = over.value.retry_after
        assert wait is not None
        assert not accepted(usage, Ticket("a", policy, 1), NOON + (wait - 1) * SECOND)
        assert accepted(usage, Ticket("a", policy, 1), NOON + wait * SECOND), "Retry-After is true"


@given(
    st.sampled_from([0.5, 2.0, 3.0, 10.0]),
    st.lists(st.tuples(st.integers(0, 3 * SECOND), st.integers(1, 12)), max_size=40),
)
def test_no_stretch_of_time_has_more_than_its_pace(pace: float, asked: list[tuple[int, int]]) -> None:
    policy, now, taken = Policy(images_per_second=pace), NOON, list[tuple[int, int]]()
    with memory() as usage:
        for wait, images in asked:
            now += wait
            if accepted(usage, Ticket("a", policy, images), now):
                taken.append((now, images))
    for begin in range(len(taken)):
        for end in range(begin, len(taken)):
            seconds = (taken[end][0] - taken[begin][0]) / SECOND
            # Before the last of them, everything but a second's worth was paid off.
            images = sum(count for _, count in taken[begin:end])
            assert images <= pace * (seconds + 1) + 1e-6


def test_an_image_counts_once_in_a_lifetime() -> None:
    policy = Policy(distinct_images=3)
    with memory() as usage:

        def ticket(*digests: bytes) -> Ticket:
            return Ticket("a", policy, len(digests), frozenset(digests))

        usage.reserve(first := ticket(b"1", b"2"), NOON)
        assert not accepted(usage, ticket(b"3", b"4"))
        # Under way already: it needs no more room, but keeps it if the first is given back.
        usage.reserve(same := ticket(b"1"), NOON)
        usage.release(first)
        assert not accepted(usage, ticket(b"2", b"3", b"4"))
        usage.settle(same)
        usage.reserve(rest := ticket(b"1", b"2", b"3"), NOON)
        usage.settle(rest)
        with pytest.raises(OverBudget) as over:
            usage.reserve(ticket(b"4"), NOON)
        assert (over.value.limit, over.value.retry_after) == ("distinct_images", None)
        assert accepted(usage, ticket(b"1", b"2", b"3"), NOON + 1000 * DAY)
        found = usage.report("a", policy, NOON)
        assert (found.distinct_images, found.distinct_images_left, found.images) == (3, 0, 4)


def test_an_image_that_is_answered_while_it_is_under_way_again_counts_once() -> None:
    policy = Policy(distinct_images=3)
    with memory() as usage:
        one, two, third, fourth = (
            Ticket("a", policy, len(digests), frozenset(digests)) for digests in ({b"1"}, {b"1", b"2"}, {b"3"}, {b"4"})
        )
        usage.reserve(one, NOON)
        usage.reserve(two, NOON)
        usage.settle(one)
        assert usage.report("a", policy, NOON).distinct_images_left == 1
        assert accepted(usage, third)
        assert not accepted(usage, fourth)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "settle", "release", "commit", "rollback"]), st.sets(st.integers(0, 4), max_size=3)
    ),
    max_size=60,
)


@given(STEPS)
@settings(max_examples=500)
def test_whatever_happens_budgets_hold_and_nothing_is_lost(steps: list[tuple[str, set[int]]]) -> None:
    """Against a model of three lines: what is committed is kept, and no order of events spends more than there is."""
    policy = Policy(images_per_day=20, distinct_images=3)
    file = UsageFile(None)
    usage, under_way = Usage(file), list[Ticket]()
    kept: list[Ticket] = []
    unkept: list[Ticket] = []
    for step, chosen in steps:
        digests = frozenset(bytes([number]) for number in chosen)
        if step == "reserve" and digests:
            ticket = Ticket("a", policy, len(digests), digests)
            used = sum(one.images for one in (*kept, *unkept, *under_way))
            distinct = frozenset().union(digests, *(one.digests for one in (*kept, *unkept, *under_way)))
            fits = used + ticket.images <= 20 and len(distinct) <= 3
            assert accepted(usage, ticket) == fits
            if fits:
                under_way.append(ticket)
        elif step in ("settle", "release") and under_way:
            ticket = under_way.pop(len(chosen) % len(under_way))
            getattr(usage, step)(ticket)
            if step == "settle":
                unkept.append(ticket)
        elif step == "commit":
            usage.commit()
            kept, unkept = kept + unkept, []
        elif step == "rollback":
            usage.rollback()
            unkept = []
        found = usage.report("a", policy, NOON)
        assert found.images == sum(one.images for one in (*kept, *unkept))
        assert found.images_under_way == sum(one.images for one in under_way)
        assert found.distinct_images == len(frozenset().union(*(one.digests for one in (*kept, *unkept))))
        assert found.images <= 20
        assert (found.distinct_images or 0) <= 3
    file.close()


def test_images_are_known_by_their_pixels() -> None:
    images = views(4)
    images[3] = images[0]
    assert len(set(image_digests(images))) == 3
    assert image_digests(images[:1]) == image_digests(images[3:])
    assert image_digests(images[:1]) != image_digests(images[:1].reshape(1, 3, 4, 16))
    changed = images[:1].clone()
    changed[0, 2, 7, 7] ^= 1
    assert image_digests(changed) != image_digests(images[:1])


# ---------------------------------------------------------------- the file and its thread


def test_a_file_keeps_what_was_committed(tmp_path: Path) -> None:
    path, policy = tmp_path / "usage.sqlite", Policy(images_per_day=9, distinct_images=4, images_per_second=0.001)
    file = UsageFile(path)
    usage = Usage(file)
    usage.reserve(ticket := Ticket("a", policy, 2, frozenset({b"1", b"2"})), NOON)
    usage.settle(ticket)
    usage.commit()
    usage.reserve(lost := Ticket("b", Policy(), 5), NOON)
    usage.settle(lost)
    file.close()
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o600}
    file = UsageFile(path)
    again = Usage(file)
    assert again.report("a", policy, NOON).model_dump() == {
        "key": "a",
        "requests": 1,
        "images": 2,
        "images_under_way": 0,
        "day": "2026-11-21",
        "images_today": 2,
        "images_today_left": 7,
        "images_per_second": 0.001,
        "distinct_images": 2,
        "distinct_images_left": 2,
    }
    assert again.report("b", policy, NOON).images == 0, "was never committed"
    with pytest.raises(OverBudget, match="images_per_second"):
        again.reserve(Ticket("a", policy, 1, frozenset({b"1"})), NOON)
    file.close()


def test_a_commit_waits_for_the_disk(tmp_path: Path) -> None:
    """That it does is SQLite's; here is only that it was asked to. In WAL mode its default would not be enough."""
    file = UsageFile(tmp_path / "usage.sqlite")
    assert file._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert file._database.execute("PRAGMA synchronous").fetchone() == (2,)
    file.close()


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be read as one", None])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "usage.sqlite"
    if content is None:
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA user_version = 99")
    else:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"usage\.sqlite"):
        UsageFile(path)


class Counting:
    """A thing that is kept, and can be made to fail."""

    def __init__(self) -> None:
        self.commits, self.rollbacks, self.fails = 0, 0, False

    def commit(self) -> None:
        if self.fails:
            raise OSError("full")
        self.commits += 1

    def rollback(self) -> None:
        self.rollbacks += 1


def test_jobs_that_wait_together_share_a_commit() -> None:
    kept, begun, go, done = Counting(), threading.Event(), threading.Event(), list[int]()
    scribe = Scribe("test", kept)
    scribe.start()
    scribe.submit(lambda: begun.set() or go.wait(20), durable=False)
    assert begun.wait(20)
    jobs: list[Future[Any]] = [scribe.submit(lambda n=n: done.append(n), durable=True) for n in range(100)]
    dropped = scribe.submit(lambda: done.append(-1), durable=True)
    assert dropped.cancel()
    go.set()
    [job.result(20) for job in jobs]
    assert done == list(range(100))
    assert kept.commits <= 2
    kept.fails = True
    failing, reading = scribe.submit(lambda: 1, durable=True), scribe.submit(lambda: 2, durable=False)
    with pytest.raises(OSError, match="full"):
        failing.result(20)
    assert reading.result(20) == 2
    assert kept.rollbacks == 1
    kept.fails = False
    with pytest.raises(ZeroDivisionError):
        scribe.submit(lambda: 1 // 0, durable=True).result(20)
    assert kept.rollbacks == 2
    last = scribe.submit(lambda: 3, durable=True)
    scribe.stop()
    assert last.result(0) == 3, "what was submitted before the end is done"


def test_a_reservation_whose_request_is_cancelled_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled before the thread comes to it, and while it is at it."""
    books = Books(Settings())
    books.start()
    go = threading.Event()
    exact = Usage.reserve

    def slow(usage: Usage, ticket: Ticket, now: int) -> None:
        go.wait(20)
        exact(usage, ticket, now)

    monkeypatch.setattr(Usage, "reserve", slow)
    policy = Policy(images_per_day=5)

    async def cancelled() -> None:
        visits = [Visit("a"), Visit("b")]
        for visit in visits:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await books.reserve(visit, Ticket("a", policy, 5))
        [books.release(visit) for visit in visits]
        go.set()
        await books.reserve(kept := Visit("c"), Ticket("a", policy, 5))
        await books.record(kept, 200)

    asyncio.run(cancelled())
    books.close()


# ---------------------------------------------------------------- in the server


@contextmanager
def served(state: Path, teacher: ToyTeacher | None = None, **limits: Any) -> Iterator[httpx.Client]:
    """A server with a key for these limits, and a client that has it."""
    folder = StateFolder(state)
    name = f"key-{len(keys.read(folder.keys).keys)}"
    key = keys.add(folder, name, Policy.model_validate(limits))
    with serving(toy_served(teacher or open_gate(ToyTeacher())), state=state) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


def ask(client: httpx.Client, images: int, seed: int = 0, **headers: str) -> httpx.Response:
    """Logits of so many images."""
    return client.post(PREDICT, content=pack_images(views(images, seed)), headers={**TENSORS, **headers})


def at_once(client: httpx.Client, images: list[int], seeds: list[int] | None = None) -> list[httpx.Response]:
    """All of these, from 50 clients at the same time."""
    ready = threading.Barrier(50)

    def call(number: int) -> httpx.Response:
        if number < 50:
            ready.wait(20)
        return ask(client, images[number], (seeds or images)[number])

    with ThreadPoolExecutor(50) as threads:
        return list(threads.map(call, range(len(images))))


def test_fifty_clients_get_exactly_their_day(tmp_path: Path) -> None:
    with served(tmp_path, images_per_day=77) as client:
        answers = at_once(client, [1] * 150)
        assert Counter(answer.status_code for answer in answers) == {200: 77, 429: 73}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert 0 < int(refused.headers["retry-after"]) <= 86_400
        assert refused.json()["field"] == "images_per_day"
        usage = client.get("/v1/usage").json()
        assert (usage["images"], usage["requests"], usage["images_today_left"]) == (77, 77, 0)
        assert usage["images_under_way"] == 0
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert sum('"decision":"answered"' in line and '"images":1' in line for line in lines) == 77
    assert verify([tmp_path / "audit.jsonl"]).breaks == ()


def test_fifty_clients_with_requests_of_all_sizes_spend_no_more_than_there_is(tmp_path: Path) -> None:
    sizes = [1 + number % 9 for number in range(100)]
    with served(tmp_path, images_per_day=200) as client:
        answers = at_once(client, sizes)
        spent = sum(size for size, answer in zip(sizes, answers, strict=True) if answer.status_code == 200)
        left = client.get("/v1/usage").json()["images_today_left"]
        assert spent + left == 200
        # Nothing is refused that would still fit at the end.
        assert all(size > left for size, answer in zip(sizes, answers, strict=True) if answer.status_code == 429)
        assert {answer.status_code for answer in answers} == {200, 429}


def test_fifty_clients_see_exactly_so_many_different_images(tmp_path: Path) -> None:
    seeds = [number % 40 for number in range(120)]
    with served(tmp_path, distinct_images=25) as client:
        answers = at_once(client, [1] * 120, seeds)
        good = {seed for seed, answer in zip(seeds, answers, strict=True) if answer.status_code == 200}
        assert len(good) == 25
        for seed, answer in zip(seeds, answers, strict=True):
            assert answer.status_code == (200 if seed in good else 403)
        usage = client.get("/v1/usage").json()
        assert (usage["distinct_images"], usage["distinct_images_left"], usage["images"]) == (25, 0, 75)


def test_fifty_clients_have_one_pace(tmp_path: Path) -> None:
    with served(tmp_path, images_per_second=0.01) as client:
        answers = at_once(client, [1] * 60)
        assert Counter(answer.status_code for answer in answers) == {200: 1, 429: 59}
        assert all(int(answer.headers["retry-after"]) <= 100 for answer in answers if answer.status_code == 429)


def test_what_is_not_answered_is_given_back(tmp_path: Path) -> None:
    """Poison, deadlines, hang-ups and full queues cost nothing; the budget is whole afterwards."""
    teacher = ToyTeacher()
    with served(tmp_path, teacher, images_per_day=8, distinct_images=8) as client:
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(ask, client, 1)
            assert teacher.entered.acquire(timeout=20)
            assert client.get("/v1/usage").json()["images_under_way"] == 1
            assert ask(client, 7, 1, **{"X-Deadline-Ms": "60"}).status_code == 504
            with pytest.raises(httpx.ReadTimeout):
                client.post(PREDICT, content=pack_images(views(7, 2)), headers=TENSORS, timeout=0.2)
            wait_until(lambda: client.get("/v1/usage").json()["images_under_way"] == 1)
            teacher.gate.set()
            assert first.result().status_code == 200
        poison = views(7, 3)
        poison[2, 0, 0, 0] = POISON
        strict = client.post(PREDICT, content=pack_images(poison), headers=TENSORS, params={"strict": True})
        assert strict.status_code == 500
        assert client.get("/v1/usage").json()["images"] == 1
        assert client.post(PREDICT, content=pack_images(poison), headers=TENSORS).status_code == 200
        assert client.get("/v1/usage").json()["images"] == 7, "one of them has no answer, and costs nothing"
        assert ask(client, 1, 4).status_code == 200
        usage = client.get("/v1/usage").json()
        assert (usage["images"], usage["distinct_images"], usage["images_today_left"]) == (8, 8, 0)


def test_a_request_whose_task_ends_gives_back(tmp_path: Path) -> None:
    """As those do that are still under way when a server has waited long enough for its end."""
    key = keys.add(StateFolder(tmp_path), "alice", Policy(images_per_day=8))
    teacher = ToyTeacher()
    app = create_app({"toy": toy_served(teacher)}, Settings(state=tmp_path))

    async def ended() -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers)
        async with app.router.lifespan_context(app), client:
            post = client.post(PREDICT, content=pack_images(views(8)), headers=TENSORS)
            task = asyncio.create_task(post)
            assert await asyncio.to_thread(teacher.entered.acquire, timeout=20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            teacher.gate.set()
            return dict((await client.get("/v1/usage")).json())

    usage = asyncio.run(ended())
    assert (usage["images"], usage["images_under_way"], usage["images_today_left"]) == (0, 0, 8)


def test_what_is_paid_is_on_the_disk_before_the_answer_is_here(tmp_path: Path) -> None:
    with served(tmp_path, images_per_day=8) as client:
        for count in (1, 2):
            assert ask(client, count).status_code == 200
            with contextlib.closing(sqlite3.connect(tmp_path / "usage.sqlite")) as other:
                (images,) = other.execute("SELECT images FROM totals").fetchone()
            assert images == count * (count + 1) // 2


def test_an_answer_that_cannot_be_paid_does_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path, images_per_day=3) as client:

        def full(file: UsageFile) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(UsageFile, "commit", full)
            answer = ask(client, 3)
            assert answer.status_code == 503
            assert b"values" not in answer.content
        usage = client.get("/v1/usage").json()
        assert (usage["images"], usage["images_under_way"]) == (0, 0)
        assert ask(client, 3).status_code == 200
        assert ask(client, 1).status_code == 429


def test_a_slow_disk_does_not_hold_up_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = UsageFile.commit
    slow = threading.Event()

    def commit(file: UsageFile) -> None:
        slow.set()
        time.sleep(0.5)
        exact(file)

    monkeypatch.setattr(UsageFile, "commit", commit)
    with served(tmp_path) as client, ThreadPoolExecutor(1) as threads:
        client.get("/livez")
        answer = threads.submit(ask, client, 1)
        assert slow.wait(20)
        assert client.get("/livez").elapsed.total_seconds() < 0.25
        assert not answer.done()
        assert answer.result().status_code == 200


def test_without_a_folder_usage_is_counted_and_not_limited() -> None:
    with serving(toy_served(open_gate(ToyTeacher()))) as client:
        assert ask(client, 5).status_code == 200
        usage = client.get("/v1/usage").json()
    assert (usage["key"], usage["images"], usage["images_today_left"]) == ("(no key)", 5, None)
    assert usage["distinct_images"] is None


def ready(client: httpx.Client) -> bool:
    """Whether it listens, and is warm."""
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def process(config: Path, state: Path, key: str, model: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`teacher-serve` with this network, which is killed at the end."""
    arguments = ["--port", "0", "--state", str(state), "--set", f"teacher.model=toy_service_models:{model}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    environment.pop("TEACHER_API_KEY", None)
    command = [sys.executable, "-m", "services", str(config), *arguments]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        base = server.stdout.readline().rpartition(" at ")[2].strip().rpartition("/")[0]
        with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
            wait_until(lambda: ready(client), 60)
            yield server, client
    finally:
        server.kill()
        server.communicate()


def test_a_kill_between_reservation_and_answer_costs_nothing_and_loses_nothing(tmp_path: Path) -> None:
    config, state = tmp_path / "colour.yaml", tmp_path / "state"
    config.write_text(yaml.safe_dump(colour_spec(tmp_path, "cache").model_dump(mode="json")))
    key = keys.add(StateFolder(state), "alice", Policy(images_per_day=164, distinct_images=164))
    place = "/v1/teachers/colour/predict"

    def post(client: httpx.Client, count: int, seed: int) -> httpx.Response:
        return client.post(place, content=pack_images(views(count, seed)), headers=TENSORS)

    # Half a second for each batch of 8: ten seconds in which it can be killed.
    with process(config, state, key, "SlowNet") as (server, client), ThreadPoolExecutor(1) as threads:
        assert post(client, 4, 0).status_code == 200
        lost = threads.submit(post, client, 160, 1)
        wait_until(lambda: client.get("/v1/usage").json()["images_under_way"] == 160)
        server.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            lost.result()
    with process(config, state, key, "ColourNet") as (_, client):
        usage = client.get("/v1/usage").json()
        assert (usage["images"], usage["images_today_left"], usage["distinct_images_left"]) == (4, 160, 160)
        assert post(client, 160, 1).status_code == 200
        assert post(client, 1, 2).status_code == 429
    assert verify([state / "audit.jsonl"]).breaks == ()
