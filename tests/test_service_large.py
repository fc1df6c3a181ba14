"""Large bodies and answers go in small steps, and whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st

from services import body
from services.beside import SMALL
from services.large_response import SLICE, LargeResponse
from services.problems import Problem
from services.settings import Settings

CHUNKS = st.lists(st.binary(max_size=50), max_size=8)


def uploaded(chunks: list[bytes], most: int) -> bytes:
    """What a request of these chunks is read as."""
    messages = iter([{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.request", "body": b"", "more_body": False})

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    settings = Settings(max_body_bytes=most, max_images=1)
    return bytes(asyncio.run(body.read_body(request, settings)))


@given(CHUNKS.filter(lambda chunks: any(chunks)), st.integers(1, 200))
def test_a_body_is_its_chunks_or_too_long(chunks: list[bytes], most: int) -> None:
    whole = b"".join(chunks)
    if len(whole) > most:
        with pytest.raises(Problem) as refused:
            uploaded(chunks, most)
        assert refused.value.status == 413
    else:
        assert uploaded(chunks, most) == whole


def test_an_empty_body_is_empty() -> None:
    assert uploaded([], 10) == uploaded([b"", b""], 10) == b""


def test_chunks_are_joined_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    joined = body._joined

    def noted(chunks: list[bytes]) -> memoryview:
        threads.append(threading.current_thread())
        return joined(chunks)

    monkeypatch.setattr(body, "_joined", noted)
    half = bytes(SMALL)
    assert uploaded([half, b"b"], 2 * SMALL) == half + b"b"
    assert threads[0] is not threading.main_thread()


def answered(pieces: list[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The messages of an answer, and how often something else had its turn meanwhile."""
    messages: list[dict[str, Any]] = []
    turns = 0

    async def send(message: Any) -> None:
        messages.append(dict(message))

    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing is to be received")

    async def beside() -> AsyncIterator[None]:
        while True:
            yield
            await asyncio.sleep(0)

    async def both() -> None:
        nonlocal turns

        async def count() -> None:
            nonlocal turns
            async for _ in beside():
                turns += 1

        task = asyncio.create_task(count())
        await LargeResponse(pieces, "text/plain")({"type": "http"}, receive, send)
        task.cancel()

    asyncio.run(both())
    return messages, turns


@pytest.mark.parametrize("sizes", [[], [0], [1], [SLICE], [SLICE + 1], [3 * SLICE, 5, 2 * SLICE]])
def test_an_answer_leaves_in_slices_and_others_have_their_turn(sizes: list[int]) -> None:
    pieces = [bytes([number + 65]) * size for number, size in enumerate(sizes)]
    (start, *bodies), turns = answered(pieces)
    assert b"".join(one["body"] for one in bodies) == b"".join(pieces)
    assert (b"content-length", str(sum(sizes)).encode()) in start["headers"]
    assert all(len(one["body"]) <= SLICE for one in bodies)
    assert [one.get("more_body", False) for one in bodies] == [True] * (len(bodies) - 1) + [False]
    assert turns >= len(bodies) - 1


def test_no_slice_is_cut_long_before_it_leaves() -> None:
    """Else all of a large answer would be copied in one go."""
    cut: list[slice] = []

    class Piece(bytes):
        def __getitem__(self, part: Any) -> Any:
            cut.append(part)
            return super().__getitem__(part)

    async def send(_message: Any) -> None:
        sent.append(len(cut))

    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing is to be received")

    sent: list[int] = []
    asyncio.run(LargeResponse([Piece(5 * SLICE)], "text/plain")({"type": "http"}, receive, send))
    # The head; then each with the one behind it, which tells whether there is more.
    assert sent == [0, 2, 3, 4, 5, 5]
