"""`teacher-serve CONFIG…`: serves the teachers of builds' configurations. `predict`, `keys`, `audit` are beside it."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
import uvicorn
import yaml
from typer.core import TyperGroup

from services.app import create_app
from services.books import Books
from services.commands import audit, keys
from services.predict_command import predict
from services.settings import Settings
from services.state import Service
from services.teachers import open_served
from services.transport import KEY_VARIABLE
from teacher_cache import console
from teacher_cache.errors import SpecError
from teacher_cache.spec import BuildSpec, load_spec, parse

_SERVICE = "service."
_DRAIN_LIMIT = 30
"""Seconds beside those that may be queued."""


class _ServeUnlessSaid(TyperGroup):
    """`teacher-serve CONFIG` is `teacher-serve serve CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click does it, with the command filled in."""
        named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["serve", *args])


class _Server(uvicorn.Server):
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
        self._service.draining = True
        timer = threading.Timer(self._service.settings.drain_seconds, self._close)
        timer.daemon = True
        timer.start()

    def _close(self) -> None:
        self.should_exit = True


def serve(
    configs: Annotated[list[Path], typer.Argument(help="The builds' YAML files.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of every configuration, or service.KEY=VALUE of a limit."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address; beyond loopback a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    state: Annotated[
        Path | None,
        typer.Option(help="Folder of keys, usage and audit (`teacher-serve keys`); nobody comes in without one."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Last part of one teacher's URL; default: teacher.name.")] = None,
) -> None:
    """Serves teachers' answers over HTTP, without their weights. Each has its own name, queue and threads.

    One key that may ask everything is read from TEACHER_API_KEY; others, with limits, are in the --state folder.
    """
    given = overrides or []
    settings = _settings(given, host, port, state)
    specs = _specs(configs, [item for item in given if not item.startswith(_SERVICE)], name)
    with _bind(settings) as listener, contextlib.closing(Books(settings)) as books:
        opened = [open_served(spec, from_cache=settings.from_cache) for spec in specs]
        teachers = {served.name: served for served in opened}
        app = create_app(teachers, settings, books)
        address = f"[{host}]" if ":" in host else host
        for served in teachers.values():
            url = f"http://{address}:{listener.getsockname()[1]}/{served.name}"
            print(f"serving {served.name}, digest {served.digest}, at {url}", flush=True)
        server = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=_DRAIN_LIMIT + math.ceil(settings.queue_seconds),
        )
        _Server(server, app.state.service).run(sockets=[listener])


def _specs(configs: list[Path], overrides: list[str], name: str | None) -> list[BuildSpec]:
    """What is served, each under a name of its own."""
    if name is not None and len(configs) > 1:
        hint = "Set teacher.name in each configuration."
        raise SpecError("--name", "names one teacher", f"{name} for {len(configs)} configurations", hint)
    named = [] if name is None else [f"teacher.name={json.dumps(name)}"]
    specs = [load_spec(config, [*overrides, *named]) for config in configs]
    names = [spec.teacher.name for spec in specs]
    twice = next((one for one in names if names.count(one) > 1), None)
    if twice is not None:
        hint = "It is the last part of the URL: give each configuration another one."
        raise SpecError("teacher.name", "must be another for each teacher that is served", twice, hint)
    return specs


def _settings(overrides: list[str], host: str, port: int, state: Path | None) -> Settings:
    """The flags, `--set service.KEY=VALUE`, and the key from the environment."""
    given: dict[str, object] = {}
    for override in overrides:
        if not override.startswith(_SERVICE):
            continue
        name, sign, value = override.removeprefix(_SERVICE).partition("=")
        if not sign:
            raise SpecError("--set", "must be KEY=VALUE", override, "For example service.max_images=64.")
        if name in ("host", "port", "api_key", "state"):
            hint = "Use --host, --port, --state, and the variable TEACHER_API_KEY."
            raise SpecError("--set", "must name a limit", f"{_SERVICE}{name}", hint)
        given[name] = yaml.safe_load(value)
    given |= {"host": host, "port": port, "state": state, "api_key": os.environ.get(KEY_VARIABLE)}
    return parse(Settings, given, "the command line")


def _bind(settings: Settings) -> socket.socket:
    """Takes the port before the teacher is loaded: a taken one should not cost a minute.

    Raises:
        SpecError: the port is in use or not allowed, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it, each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            hint = "Stop what listens there, or choose another port; --port 0 takes a free one."
            raise SpecError("--port", "must be free on this machine", settings.port, hint) from None
        if error.errno == errno.EACCES:
            hint = "Choose one above 1023."
            raise SpecError("--port", "must be allowed to this user", settings.port, hint) from None
        hint = "Use 127.0.0.1, or an address of this machine."
        raise SpecError("--host", f"cannot be bound: {error.strerror}", settings.host, hint) from None
    return listener


def main() -> NoReturn:
    """Entry point of `teacher-serve`."""
    command = typer.Typer(cls=_ServeUnlessSaid, add_completion=False, pretty_exceptions_enable=False)
    command.command()(serve)
    command.add_typer(keys, name="keys")
    command.add_typer(audit, name="audit")
    command.command()(predict)
    console.sys_path_here()
    console.run(command, "Nothing is lost: every answer that was begun was given.")


if __name__ == "__main__":
    main()
