"""`teacher-serve CONFIG…`: serves the teachers of builds' configurations. `predict`, `keys`, `audit` are beside it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from typer.core import TyperGroup

from services.app import create_app
from services.books import Books
from services.commands import audit, keys
from services.device_process import teachers_apart
from services.logs import Level, logging_to
from services.predict_command import predict
from services.server import LOOPBACK, bind, run
from services.settings import Settings
from services.teachers import open_served, servable
from services.transport import KEY_VARIABLE
from teacher_cache import console
from teacher_cache.errors import SpecError
from teacher_cache.plan import load_here
from teacher_cache.spec import BuildSpec, load_spec, parse

_SERVICE = "service."


class _ServeUnlessSaid(TyperGroup):
    """`teacher-serve CONFIG` is `teacher-serve serve CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click does it, with the command filled in."""
        named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["serve", *args])


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
    log_level: Annotated[Level, typer.Option(help="Of the JSON lines (text at a terminal) on stderr.")] = Level.INFO,
) -> None:
    """Serves teachers' answers over HTTP, without their weights. Each has its own name, queue and threads.

    One key that may ask everything is read from TEACHER_API_KEY; others, with limits, are in the --state folder.
    """
    given = overrides or []
    settings = _settings(given, host, port, state)
    specs = _specs(configs, [item for item in given if not item.startswith(_SERVICE)], name)
    with contextlib.ExitStack() as opened:
        opened.enter_context(logging_to(sys.stderr, log_level))
        listener = opened.enter_context(bind(host, port))
        admin = None
        if settings.admin_port is not None:
            admin = opened.enter_context(bind(LOOPBACK, settings.admin_port, "service.admin_port"))
        books = opened.enter_context(contextlib.closing(Books(settings)))
        loads = opened.enter_context(teachers_apart(specs)) if settings.apart else [load_here for _ in specs]
        teachers = [
            open_served(spec, from_cache=settings.from_cache, load=load)
            for spec, load in zip(specs, loads, strict=True)
        ]
        app = create_app({served.name: served for served in teachers}, settings, books)
        address = f"[{host}]" if ":" in host else host
        for served in teachers:
            url = f"http://{address}:{listener.getsockname()[1]}/{served.name}"
            print(f"serving {served.name}, digest {served.digest}, at {url}", flush=True)
        if admin is not None:
            print(f"admin at http://{LOOPBACK}:{admin.getsockname()[1]}", flush=True)
        run(app, listener, admin)


def _specs(configs: list[Path], overrides: list[str], name: str | None) -> list[BuildSpec]:
    """What is served, each under a name of its own."""
    if name is not None and len(configs) > 1:
        hint = "Set teacher.name in each configuration."
        raise SpecError("--name", "names one teacher", f"{name} for {len(configs)} configurations", hint)
    named = [] if name is None else [f"teacher.name={json.dumps(name)}"]
    specs = [servable(load_spec(config, [*overrides, *named])) for config in configs]
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
