"""Builds in processes of their own, everything that belongs to one of them, and a reader that watches.

Processes are forked from one that has imported everything already (`forkserver`): a serial build of the toy data
takes a fifth of a second instead of three.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np

import teacher_cache as tc
from teacher_cache.build import Executor, build
from teacher_cache.errors import CacheNotFoundError, HoleError
from teacher_cache.spec import BuildSpec

HANG = 180.0
"""Seconds after which a process that should have ended is taken for hung: a guard, nothing is measured by it."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["crash_processes", "ray", "teacher_cache.precompute", "toy_models"])


def warm() -> None:
    """Returns when everything has been imported that builds need."""
    process = _processes.Process(target=time.sleep, args=(0,))
    process.start()
    process.join()


def start_build(
    spec: BuildSpec, executor: Executor, environment: dict[str, str], output: Path, die_before: int | None = None
) -> BaseProcess:
    """A build in a session of its own, with these variables set and its output in a file."""
    process = _processes.Process(
        target=_build, args=(spec.model_dump_json(), executor, environment, output, die_before)
    )
    process.start()
    return process


def _build(spec: str, executor: Executor, environment: dict[str, str], output: Path, die_before: int | None) -> None:
    os.setsid()
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    made = kill_before_change(die_before) if die_before is not None else None
    build(BuildSpec.model_validate_json(spec), executor)
    if made is not None:
        output.with_suffix(".changes").write_text(str(made()))


def kill_before_change(number: int) -> Callable[[], int]:
    """From now on this process lets so many changes of the file system happen, and is killed before the next.

    Returns:
        Tells how many there were.
    """
    left = number

    def step() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            step()
            return real(*arguments, **keywords)

        return call

    for name in ("replace", "unlink", "rmdir", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    os.fsync = counted(os.fsync)
    plain_open = Path.open

    def opened(path: Path, mode: str = "r", *more: Any, **keywords: Any) -> Any:
        if set(mode) & set("wxa+"):
            step()
        return plain_open(path, mode, *more, **keywords)

    Path.open = opened  # type: ignore[method-assign, assignment]
    return lambda: number - left


def members(case: str) -> dict[int, str]:
    """Every living process with `TOY_CASE=<case>` in its environment, and its command line: what Ray has started."""
    found = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            environment = (place / "environ").read_bytes().split(b"\0")
            if f"TOY_CASE={case}".encode() in environment:
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def kill(pid: int) -> None:
    """SIGKILL to one process, where it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def workers(case: str) -> list[int]:
    """The processes of the actors."""
    return [pid for pid, command in members(case).items() if command.startswith("ray::ShardWorker")]


def kill_all(case: str, driver: BaseProcess) -> None:
    """The driver, the raylet, the control store, the actors: all of them, and whatever starts meanwhile."""
    assert driver.pid is not None
    kill(driver.pid)
    while found := members(case):
        for pid in found:
            kill(pid)
        time.sleep(0.01)


def await_gone(case: str) -> None:
    """Until the processes of a killed driver have noticed; those that do not are killed."""
    end = time.monotonic() + 20
    while (found := members(case)) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in found:
        kill(pid)


def joined(process: BaseProcess) -> int:
    """The exit code of a process; a hung one is killed and is a failure."""
    process.join(HANG)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"a process hung for {HANG} s")
    return process.exitcode


class Watcher:
    """A process that opens the cache again and again while it is built, killed and resumed, and reads all of it."""

    def __init__(self, root: Path, exact: Path, notes: Path) -> None:
        """Begins to watch.

        Args:
            root: the cache; need not be there yet.
            exact: an `.npz` with the true values of each field, [views, rows, ...].
            notes: a folder for what it has to tell.
        """
        self._notes = notes
        self._process = _processes.Process(target=_watch, args=(root, exact, notes), daemon=True)
        self._process.start()

    def end(self) -> dict[str, int]:
        """One more look, then what was seen; `AssertionError` with the watcher's traceback if anything was wrong."""
        (self._notes / "stop").touch()
        joined(self._process)
        seen: dict[str, int] | dict[Literal["failed"], str] = json.loads((self._notes / "seen.json").read_text())
        assert "failed" not in seen, seen["failed"]
        return seen


def _watch(root: Path, exact: Path, notes: Path) -> None:
    with np.load(exact) as arrays:
        truth = dict(arrays)
    committed: set[tuple[int, int]] = set()
    looks = rows = 0
    told: dict[str, Any]
    try:
        last = False
        while not last:
            last = (notes / "stop").exists()
            rows += _look(root, truth, committed)
            looks += 1
            time.sleep(0.02)
        told = {"looks": looks, "rows": rows, "committed": len(committed)}
    except BaseException:
        told = {"failed": traceback.format_exc()}
    (notes / "seen.json").write_text(json.dumps(told))


def _look(root: Path, truth: dict[str, Any], committed: set[tuple[int, int]]) -> int:
    """Reads all that is there: exact values or `HoleError`, and what was committed once is committed for ever."""
    try:
        cache = tc.open(root)
    except CacheNotFoundError:
        assert not committed, "the manifest is gone"
        return 0
    read = 0
    for view in range(cache.views):
        for shard in range(cache.manifest.first.grid.shards):
            rows = list(range(*cache.manifest.first.grid.span(shard)))
            for field, values in truth.items():
                try:
                    target = cache.read(field, view, rows)
                except HoleError:
                    assert (view, shard) not in committed, f"view {view}, shard {shard} became a hole"
                    assert cache.manifest.state != "building" or not cache.indices[0].shards(view)[shard]
                    continue
                assert isinstance(target, tc.DenseTarget)
                assert np.array_equal(target.values.numpy(), values[view, rows]), f"{field}, {view=}, {shard=}"
                committed.add((view, shard))
                read += len(rows)
    return read


if __name__ == "__main__":
    sys.exit("This is a part of crash_harness.py")
