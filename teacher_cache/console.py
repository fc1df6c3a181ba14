"""What the three command lines share: exit codes, JSON or tables, and progress on standard error."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from teacher_cache.errors import TeacherCacheError

out = Console(soft_wrap=True, markup=False)
err = Console(stderr=True, soft_wrap=True, markup=False)


def run(app: typer.Typer, resume: str) -> NoReturn:
    """Runs a command line: our own errors become one message and their exit code; others keep their traceback.

    Args:
        app: the commands.
        resume: what to say after Ctrl-C.
    """
    try:
        code = app(standalone_mode=False)
    except TeacherCacheError as error:
        err.print(Text.assemble(("error: ", "bold red"), str(error)))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort, Stopped) as error:
        err.print(f"stopped. {resume}")
        sys.exit(128 + (error.signal if isinstance(error, Stopped) else signal.SIGINT))
    except Exception as error:
        # Typer's own usage errors (an unknown option, a missing argument) know how to show themselves.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code or 0)


class Stopped(Exception):  # noqa: N818 - no error: someone wanted it
    """A signal has ended the work, which is tidied up after."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised as Ctrl-C is."""


@contextmanager
def stoppable() -> Iterator[None]:
    """A scheduler's SIGTERM ends what is in here as Ctrl-C does: what is half written goes, leases are given back.

    Raises:
        Stopped: either came.
    """

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def sys_path_here() -> None:
    """Lets `module:attribute` name code in the current folder, as `python -m` would."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def print_json(value: object) -> None:
    """One JSON document on standard output, for machines; dataclasses become objects."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    sys.stdout.write(json.dumps(plain, indent=2, default=str) + "\n")


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """A table of two columns, for people; facts that are None are left out."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            # As text: in brackets there may be a tensor's shape, or a folder's name, and no markup.
            table.add_row(name, Text(str(value)))
    out.print(table)


def print_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table with a header, for people."""
    table = Table(title=title, title_justify="left")
    for name in header:
        # What to type next must not end in an ellipsis.
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    out.print(table)


def warn(message: str) -> None:
    """A warning that cannot be overlooked."""
    err.print(Text.assemble(("WARNING: ", "bold yellow"), message))


def size(count: float) -> str:
    """Bytes for people: `1.2 MB` (powers of ten)."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


class _Rate(ProgressColumn):
    """Units a second of this run: what was done before does not count."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        built, seconds = task.fields.get("built", 0), task.elapsed or 0.0
        return Text(f"{built / seconds:,.1f} {self._unit}/s" if built and seconds else f"… {self._unit}/s")


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int, int], None]]:
    """A bar on standard error with rate and time left; yields `update(done, total, built in this run)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=False) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int, built: int) -> None:
            bar.update(task, completed=done, total=total, built=built)

        yield update
