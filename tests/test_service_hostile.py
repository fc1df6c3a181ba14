"""More than sixty requests that mean no good: each is refused with a 4xx, and the next honest one is answered."""

from __future__ import annotations

import json
import re
import resource
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
import torch
from hostile_inputs import GOOD, PREDICT, cases, raw
from toy_service_models import ToyTeacher, open_gate, serving, toy_logits, toy_served

from services.wire import unpack_tensors

CASES = cases()
TENSORS = {"Content-Type": "application/safetensors"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A service that takes a megabyte and 65,536 pixels, and waits two seconds for a body."""
    limits = {"max_images": 20, "max_body_bytes": 2**20, "max_pixels": 2**16, "body_seconds": 2}
    with serving(toy_served(open_gate(ToyTeacher())), **limits) as client:
        yield client


def answer_to(client: httpx.Client, data: bytes, pause: float = 0.0) -> tuple[int, bytes]:
    """Sends bytes as they are; the status, and the whole answer."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=20) as connection:
        try:
            for place in range(0, len(data), 1 if pause else 65_536):
                connection.sendall(data[place : place + (1 if pause else 65_536)])
                if pause:
                    time.sleep(pause)
        except (BrokenPipeError, ConnectionResetError):
            pass  # It has been refused before it was read to its end.
        found = bytearray()
        try:
            while part := connection.recv(65_536):
                found += part
                if (whole := _whole(bytes(found))) is not None:
                    return whole
        except ConnectionResetError:
            pass
    assert found, "closed without an answer"
    return int(found.split(b" ", 2)[1]), bytes(found)


def _whole(found: bytes) -> tuple[int, bytes] | None:
    """An answer that is there to its last byte."""
    head, split, body = found.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    if not split or (length is not None and len(body) < int(length[1])):
        return None
    return (int(head.split(b" ", 2)[1]), found) if length is not None else None


def require_answers(client: httpx.Client) -> None:
    """An honest request is answered, and right."""
    answer = client.post(PREDICT, content=GOOD, headers=TENSORS)
    assert answer.status_code == 200
    zeros = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert torch.equal(unpack_tensors(answer.content)["values"], toy_logits(zeros))


def test_there_are_more_than_sixty() -> None:
    assert len(CASES) > 60


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_nothing_is_lost(client: httpx.Client, name: str) -> None:
    statuses, made = CASES[name]
    started = time.monotonic()
    status, answer = answer_to(client, made())
    assert status in statuses
    assert time.monotonic() - started < 10, "a refusal is no work"
    for secret in (b"Traceback", b".py", b"site-packages", b"/root", b"root:", b"<script>"):
        assert secret not in answer
    if b"application/problem+json" in answer:
        problem = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert problem["status"] == status
    require_answers(client)


def test_the_memory_of_all_of_them_is_given_back(client: httpx.Client) -> None:
    """A bomb that was decoded would leave its mark: 6,000² pixels are 108 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _, made in CASES.values():
        answer_to(client, made())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_body_that_trickles_is_cut_off(client: httpx.Client) -> None:
    """Each byte a little later: the time for all of them counts, not the time between two."""
    head = f"POST {PREDICT} HTTP/1.1\nHost: localhost\nContent-Type: application/safetensors\nContent-Length: 200"
    started = time.monotonic()
    status, answer = answer_to(client, raw(head.encode()) + GOOD[:120], pause=0.02)
    assert status == 408
    assert b"body" in answer
    assert time.monotonic() - started < 10
    require_answers(client)


def test_a_body_that_never_comes_is_not_waited_for(client: httpx.Client) -> None:
    head = f"POST {PREDICT} HTTP/1.1\nHost: localhost\nContent-Type: application/safetensors\nContent-Length: 200"
    assert answer_to(client, raw(head.encode()))[0] == 408
    require_answers(client)
