"""The load that the service's benchmark makes, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from load_generator import Answer, Closed, Open, drive
from load_requests import STAMP, Question
from overload import percentile
from service_cases import pace

BODY = b"head" + bytes(3 * 16)
IMAGES = (4, 20, 36)


class Server:
    """Answers after a while, one request after the other, and keeps what was sent."""

    def __init__(self, seconds: float = 0.0, status: int = 200) -> None:
        self.bodies: list[bytes] = []
        self.connections: list[asyncio.Task[None] | None] = []
        self._seconds, self._status, self._turn = seconds, status, asyncio.Lock()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections.append(asyncio.current_task())
        while head := await self._head(reader):
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            self.bodies.append(await reader.readexactly(length))
            async with self._turn:
                await asyncio.sleep(self._seconds)
            writer.write(b"HTTP/1.1 %d said\r\nContent-Length: 2\r\n\r\nok" % self._status)
        writer.close()
        await writer.wait_closed()

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""


def load(server: Server, how: Closed | Open, images: tuple[int, ...] = IMAGES) -> list[Answer]:
    """All answers of a load on a server of this process."""

    async def both() -> list[Answer]:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        async with listening:
            question = Question(port, "/predict", (("X-Of", "bench"),), BODY, images)
            answers = await drive(question, how, itertools.count())
            await asyncio.gather(*(one for one in server.connections if one is not None))
            return answers

    return asyncio.run(both())


def test_no_image_is_sent_twice() -> None:
    server = Server()
    assert len(load(server, Closed(callers=3, most=20))) == len(server.bodies) == 20
    stamps = {body[start : start + STAMP] for body in server.bodies for start in IMAGES}
    assert len(stamps) == 20 * len(IMAGES)
    rest = {
        bytes(body[:4] + body[4 + STAMP : 20] + body[20 + STAMP : 36] + body[36 + STAMP :]) for body in server.bodies
    }
    assert rest == {b"head" + bytes(3 * (16 - STAMP))}


def test_what_has_no_images_is_sent_as_it_is() -> None:
    server = Server()
    load(server, Closed(callers=1, most=2), images=())
    assert server.bodies == [BODY, BODY]


def test_statuses_are_told() -> None:
    assert {answer.status for answer in load(Server(status=503), Closed(callers=2, most=4))} == {503}


def test_an_open_loop_counts_the_time_in_which_a_slow_server_lets_requests_wait() -> None:
    answers = load(Server(seconds=0.05), Open(rate=100, seconds=0.3))
    # Each is served 50 ms after the one before, however early it was due: the last waited for all the others.
    assert len(answers) >= 15
    last = max(answers, key=lambda answer: answer.done)
    assert last.scheduled < 0.3
    assert last.seconds > 0.05 * len(answers) - 0.3


def test_a_pace_is_the_slope_of_bursts() -> None:
    answers = [Answer(0, burst * 0.1, 200) for burst in range(1, 41) for _ in range(8)]
    assert pace(answers, images=2, seconds=4) == pytest.approx(8 * 2 / 0.1, rel=0.01)


def test_a_pace_of_refusals_or_of_too_little_is_none() -> None:
    with pytest.raises(RuntimeError, match="503"):
        pace([Answer(0, 1, 503)], 1, 4)
    with pytest.raises(RuntimeError, match="make --seconds more"):
        pace([Answer(0, 1, 200), Answer(0, 2, 200)], 1, 4)


def test_percentiles_are_of_values_that_were_measured() -> None:
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([3.0], 0.99) == 3.0
    assert math.isnan(percentile([], 0.5))
