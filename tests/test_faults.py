"""Disks that are full, read-only or gone, and Ctrl-C: what is said, what stays visible, and that it goes on."""

from __future__ import annotations

import errno
import functools
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_builds import committed, numpy_source, toy_spec, tree

import teacher_cache as tc
from teacher_cache.build import build
from teacher_cache.errors import BuildError, CacheNotFoundError
from teacher_cache.lease import at_work
from teacher_cache.spec import BuildSpec
from teacher_cache.storage.files import is_temporary
from teacher_cache.storage.local_root import LocalRoot

WRITES = ("replace", "unlink", "mkdir", "rmdir", "hardlink_to", "write_bytes")
READS = ("read_bytes", "stat", "glob", "rglob", "iterdir")
SAYS = {
    errno.ENOSPC: r"the disk is full.*Free space",
    errno.EDQUOT: r"your quota is used up.*quota raised",
    errno.EROFS: r"the file system is read-only.*Mount it writable",
    errno.EACCES: r"permission is denied.*Change the permissions",
    errno.EIO: r"the disk or its mount fails.*Check it",
    errno.ESTALE: r"the folder is gone.*mounted",
}


def tiny(cache: Path, arrays: Path, **changes: Any) -> BuildSpec:
    """Two shards of one view and one field: few enough file operations to fail at each of them."""
    source = {**numpy_source(arrays), "take": {"count": 9}}
    return toy_spec(cache, arrays, source=source, views__count=1, teacher__fields=["logits"], **changes)


def serial(spec: BuildSpec, progress: Callable[[int, int, int], None] | None = None) -> tc.BuildReport:
    return build(spec, "serial", progress)


