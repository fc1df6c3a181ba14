"""What is set for a serving process, and that all is as before behind it."""

from __future__ import annotations

import gc
import socket
import sys

import pytest
import uvicorn
from toy_service_models import ToyTeacher, toy_served

from services.app import create_app
from services.pauses import SWITCH_SECONDS, short_pauses
from services.server import HTTP, LOOPBACK, bind, run
from services.settings import Settings


def test_threads_give_way_sooner_and_what_is_loaded_is_not_walked_over() -> None:
    before, kept = sys.getswitchinterval(), [object() for _ in range(3)]
    with short_pauses():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        assert before > SWITCH_SECONDS
        assert gc.get_freeze_count() > 10_000
        assert not any(one is kept for one in gc.get_objects())
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (before, 0)
    assert any(one is kept for one in gc.get_objects())


def test_all_is_as_before_where_the_server_fails() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(OSError, match="no socket"), short_pauses():
        raise OSError("no socket")
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (before, 0)


def test_a_server_runs_with_them_and_with_the_parser_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of hostile requests name this parser: another one that is installed too must not take its place."""
    found: list[float] = []

    async def serve(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        assert len(sockets) == 1
        assert server.config.http == HTTP
        found.append(sys.getswitchinterval())

    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    with bind(LOOPBACK, 0) as listener:
        run(create_app({"toy": toy_served(ToyTeacher())}, Settings()), listener, None)
    assert found == [pytest.approx(SWITCH_SECONDS)]
