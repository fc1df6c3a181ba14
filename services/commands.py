"""`teacher-serve keys …` and `teacher-serve audit …`: what whoever runs a server does beside it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import yaml

from services import keys as key_store
from services.audit_verify import verify
from services.policy import Policy
from services.state_folder import StateFolder
from teacher_cache import console
from teacher_cache.errors import CorruptionError, SpecError
from teacher_cache.spec import parse

State = Annotated[Path, typer.Option("--state", help="The server's folder.", show_default=False)]
Name = Annotated[str, typer.Argument(help="Lower case, digits and ._-", show_default=False)]

keys = typer.Typer(no_args_is_help=True, help="Who may ask what; a running server takes changes up at once.")
audit = typer.Typer(no_args_is_help=True, help="Who asked what.")


@keys.command()
def add(
    name: Name,
    state: State,
    limits: Annotated[
        list[str] | None,
        typer.Option("--set", help=f"KEY=VALUE of the policy; KEY is one of {', '.join(Policy.model_fields)}."),
    ] = None,
) -> None:
    """Make a key and print it, this once. Without limits it may ask everything."""
    policy = parse(Policy, _values(limits or []), "the command line")
    print(key_store.add(StateFolder(state), name, policy))


@keys.command("list")
def list_(state: State, json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False) -> None:
    """Show names, states and limits; keys themselves are nowhere."""
    now = datetime.now(UTC)
    if json:
        console.print_json(key_store.listed(StateFolder(state), now))
        return
    found = key_store.read(StateFolder(state).keys).keys
    rows = [(name, key.state(now), key.created.isoformat(), _shown(key.policy)) for name, key in found.items()]
    console.print_rows(f"keys of {state}", ("name", "state", "created", "limits"), rows)


@keys.command()
def revoke(name: Name, state: State) -> None:
    """End a key for good. Its name stays, and is not used again."""
    print(f"{name} is revoked" if key_store.revoke(StateFolder(state), name) else f"{name} was revoked before")


@audit.command("verify")
def verify_(
    files: Annotated[list[Path], typer.Argument(help="Audit files, the oldest first.", show_default=False)],
    after: Annotated[str | None, typer.Option(help="Hash of the line before; else they begin with the first.")] = None,
    head: Annotated[str | None, typer.Option(help="Hash of the last line; else what FILE's .head says.")] = None,
) -> None:
    """Find every line that was altered, removed, swapped, inserted or cut off, and say where.

    The hash that it prints is worth keeping elsewhere: who can write the folder can write the whole chain anew.
    """
    verdict = verify(files, after, head)
    for one in verdict.breaks:
        print(f"{one.file}:{one.line}: {one.rule} (found: {one.found})")
    if verdict.breaks:
        first = verdict.breaks[0]
        hint = "Keep the files as they are, and compare them with a copy."
        raise CorruptionError(f"{first.file}:{first.line}", first.rule, first.found, hint)
    print(f"{verdict.lines} lines, all of them as they were written; the last is {verdict.end}")


def _values(limits: list[str]) -> dict[str, object]:
    given: dict[str, object] = {}
    for limit in limits:
        name, sign, value = limit.partition("=")
        if not sign:
            raise SpecError("--set", "must be KEY=VALUE", limit, "For example --set images_per_day=1000.")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SpecError("--set", "must have a YAML value", limit, "For example --set outputs=[topk].") from None
    return given


def _shown(policy: Policy) -> str:
    given = policy.model_dump(mode="json", exclude_defaults=True)
    return ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