@pytest.fixture(scope="module", params=["zarr", "parquet"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(kind: str, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tree of an undisturbed build."""
    root = tmp_path_factory.mktemp("whole") / "cache"
    serial(tiny(root, arrays, store__kind=kind))
    return tree(root)


class Faults:
    """Fails the file operations below a folder after `point` of them: so many times, or for ever."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        root: Path,
        point: int,
        fault: int | type[BaseException],
        times: float,
        reads: bool,
    ) -> None:
        self.left, self.times, self.fault, self.root = point, times, fault, str(root)
        self.reached = False
        self.log: list[str] = []
        for name in WRITES + (READS if reads else ()):
            patch.setattr(Path, name, self._wrapped(name, getattr(Path, name)))
        real_sync, real_open = os.fsync, Path.open

        def sync(handle: int) -> None:
            self._step("fsync", Path(f"/proc/self/fd/{handle}").readlink(), named=False)
            real_sync(handle)

        def opened(path: Path, mode: str = "r", *more: Any, **keywords: Any) -> Any:
            if set(mode) & set("wxa+"):
                self._step("open", path)
            return real_open(path, mode, *more, **keywords)

        patch.setattr(os, "fsync", sync)
        patch.setattr(Path, "open", opened)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any, **keywords: Any) -> Any:
            self._step(name, path)
            return real(path, *arguments, **keywords)

        return call

    def _step(self, name: str, path: Path, named: bool = True) -> None:
        if not str(path).startswith(self.root):
            return
        self.left -= 1
        if self.left < 0 < self.times:
            self.times -= 1
            self.reached = True
            self.log.append(f"{name} {path}")
            if isinstance(self.fault, int):
                raise OSError(self.fault, os.strerror(self.fault), *([str(path)] if named else []))
            raise self.fault


def shown(root: Path, whole: dict[str, str]) -> int:
    """How many shards readers are shown, each of which reads, and has the bytes of an undisturbed build."""
    try:
        cache = tc.open(root)
    except CacheNotFoundError:
        return 0
    for view, shard in committed(cache):
        cache.read("logits", view, range(*cache.manifest.first.grid.span(shard)))
    found = tree(root)
    assert all(found[path] == whole[path] for files in committed(cache).values() for path in files)
    return len(committed(cache))


@dataclass
class Failed:
    """One build that met a fault."""

    root: Path
    error: BaseException | None
    place: str
    """The operation that failed first."""
    told: int
    """How many rows the build has said are committed."""


def each(
    arrays: Path, tmp_path: Path, kind: str, whole: dict[str, str], step: int, faults: Callable[..., Faults]
) -> Iterator[Failed]:
    """Fails at each `step`-th operation in turn; yields after the failure, then goes on and compares the bytes."""
    point, reached = 0, True
    while reached:
        root = tmp_path / f"{point}"
        done = [0]
        error: BaseException | None = None
        with pytest.MonkeyPatch.context() as patch:
            fault = faults(patch, root, point)
            try:
                serial(tiny(root, arrays, store__kind=kind), lambda rows, _total, _built, done=done: done.append(rows))
            except BaseException as caught:
                error = caught
        reached = fault.reached
        yield Failed(root, error, fault.log[0] if fault.log else "nowhere", max(done))
        serial(tiny(root, arrays, store__kind=kind))
        assert tree(root) == whole, f"point {point}: {fault.log}"
        assert not any(is_temporary(path) for path in root.rglob("*"))
        point += step
    assert point > 40


class TestEveryOperation:
    """The n-th operation on the cache fails, for many n (slow: every n); the same command ends with the same bytes."""

    @pytest.mark.parametrize(
        ("code", "times", "reads", "step"),
        [
            (errno.ENOSPC, math.inf, False, 6),
            pytest.param(errno.ENOSPC, math.inf, False, 1, marks=pytest.mark.slow),
            (errno.EDQUOT, 1, False, 8),
            (errno.EROFS, math.inf, False, 10),
            (errno.EACCES, 1, False, 9),
            (errno.EIO, 1, True, 11),
            (errno.ESTALE, math.inf, True, 12),
        ],
        ids=["ENOSPC", "ENOSPC at each", "EDQUOT", "EROFS", "EACCES", "EIO", "ESTALE"],
    )
    def test_the_disk_fails(
        self,
        code: int,
        times: float,
        reads: bool,
        step: int,
        kind: str,
        whole: dict[str, str],
        arrays: Path,
        tmp_path: Path,
    ) -> None:
        """A `BuildError` with exit code 1 in plain words; readers see what was committed, whole."""
        errors = 0
        faults = functools.partial(Faults, fault=code, times=times, reads=reads)
        for failed in each(arrays, tmp_path, kind, whole, step, faults):
            # Giving a lease back may fail without harm, and without an error.
            if failed.error is not None:
                assert isinstance(failed.error, BuildError), (failed.place, repr(failed.error))
                assert failed.error.exit_code == 1
                assert re.search(SAYS[code], str(failed.error)), (failed.place, str(failed.error))
                assert "the same command again" in failed.error.hint
                errors += 1
            assert shown(failed.root, whole) >= {0: 0, 8: 1, 9: 2}[failed.told]
        assert errors > 5

    @pytest.mark.parametrize(
        ("times", "step"),
        [
            (1, 6),
            (2, 7),
            pytest.param(1, 1, marks=pytest.mark.slow),
            pytest.param(2, 2, marks=pytest.mark.slow),
        ],
        ids=["once", "twice", "once at each", "twice at each second"],
    )
    def test_ctrl_c(
        self, times: int, step: int, kind: str, whole: dict[str, str], arrays: Path, tmp_path: Path
    ) -> None:
        """Nothing temporary and no lease stays; a second Ctrl-C while the first is tidied up after corrupts nothing."""
        faults = functools.partial(Faults, fault=KeyboardInterrupt, times=times, reads=True)
        # A Zarr build looks at thousands of paths, many of them in the same way.
        for failed in each(arrays, tmp_path, kind, whole, step if kind == "parquet" else 5 + step, faults):
            assert failed.error is None or isinstance(failed.error, KeyboardInterrupt), repr(failed.error)
            assert shown(failed.root, whole) >= {0: 0, 8: 1, 9: 2}[failed.told]
            if times == 1 and failed.root.exists():
                left = [path.name for path in failed.root.rglob("*") if is_temporary(path)]
                assert not left, failed.place
                assert at_work(LocalRoot(failed.root)) == []
                assert not [*failed.root.glob("builders/*"), *failed.root.glob("claims/*")], failed.place


@contextmanager
def file_system(place: Path, size: str) -> Iterator[None]:
    """A file system of its own, in memory; skips where nobody may mount one."""
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], capture_output=True)


