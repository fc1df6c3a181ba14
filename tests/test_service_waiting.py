"""Much at once on the event loop: in order, with turns for others in between, and nothing left running."""

from __future__ import annotations

import asyncio

import pytest

from services.waiting import together

MANY = 100


def test_results_come_in_order_and_others_have_turns_while_they_are_begun() -> None:
    begun, seen = list[int](), list[int]()

    async def work(number: int) -> int:
        begun.append(number)
        await asyncio.sleep(0.02 if number % 7 == 0 else 0)
        return number

    async def other() -> None:
        while len(begun) < MANY:
            seen.append(len(begun))
            await asyncio.sleep(0)

    async def both() -> list[int]:
        watching = asyncio.create_task(other())
        found = await together(work(number) for number in range(MANY))
        await watching
        return found

    assert asyncio.run(both()) == list(range(MANY))
    steps = [later - sooner for sooner, later in zip(seen, [*seen[1:], MANY], strict=True)]
    assert sum(steps) == MANY
    assert max(steps) <= 8


def test_where_one_fails_the_others_have_ended() -> None:
    begun, ended = list[int](), list[int]()

    async def work(number: int) -> None:
        begun.append(number)
        try:
            if number == 9:
                raise KeyError(number)
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    async def run() -> int:
        async with asyncio.timeout(20):
            with pytest.raises(KeyError):
                await together(work(number) for number in range(MANY))
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1
    assert sorted(ended) == begun == list(range(MANY))


def test_whoever_is_cancelled_meanwhile_takes_all_along() -> None:
    begun, ended = list[int](), list[int]()

    async def work(number: int) -> None:
        begun.append(number)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    async def run() -> int:
        waiting = asyncio.create_task(together(work(number) for number in range(MANY)))
        while not begun:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting], timeout=20)
        assert waiting.cancelled()
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1
    assert sorted(ended) == begun
    assert len(begun) < MANY
