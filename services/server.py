"""The process: its sockets, the server and the admin's beside it in one event loop, and the way out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Literal

import uvicorn
from fastapi import FastAPI

from services.admin import Admin
from services.pauses import short_pauses
from services.state import Service
from teacher_cache.errors import SpecError

LOOPBACK = "127.0.0.1"
HTTP: Literal["h11"] = "h11"
"""The one of uvicorn's parsers that bounds the length of headers; left alone, it takes another that is installed."""
_DRAIN_LIMIT = 30
"""Seconds beside those that may be queued."""


def bind(host: str, port: int, named: str = "--port") -> socket.socket:
    """Takes a port before the teacher is loaded: a taken one should not cost a minute.

    Raises:
        SpecError: the port is in use or not allowed, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it, each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            hint = "Stop what listens there, or choose another port; 0 takes a free one."
            raise SpecError(named, "must be free on this machine", port, hint) from None
        if error.errno == errno.EACCES:
            raise SpecError(named, "must be allowed to this user", port, "Choose one above 1023.") from None
        hint = "Use 127.0.0.1, or an address of this machine."
        raise SpecError("--host", f"cannot be bound: {error.strerror}", host, hint) from None
    return listener


def run(app: FastAPI, listener: socket.socket, admin: socket.socket | None) -> None:
    """Serves until a signal, or the admin, ends it; what was taken is finished.

    Args:
        app: of `create_app`.
        listener: where it is served.
        admin: where its admin's endpoints are; on loopback.
    """
    config = _config(app, app.state.service)
    with short_pauses(), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(Server(config, app.state.service), app, listener, admin))


async def _serve(server: Server, app: FastAPI, listener: socket.socket, admin: socket.socket | None) -> None:
    if admin is None:
        await server.serve([listener])
        return
    endpoints = Admin(app.state.service, app.state.metrics, server.drain)
    beside = _Beside(_config(endpoints.app(), app.state.service, lifespan="off"))
    watched = asyncio.create_task(beside.serve([admin]))
    # It ends after the other; if it cannot go on, the other ends too, and its error is raised below.
    watched.add_done_callback(lambda _task: server.close())
    try:
        await server.serve([listener])
    finally:
        beside.should_exit = True
        await watched


def _config(app: FastAPI, service: Service, lifespan: str = "on") -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=HTTP,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan=lifespan,  # type: ignore[arg-type]  # one of its literals
        timeout_graceful_shutdown=_DRAIN_LIMIT + math.ceil(service.settings.queue_seconds),
    )


class Server(uvicorn.Server):
    """At the first signal `readyz` turns 503 and requests are still taken for a while; then they are finished.

    A load balancer thus has time to look away before the door closes. A second signal closes it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread; not passed on, so that a drained server exits with 0."""
        if self._service.draining:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
            return
        self.drain()

    def drain(self) -> None:
        """What the first signal does; does nothing when it is on its way out."""
        if self._service.draining:
            return
        self._service.draining = True
        timer = threading.Timer(self._service.settings.drain_seconds, self.close)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Takes no more connections, finishes what was taken, and ends."""
        self.should_exit = True


class _Beside(uvicorn.Server):
    """Leaves the signals to the other."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


__all__ = ["HTTP", "LOOPBACK", "Server", "bind", "run"]