def remount(place: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", place], check=True)


class TestRealDisks:
    """The same with the kernel's own errors."""

    def test_full(self, arrays: Path, tmp_path: Path, kind: str, whole: dict[str, str]) -> None:
        """File systems of every size from nothing to enough; more room, and it goes on."""
        pages, full = 8, 0
        error: BuildError | None = None
        while not full or error is not None:
            with file_system(tmp_path / "disk", f"{pages * 4}k"):
                spec = tiny(tmp_path / "disk/cache", arrays, store__kind=kind)
                try:
                    serial(spec)
                    error = None
                except BuildError as caught:
                    error = caught
                    assert re.search(SAYS[errno.ENOSPC], str(error)), str(error)
                    full += 1
                    shown(Path(spec.cache), whole)
                    assert not any(is_temporary(path) for path in Path(spec.cache).rglob("*"))
                    remount(tmp_path / "disk", "size=4m")
                    serial(spec)
                assert tree(Path(spec.cache)) == whole
            pages += 3
        assert full > 1

    def test_read_only_and_gone(self, arrays: Path, tmp_path: Path, kind: str, whole: dict[str, str]) -> None:
        """Between two shards it is mounted read-only; next time it is taken away, and brought back."""
        disk = tmp_path / "disk"
        with file_system(disk, "4m"):
            spec = tiny(disk / "cache", arrays, store__kind=kind)

            def read_only(done: int, _total: int, _built: int) -> None:
                if done == 8:
                    remount(disk, "ro")

            with pytest.raises(BuildError, match=SAYS[errno.EROFS]):
                serial(spec, read_only)
            assert shown(disk / "cache", whole) == 1
            with pytest.raises(BuildError, match=SAYS[errno.EROFS]):
                serial(spec)
            remount(disk, "rw")
            elsewhere = tmp_path / "elsewhere"
            elsewhere.mkdir()

            def gone(done: int, _total: int, _built: int) -> None:
                if done == 8:
                    subprocess.run(["mount", "--bind", disk, elsewhere], check=True)
                    subprocess.run(["umount", "-l", disk], check=True)

            try:
                with pytest.raises(BuildError, match=r"gone|no longer there"):
                    serial(spec, gone)
                assert list(disk.iterdir()) == [], "nothing is written where the disk was"
                assert shown(elsewhere / "cache", whole) == 1
                spec = spec.model_copy(update={"cache": str(elsewhere / "cache")})
                serial(spec)
                assert tree(elsewhere / "cache") == whole
                # A sealed cache is read and reported from where nobody can write.
                remount(elsewhere, "ro")
                assert serial(spec).shards_built == 0
            finally:
                subprocess.run(["umount", "-l", elsewhere], capture_output=True)

    def test_a_limit_on_the_size_of_a_file(
        self, arrays: Path, tmp_path: Path, kind: str, whole: dict[str, str]
    ) -> None:
        """`ulimit -f`; Python ignores the signal and sees the error."""
        spec = tiny(tmp_path / "cache", arrays, store__kind=kind)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
        try:
            with pytest.raises(BuildError, match=r"limit on a file's size.*ulimit -f"):
                serial(spec)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        serial(spec)
        assert tree(tmp_path / "cache") == whole


SLOW = """
import time
import toy_models

class Slow(toy_models.PixelSums):
    def forward(self, images):
        time.sleep(0.3)
        return super().forward(images)
"""


class TestSignals:
    """The command line, stopped by the keyboard or a scheduler."""

    @pytest.mark.parametrize(
        ("executor", "number"),
        [
            pytest.param("serial", signal.SIGINT, marks=pytest.mark.slow),
            ("serial", signal.SIGTERM),
            pytest.param("ray", signal.SIGTERM, marks=pytest.mark.slow),
            pytest.param("ray", signal.SIGINT, marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.timeout(600)
    def test_it_stops_and_goes_on(self, executor: str, number: signal.Signals, arrays: Path, tmp_path: Path) -> None:
        """To the whole group, as a terminal does: nothing half written stays and nobody holds the cache."""
        (tmp_path / "slow.py").write_text(SLOW)
        spec = toy_spec(tmp_path / "cache", arrays, teacher__model="slow:Slow", teacher__fields=["logits"])
        (tmp_path / "build.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
        path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
        command = [
            sys.executable,
            "-m",
            "teacher_cache.cli",
            "build",
            str(tmp_path / "build.yaml"),
            "--executor",
            executor,
        ]
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # On cores that others keep busy: Ray gives its workers way to everybody.
        end = time.monotonic() + 240
        while not list((tmp_path / "cache").glob("receipts/*/*.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        assert [builder.pid for builder in at_work(LocalRoot(tmp_path / "cache"))] == [process.pid]
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 128 + number, (out, err)
        assert "stopped. What is committed stays; the same command goes on" in err
        assert "Traceback" not in err
        left = tree(tmp_path / "cache")
        assert not [name for name in left if name.endswith(".tmp") or name.startswith(("builders", "claims"))]
        assert 1 <= len([name for name in left if name.startswith("receipts/")]) < 8
