"""A whole cache in an object store: built, killed, resumed, shared, read, verified, repaired, and failed by the store.

Everything runs against SeaweedFS, through a proxy that counts requests and makes some of them fail. What must come
out is what the same build leaves in a folder: the same names, the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import sys
import threading
import uuid
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import s3fs
import test_cli
import test_growing
import test_lease
import test_roots
import yaml
from crash_harness import Place, Reference
from crash_processes import joined, start_build
from s3_server import ALWAYS, KEY, SECRET, Proxy, S3Server, Trouble
from torch.utils.data import DataLoader, Dataset
from toy_builds import ROWS, committed, numpy_source, toy_spec, tree

import teacher_cache as tc
from student_train.recipes import DataSpec
from teacher_cache.build import BuildReport, build
from teacher_cache.encodings import DenseTarget
from teacher_cache.errors import BuildError, CacheNotFoundError, CorruptionError, SpecError, StorageError
from teacher_cache.receipts import receipt_of
from teacher_cache.spec import BuildSpec, parse
from teacher_cache.storage.copies import _folder_of
from teacher_cache.storage.remote_root import RemoteRoot

server, between, run = test_roots.server, test_roots.between, test_cli.run
in_threads, at = test_lease.in_threads, test_lease.at
FIELDS = ("logits", "feature:stem")
STORES = pytest.mark.parametrize("kind", ["zarr", "parquet"])


class Bucket:
    """What is in the store, seen past the code under test and past the proxy."""

    def __init__(self, server: S3Server) -> None:
        self._files = s3fs.S3FileSystem(
            endpoint_url=server.endpoint, key=KEY, secret=SECRET, use_listings_cache=False, skip_instance_cache=True
        )

    def place(self) -> str:
        """Where nothing is yet."""
        return f"s3://bucket/{uuid.uuid4().hex}"

    def names(self, url: str) -> list[str]:
        """Every object below a place."""
        below = url.removeprefix("s3://") + "/"
        return sorted(found.removeprefix(below) for found in self._files.find(below))

    def tree(self, url: str) -> dict[str, str]:
        """As `toy_builds.tree`."""
        return {name: hashlib.sha256(self.read(url, name)).hexdigest() for name in self.names(url)}

    def read(self, url: str, name: str) -> bytes:
        data: bytes = self._files.cat_file(f"{url}/{name}")
        return data

    def write(self, url: str, name: str, data: bytes) -> None:
        self._files.pipe_file(f"{url}/{name}", data)

    def remove(self, url: str, name: str) -> None:
        self._files.rm_file(f"{url}/{name}")

    def upload(self, folder: Path) -> str:
        """A cache that was built in a folder, as `aws s3 sync` would bring it here."""
        url = self.place()
        for path in (path for path in folder.rglob("*") if path.is_file()):
            self.write(url, path.relative_to(folder).as_posix(), path.read_bytes())
        return url


@pytest.fixture(scope="module")
def bucket(server: S3Server) -> Bucket:
    return Bucket(server)


@pytest.fixture(autouse=True)
def quick(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the proxy, without troubles yet; short pauses, and time enough for a machine that is busy."""
    between.troubles.clear()
    between.requests.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
    monkeypatch.setattr(sys.modules["teacher_cache.build"], "_POLL", 0.02)
    monkeypatch.setattr("teacher_cache.storage.remote_requests.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("teacher_cache.storage.remote_requests.LONGEST_PAUSE", 0.05)
    be_patient(monkeypatch, tries=6, timeout=20.0)


def be_patient(monkeypatch: pytest.MonkeyPatch, tries: int, timeout: float) -> None:
    """What `RemoteRoot` does where it is not told: `open_root` has no such arguments."""
    monkeypatch.setattr(RemoteRoot.__init__, "__defaults__", (None, tries, timeout))


def at_url(spec: BuildSpec, url: str) -> BuildSpec:
    return spec.model_copy(update={"cache": url})


def spec_of(arrays: Path, kind: str, url: str, **changes: Any) -> BuildSpec:
    """What `built` was built from, into the store."""
    store = {"kind": kind, "shard_rows": 8, "chunk_rows": 4}
    return at_url(toy_spec(Path("elsewhere"), arrays, store=store, **changes), url)


def kind_of(built: Path) -> str:
    return tc.open(built).manifest.store.kind


def fetched(between: Proxy) -> list[str]:
    """The names of data files that were asked for since the list was cleared."""
    paths = [unquote(urlsplit(path).path) for method, path in between.requests if method == "GET"]
    names = [path.split("/", 3)[-1] for path in paths]
    return [name for name in names if name.startswith("data/")]


def sent(between: Proxy, *methods: str) -> list[tuple[str, str]]:
    return [request for request in between.requests if request[0] in methods]


# Building.


@pytest.mark.parametrize("built", ["zarr"], indirect=True)
def test_a_build_is_the_folder_s(built: Path, arrays: Path, bucket: Bucket, between: Proxy) -> None:
    """Manifest, tables, `zarr.json` and payload; said again, nothing is written; nothing tells where it was built."""
    url = bucket.place()
    spec = spec_of(arrays, kind_of(built), url)
    report = build(spec, "serial")
    assert bucket.tree(url) == tree(built)
    assert (report.path, report.shards_built, report.rows_built) == (url, 8, 2 * ROWS)
    between.requests.clear()
    assert build(spec, "serial").shards_built == 0
    assert sent(between, "PUT", "DELETE") == []
    assert tc.verify(url, recompute=8, views="all").ok


@pytest.mark.slow
@pytest.mark.parametrize("built", ["zarr"], indirect=True)
def test_on_ray(arrays: Path, bucket: Bucket, built: Path) -> None:
    """Workers open the store for themselves."""
    url = bucket.place()
    assert build(spec_of(arrays, "zarr", url, compute__workers=1), "ray").shards_built == 8
    assert bucket.tree(url) == tree(built)


def test_a_place_with_other_files_is_left_alone(arrays: Path, bucket: Bucket) -> None:
    url = bucket.place()
    bucket.write(url, "thesis.tex", b"precious")
    with pytest.raises(SpecError, match=r"holds other files.*thesis\.tex"):
        build(spec_of(arrays, "zarr", url), "serial")
    assert bucket.names(url) == ["thesis.tex"]


@pytest.mark.parametrize("built", ["parquet"], indirect=True)
def test_two_builders_share(built: Path, arrays: Path, bucket: Bucket) -> None:
    """One begins and pauses; one without `--join` is refused, one with it takes its part."""
    url, begun, shared = bucket.place(), threading.Event(), threading.Event()
    spec = spec_of(arrays, kind_of(built), url)

    def first() -> BuildReport:
        def pause() -> None:
            with pytest.raises(BuildError, match=rf"{url}: is being built by another process.*--join"):
                build(spec, "serial")
            begun.set()
            assert shared.wait(30)

        return build(spec, "serial", at(8, pause))

    def second() -> BuildReport:
        assert begun.wait(30)
        return build(spec, "serial", at(24, shared.set), join=True)

    reports = in_threads(first, second)
    assert all(isinstance(report, BuildReport) for report in reports), reports
    made = [report.shards_built for report in reports if isinstance(report, BuildReport)]
    assert sum(made) == 8
    assert min(made) >= 1
    assert bucket.tree(url) == tree(built)


def test_it_grows(arrays: Path, bucket: Bucket, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """By views and samples: what the same steps make of a folder."""
    data = test_growing.data.__wrapped__(tmp_path_factory)  # type: ignore[attr-defined]
    url = bucket.place()
    for rows, views in [(9, 2), (11, 3)]:
        spec = test_growing.Wish(rows, views).spec(tmp_path / "cache", data)
        local, remote = build(spec, "serial"), build(at_url(spec, url), "serial")
        assert dataclasses.replace(remote, path=local.path, seconds=local.seconds) == local
        assert bucket.tree(url) == tree(tmp_path / "cache")
    assert len(tc.open(url).manifest.additions) == 3


# Killed.


@dataclasses.dataclass
class Kill(Trouble):
    """SIGKILL to a builder at one of its requests, which is not passed on (`reset`) or is (`lost`)."""

    process: BaseProcess | None = None

    def strikes(self, method: str, path: str) -> bool:
        struck = super().strikes(method, path)
        if struck and self.process is not None:
            self.process.kill()
        return struck


@pytest.fixture(scope="module", params=["zarr", "parquet"])
def reference(request: pytest.FixtureRequest, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """An undisturbed build in a folder, and which image belongs to which shard."""
    return Reference(tmp_path_factory.mktemp(request.param), arrays, request.param)


class Killed:
    """One cache that is built in processes that are killed; counts what the teacher is asked."""

    def __init__(self, reference: Reference, server: S3Server, bucket: Bucket, between: Proxy, folder: Path) -> None:
        self.reference, self.bucket, self.between = reference, bucket, between
        self.url, self.log, self.output = bucket.place(), folder / "log", folder / "output"
        self.log.write_text("")
        self.environment = server.environment(between.endpoint) | {"TOY_LOG": str(self.log)}
        self.before: list[tuple[int, set[Place]]] = []
        """Length of the log, and what was committed when it was so long."""

    def committed(self) -> set[Place]:
        names = self.bucket.names(self.url)
        if "manifest.json" in names and b'"sealed"' in self.bucket.read(self.url, "manifest.json"):
            return self.reference.committed
        return {place for place in map(receipt_of, names) if place is not None}

    def run(self, kind: str = "", after: int = 0) -> int:
        """A build, killed at a request; its exit code."""
        self.before.append((len(self.asked()), self.committed()))
        spec = at_url(self.reference.spec(Path("elsewhere")), self.url)
        kill = Kill(kind, after=after)
        self.between.troubles[:] = [kill] if kind else []
        self.between.requests.clear()
        process = start_build(spec, "serial", self.environment, self.output)
        kill.process = process
        code = joined(process)
        self.between.troubles.clear()
        return code

    def asked(self) -> list[Place]:
        return [self.reference.places[line.split()[1]] for line in self.log.read_text().splitlines()]

    def check(self) -> None:
        """The undisturbed bytes, no stray object, nothing that was committed asked of the teacher again."""
        assert self.bucket.tree(self.url) == self.reference.tree
        asked = self.asked()
        assert set(asked) == self.reference.committed
        for length, made in self.before:
            assert not set(asked[length:]) & made


@pytest.mark.parametrize("reference", [pytest.param("zarr", marks=pytest.mark.slow), "parquet"], indirect=True)
def test_killed_and_resumed(
    reference: Reference, server: S3Server, bucket: Bucket, between: Proxy, tmp_path: Path
) -> None:
    """One build at seeded requests; the first kill leaves a trial of `create`, which nothing reads."""
    case = Killed(reference, server, bucket, between, tmp_path)
    draw = random.Random(f"{reference.store} 1")
    assert case.run("lost", 6) == -9
    assert [name for name in bucket.names(case.url) if name.startswith(".conditional.")]
    for least in (80, 100, 120):
        assert case.run(draw.choice(["reset", "lost"]), least + draw.randrange(30)) == -9, case.output.read_text()
    # Of Parquet, with fewer requests, the last one comes while it is sealed.
    assert len(case.committed()) > 0
    assert case.run() == 0, case.output.read_text()
    case.check()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_every_request(
    reference: Reference, server: S3Server, bucket: Bucket, between: Proxy, tmp_path: Path
) -> None:
    """Every third request of an undisturbed build, before it and behind it."""
    whole = Killed(reference, server, bucket, between, tmp_path)
    assert whole.run() == 0
    for after in range(0, len(between.requests), 3):
        for kind in ("reset", "lost"):
            case = Killed(reference, server, bucket, between, tmp_path)
            assert case.run(kind, after) == -9
            assert case.run() == 0, case.output.read_text()
            case.check()


# Reading.


def everything(cache: tc.Cache) -> dict[tuple[str, int], bytes]:
    """All values of a cache, through every kind of read."""
    rows = np.random.Generator(np.random.Philox(1)).permutation(len(cache))
    found = {(field, view): dense(cache, field, view, rows) for field in cache.fields for view in range(cache.views)}
    found |= {("digest", view): cache.digests(view, rows).tobytes() for view in range(cache.views)}
    return found | {("view", view): cache.render(view, rows).numpy().tobytes() for view in range(cache.views)}


def dense(cache: tc.Cache, field: str, view: int, rows: Any) -> bytes:
    target = cache.read(field, view, rows)
    assert isinstance(target, DenseTarget)
    return target.values.numpy().tobytes()


def test_read_through_copies(built: Path, bucket: Bucket, between: Proxy, tmp_path: Path) -> None:
    """The folder's values; each data file is fetched once, also for the process that comes next."""
    url, copies = bucket.upload(built), tmp_path / "copies"
    expected = everything(tc.open(built))
    data = sorted(path for files in committed(tc.open(built)).values() for path in files)
    assert everything(tc.open(url, copies=copies)) == expected
    assert sorted(fetched(between)) == data
    between.requests.clear()
    assert everything(tc.open(url, copies=copies)) == expected
    assert fetched(between) == []
    assert everything(tc.open(url)) == expected
    assert len(fetched(between)) == len(data)


class Answers(Dataset[bytes]):
    """What a worker reads of a cache that it was given."""

    def __init__(self, cache: tc.Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return self.cache.views

    def __getitem__(self, view: int) -> bytes:
        return dense(self.cache, "logits", view, range(len(self.cache)))


def test_read_in_a_forked_worker(
    built: Path, bucket: Bucket, between: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a fork of a cache that is in use, in another folder than the one that the copies' path begins in."""
    monkeypatch.chdir(tmp_path)
    cache = tc.open(bucket.upload(built), copies="copies")
    expected = [dense(tc.open(built), "logits", view, range(ROWS)) for view in range(2)]
    assert dense(cache, "logits", 0, range(ROWS)) == expected[0]
    between.requests.clear()
    loader = DataLoader(
        Answers(cache), batch_size=None, num_workers=1, multiprocessing_context="fork", worker_init_fn=leave
    )
    assert list(loader) == expected
    assert len(fetched(between)) == 4, "those of the second view"


def leave(_worker: int) -> None:
    os.chdir("/")


def test_a_damaged_copy_is_fetched_again(built: Path, bucket: Bucket, between: Proxy, tmp_path: Path) -> None:
    """One alone, whether its damage shows as it is opened or later; whoever has it mapped goes on."""
    url, expected = bucket.upload(built), everything(tc.open(built))
    cache = tc.open(url, copies=tmp_path)
    assert everything(cache) == expected
    copies = sorted(path for path in tmp_path.iterdir() if path.stat().st_size > 100)
    for place in (5, -1):
        for copy in copies:
            data = bytearray(copy.read_bytes())
            data[place] ^= 1
            # Renamed into place: a map of a file that is truncated would end the process.
            (tmp_path / "new").write_bytes(data)
            (tmp_path / "new").replace(copy)
        between.requests.clear()
        assert everything(tc.open(url, copies=tmp_path)) == expected
        assert len(fetched(between)) == len(set(fetched(between))) == len(copies)
    assert everything(cache) == expected


# Damage.


@pytest.mark.parametrize("built", ["zarr", pytest.param("parquet", marks=pytest.mark.slow)], indirect=True)
def test_verify_and_repair(built: Path, bucket: Bucket, tmp_path: Path) -> None:
    """What is in the store counts, and no copy of what was; it ends with the bytes of before."""
    url, copies = bucket.upload(built), tmp_path / "copies"
    before, expected = bucket.tree(url), everything(tc.open(built))
    assert tc.verify(url).ok
    files = sorted(path for some in committed(tc.open(built)).values() for path in some if "logits" in path)
    flipped, short, gone = files[0], files[3], files[5]
    data = bytearray(bucket.read(url, flipped))
    data[3 + len(data) // 3] ^= 4
    bucket.write(url, flipped, bytes(data))
    bucket.write(url, short, bucket.read(url, short)[:-1])
    bucket.remove(url, gone)
    strays = [f".conditional.{'0' * 32}.tmp", "data/notes.txt"]
    for name in strays:
        bucket.write(url, name, b"")
    cache = tc.open(url, copies=copies)
    with pytest.raises(CorruptionError, match="|".join(map(re.escape, (flipped, short, gone)))):
        everything(cache)

    report = tc.verify(url)
    assert {problem.place for problem in report.problems} == {flipped, short, gone, *strays}
    mended = tc.repair(url, remove_strays=True)
    assert mended.ok
    assert set(mended.written) == {flipped, short, gone}
    assert set(mended.removed) == set(strays)
    assert bucket.tree(url) == before
    assert tc.verify(url).ok
    assert everything(cache) == expected
    assert everything(tc.open(url, copies=copies)) == expected


# A store that fails.

STRANGE = [Trouble("lost", "PUT", times=ALWAYS, every=4), Trouble("torn", "GET", times=ALWAYS, every=5)]
PASSING = [
    pytest.param([Trouble("500", times=ALWAYS, every=5), Trouble("slow", times=ALWAYS, every=9, seconds=0.1)]),
    pytest.param([*STRANGE, Trouble("hang", "PUT", after=20, seconds=1.5), Trouble("reset", times=3, every=20)]),
    pytest.param([Trouble("reset", times=ALWAYS, every=6)], marks=pytest.mark.slow),
    pytest.param([Trouble("503", times=ALWAYS, every=4)], marks=pytest.mark.slow),
    pytest.param(
        [Trouble("cut", "PUT", times=ALWAYS, every=6), Trouble("flip", "GET", times=ALWAYS, every=5)],
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("built", ["parquet"], indirect=True)
@pytest.mark.parametrize("troubles", PASSING, ids=lambda them: "-".join(one.kind for one in them))
def test_what_passes_is_survived(
    troubles: list[Trouble],
    built: Path,
    arrays: Path,
    bucket: Bucket,
    between: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bytes, the same values, nothing that looks like damage."""
    be_patient(monkeypatch, tries=6, timeout=1.0)
    url = bucket.place()
    between.troubles[:] = [dataclasses.replace(one) for one in troubles]
    assert build(spec_of(arrays, kind_of(built), url), "serial").shards_built == 8
    assert bucket.tree(url) == tree(built)
    between.troubles[:] = [dataclasses.replace(one) for one in troubles]
    assert everything(tc.open(url)) == everything(tc.open(built))
    assert tc.verify(url).ok


@pytest.mark.parametrize("built", ["parquet"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "after", "says"),
    [
        pytest.param("500", 0, "the store refuses", marks=pytest.mark.slow),
        pytest.param("reset", 30, "the connection breaks|cannot be reached", marks=pytest.mark.slow),
        ("hang", 60, "does not answer in time"),
        pytest.param("lost", 100, "the connection breaks|cannot be reached", marks=pytest.mark.slow),
    ],
)
def test_what_lasts_is_said(
    kind: str,
    after: int,
    says: str,
    built: Path,
    arrays: Path,
    bucket: Bucket,
    between: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Place, rule, value and what to do; what is committed stays, and the same call goes on with it."""
    be_patient(monkeypatch, tries=2, timeout=0.3)
    url = bucket.place()
    spec = spec_of(arrays, kind_of(built), url)
    between.troubles[:] = [Trouble(kind, times=ALWAYS, after=after, seconds=0.4)]
    with pytest.raises(BuildError, match=rf"{url}.*cannot be .*({says}).*2 times.*run the same command again"):
        build(spec, "serial")
    between.troubles.clear()
    committed = {name for name in bucket.names(url) if receipt_of(name)}
    be_patient(monkeypatch, tries=6, timeout=20.0)
    assert build(spec, "serial").shards_built == 8 - len(committed)
    assert bucket.tree(url) == tree(built)


@pytest.mark.parametrize("built", ["zarr"], indirect=True)
@pytest.mark.parametrize(("kind", "looks"), [("500", 3), pytest.param("reset", 24, marks=pytest.mark.slow)])
def test_a_store_that_is_gone_has_altered_nothing(
    kind: str,
    looks: int,
    built: Path,
    bucket: Bucket,
    between: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither opening nor reading nor `verify` nor `repair` takes it for damage, whenever it fails."""
    url = bucket.upload(built)
    before = bucket.tree(url)
    be_patient(monkeypatch, tries=2, timeout=20.0)
    cache = tc.open(url, copies=tmp_path)
    between.troubles[:] = [Trouble(kind, times=ALWAYS)]
    with pytest.raises(BuildError, match=f"{url}.*cannot be read.*2 times"):
        cache.read("logits", 1, range(3))
    with pytest.raises(BuildError, match=f"{url}.*cannot be read.*2 times"):
        tc.open(url)
    between.troubles.clear()
    assert dense(cache, "logits", 1, range(3)) == dense(tc.open(built), "logits", 1, range(3))
    for act in (tc.verify, tc.repair, lambda place: tc.verify(place, recompute=8, views="all")):
        # Without the copies of before, which would not be asked for again.
        _folder_of.cache_clear()
        between.requests.clear()
        act(url)
        metadata = next(place for place, (_, path) in enumerate(between.requests) if path.endswith("zarr.json"))
        for after in [metadata, *np.linspace(0, len(between.requests) - 1, looks, dtype=int).tolist()]:
            # One request is given up; all others would be answered. How often it is sent before that is not ours to
            # say: an HTTP client repeats by itself what breaks on a connection that was used before.
            between.troubles[:] = [Trouble(kind, after=after, lasting=True)]
            _folder_of.cache_clear()
            with pytest.raises(StorageError, match=f"{url}.*cannot be "):
                act(url)
            between.troubles.clear()
    assert bucket.tree(url) == before


def test_nothing_is_there(bucket: Bucket) -> None:
    with pytest.raises(CacheNotFoundError, match=r"s3://bucket/.*must be a place with a cache in it"):
        tc.open(bucket.place())
    with pytest.raises(BuildError, match=r"s3://no-bucket.*the bucket does not exist"):
        tc.open("s3://no-bucket/cache")


# The command lines.


@pytest.fixture
def config(arrays: Path, tmp_path: Path, bucket: Bucket) -> Path:
    """A build's YAML, into the store."""
    path = tmp_path / "build.yaml"
    described = toy_spec(Path("elsewhere"), arrays).model_dump(mode="json")
    path.write_text(yaml.safe_dump(described | {"cache": bucket.place()}))
    return path


@pytest.mark.slow
def test_the_command_lines(
    run: test_cli.Run, config: Path, arrays: Path, bucket: Bucket, between: Proxy, tmp_path: Path
) -> None:
    """Build, status, verify, repair, describe, report, export, train; all that is written beside the cache is here."""
    url = yaml.safe_load(config.read_text())["cache"]
    code, out, err = run("teacher-cache", "build", config, "--executor", "serial", "--json")
    assert (code, json.loads(out)["shards_built"], json.loads(out)["path"]) == (0, 8, url), err
    before = bucket.tree(url)
    for command in ("status", "describe", "verify"):
        code, out, err = run("teacher-cache", command, url)
        assert (code, url in out) == (0, True), err
    victim = next(name for name in before if "/c/" in name)
    bucket.write(url, victim, b"nothing")
    code, out, _ = run("teacher-cache", "verify", url, "--json")
    assert (code, [problem["place"] for problem in json.loads(out)["problems"]]) == (1, [victim])
    assert run("teacher-cache", "repair", url)[0] == 0

    code, _, err = run("teacher-cache", "report", url, "--html", tmp_path / "report.html")
    assert code == 0, err
    assert url in (tmp_path / "report.html").read_text()
    assert run("teacher-cache", "export", url, "--output", tmp_path / "v1.npz", "--view", "1")[0] == 0
    with np.load(tmp_path / "v1.npz") as exported:
        assert exported["values"].tobytes() == dense(tc.open(url), "logits", 1, range(ROWS))

    data = {"cache": url, "copies": str(tmp_path / "copies")}
    training = test_cli.student_config(tmp_path, Path("-"), arrays, data=data, objective=[{"kind": "kd"}])
    code, _, err = run("student-train", "fit", training)
    assert code == 0, err
    between.requests.clear()
    code, _, err = run(
        "student-train", "fit", training, "--set", f"run={tmp_path / 'again'}", "--set", "train.workers=1"
    )
    assert code == 0, err
    assert fetched(between) == []
    assert bucket.tree(url) == before


def test_what_is_written_beside_a_cache_is_here(
    run: test_cli.Run, config: Path, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL is refused, and not made a folder called `s3:`."""
    monkeypatch.chdir(tmp_path)
    url = yaml.safe_load(config.read_text())["cache"]
    for command, option in (("report", "--html"), ("export", "--output")):
        code, _, err = run("teacher-cache", command, url, option, f"{url}/page")
        assert (code, "is a file of this machine" in err) == (2, True), err
    training = test_cli.student_config(tmp_path, Path("-"), arrays, objective=[{"kind": "kd"}])
    for key in ("run", "data.copies", "data.maps"):
        code, _, err = run("student-train", "fit", training, "--set", f"{key}={url}")
        assert (code, f"error: {key}" in err, "a folder of this machine" in err) == (2, True, True), err
    assert not (tmp_path / "s3:").exists()


def test_copies_are_of_a_cache(arrays: Path) -> None:
    described = {"source": numpy_source(arrays), "views": {"recipe": []}, "copies": "somewhere"}
    with pytest.raises(SpecError, match="`copies` is for a cache"):
        parse(DataSpec, described, "test")


def test_a_store_that_is_down_ends_with_1(
    run: test_cli.Run, config: Path, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_patient(monkeypatch, tries=2, timeout=20.0)
    url = yaml.safe_load(config.read_text())["cache"]
    between.troubles[:] = [Trouble("503", times=ALWAYS)]
    for arguments in (("build", config, "--executor", "serial"), ("status", url), ("verify", url)):
        code, _, err = run("teacher-cache", *arguments)
        assert (code, "the store asks for fewer requests" in err, "Traceback" in err) == (1, True, False), err
