"""The client with an event loop: the sync one's answers, order, bounds, and patience."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_http_teacher import GOOD, Scripted, problem
from toy_faults import Faulty
from toy_service_models import ToyTeacher, open_gate, picture, running, toy_logits, toy_served, views, wait_until

from services.app import create_app
from services.async_client import AsyncTeacherClient
from services.client import Prediction, TeacherClient
from services.settings import Settings
from services.wish import Wish, Wishes
from teacher_cache.errors import ServiceError, TeacherCacheError, TeacherError


@pytest.fixture
def toy() -> Iterator[tuple[str, Faulty]]:
    """A service of the toy teacher, a bit slow, and its books."""
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings())
    faulty = Faulty(app, delay=0.02)
    with running(faulty) as base:
        wait_until(lambda: app.state.service.not_ready() == [])
        yield f"{base}/toy", faulty


def asked(url: str, ask: Callable[[AsyncTeacherClient], Awaitable[Any]], **options: Any) -> Any:
    """What one use of a client gives."""

    async def use() -> Any:
        async with AsyncTeacherClient(url, **options) as client:
            return await ask(client)

    return asyncio.run(use())


def test_it_answers_what_the_other_client_answers(toy: tuple[str, Faulty], tmp_path: Path) -> None:
    url, _ = toy
    path = tmp_path / "picture.png"
    path.write_bytes(picture("PNG", (20, 10)))

    async def ask(client: AsyncTeacherClient) -> Any:
        card = await client.card()
        top = await client.predict(views(3), output="topk", k=2, temperature=4, digest=card.digest)
        features = await client.predict(views(3), fields=["feature:pixels"], deadline_ms=20_000)
        return card, top, features, await client.predict_file(path, output="probs")

    ours = asked(url, ask)
    with TeacherClient(url) as client:
        card = client.card()
        top = client.predict(views(3), output="topk", k=2, temperature=4)
        theirs = [
            card,
            top,
            client.predict(views(3), fields=["feature:pixels"]),
            client.predict_file(path, output="probs"),
        ]
    assert ours[0] == theirs[0]
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.metadata == other.metadata
        for name in ("values", "indices", "tail_logmass"):
            a, b = getattr(mine, name), getattr(other, name)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
        assert {k: v.tolist() for k, v in mine.features.items()} == {k: v.tolist() for k, v in other.features.items()}


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_stream_is_in_order_and_bounded(toy: tuple[str, Faulty], concurrency: int, is_async: bool) -> None:
    url, faulty = toy
    batches = [views(2 + number % 3, seed=number) for number in range(10)]
    ahead: list[int] = []
    taken = 0

    async def source() -> AsyncIterator[torch.Tensor]:
        for number, batch in enumerate(batches):
            ahead.append(number - taken)
            yield batch

    async def ask(client: AsyncTeacherClient) -> list[torch.Tensor]:
        nonlocal taken
        found = []
        async for answer in client.stream(source() if is_async else batches, concurrency=concurrency):
            found.append(answer.values)
            taken += 1
        return found

    found = asked(url, ask)
    assert len(found) == len(batches)
    assert all(torch.equal(answer, toy_logits(batch)) for answer, batch in zip(found, batches, strict=True))
    assert faulty.most_at_once == concurrency
    assert all(number < concurrency for number in ahead), "an endless source is not read ahead"


def test_a_stream_takes_every_wish(toy: tuple[str, Faulty]) -> None:
    url, _ = toy
    wishes: Wishes = {"output": "topk", "k": 2, "temperature": 4.0, "dtype": "f16", "lse": True, "cache": "bypass"}

    async def ask(client: AsyncTeacherClient) -> list[Prediction]:
        return [answer async for answer in client.stream([views(2), views(1)], **wishes)]

    with TeacherClient(url) as client:
        for found, count in zip(asked(url, ask), (2, 1), strict=True):
            expected = client.predict(views(count), **wishes)
            assert found.values.dtype == torch.float16
            assert torch.equal(found.values, expected.values)
            assert torch.equal(found.lse, expected.lse)


def test_the_wishes_are_those_of_a_wish() -> None:
    """So that a type checker and the clients know the same keywords; another one is refused by name."""
    assert list(Wishes.__annotations__) == [field.name for field in dataclasses.fields(Wish)]
    with TeacherClient("http://127.0.0.1:9/toy") as client, pytest.raises(TypeError, match="temprature"):
        client.predict(views(1), temprature=2.0)  # type: ignore[call-arg]


def test_a_stream_ends_with_its_first_error_and_cancels_the_rest(toy: tuple[str, Faulty]) -> None:
    url, faulty = toy
    wrong = torch.zeros(1, 3, 9, 8, dtype=torch.uint8)

    given: list[Any] = []

    async def take(client: AsyncTeacherClient) -> None:
        async for answer in client.stream([views(1), wrong, *([views(2)] * 50)], concurrency=2):
            given.append(answer)

    async def ask(client: AsyncTeacherClient) -> None:
        with pytest.raises(ServiceError, match=r"images \(HTTP 422"):
            await take(client)
        assert len(asyncio.all_tasks()) == 1

    asked(url, ask)
    assert len(given) == 1
    assert faulty.fates.total() <= 4


def test_a_stream_that_is_left_is_cancelled(toy: tuple[str, Faulty]) -> None:
    url, faulty = toy
    faulty.fate, faulty.late = lambda number: "late" if number else "answer", 2.0

    async def ask(client: AsyncTeacherClient) -> None:
        stream = client.stream([views(1)] * 100, concurrency=4)
        async for _ in stream:
            break
        left = time.monotonic()
        await stream.aclose()
        assert time.monotonic() - left < faulty.late / 2
        assert len(asyncio.all_tasks()) == 1
        with pytest.raises(ValueError, match="concurrency=0"):
            await anext(aiter(client.stream([views(1)], concurrency=0)))

    asked(url, ask)
    assert faulty.fates.total() <= 7


def test_requests_beyond_the_connections_wait_for_one(toy: tuple[str, Faulty]) -> None:
    """However long: what a request may take is counted from when it leaves."""
    url, faulty = toy
    faulty.delay = 0.3

    async def ask(client: AsyncTeacherClient) -> None:
        await asyncio.gather(*(client.predict(views(1)) for _ in range(10)))

    asked(url, ask, connections=2, timeout=1.0, attempts=1)
    assert faulty.most_at_once == 2
    assert faulty.fates.total() == 10


def test_connections_are_used_again(toy: tuple[str, Faulty], monkeypatch: pytest.MonkeyPatch) -> None:
    url, _ = toy
    peers = set()
    real = Faulty.__call__

    async def call(self: Faulty, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            peers.add(scope["client"])
        await real(self, scope, receive, send)

    monkeypatch.setattr(Faulty, "__call__", call)

    async def ask(client: AsyncTeacherClient) -> None:
        for _ in range(5):
            await client.predict(views(1))

    asked(url, ask)
    assert len(peers) == 1


async def _one(client: AsyncTeacherClient) -> Any:
    return await client.predict(views(2))


def test_429_and_503_are_treated_as_the_other_client_treats_them(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float, *more: Any) -> None:
        waits.append(seconds)
        await real(0)

    app = Scripted((429, {"Retry-After": "7"}, problem(429)), (503, {}, problem(503)), (502, {}, b""), GOOD)
    with running(app) as base:
        monkeypatch.setattr("services.async_client.asyncio.sleep", sleep)
        assert asked(f"{base}/toy", _one).values is not None
    mine = [wait for wait in waits if wait not in (0, 0.1)]
    assert mine[0] == 7
    assert all(0.05 <= wait <= 0.1 for wait in mine[1:3])
    gone = Scripted((429, {}, problem(429)))
    with running(gone) as base, pytest.raises(ServiceError, match="does not say when"):
        asked(f"{base}/toy", _one)
    assert gone.calls == 1
    busy = Scripted((503, {"Retry-After": "0"}, problem(503)))
    with running(busy) as base, pytest.raises(ServiceError, match="3 tries in"):
        asked(f"{base}/toy", _one, attempts=3)
    assert busy.calls == 3


def test_what_is_wrong_is_said(toy: tuple[str, Faulty]) -> None:
    with pytest.raises(TeacherError, match="host:port"):
        AsyncTeacherClient("here")
    with pytest.raises(ServiceError, match="could not be reached"):
        asked("http://127.0.0.1:1/toy", _one)

    async def ask(client: AsyncTeacherClient) -> None:
        with pytest.raises(TeacherCacheError, match="uint8"):
            await client.predict(torch.zeros(1, 3, 8, 8))

    asked(toy[0], ask)
