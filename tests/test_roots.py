"""One suite of laws for a cache in a folder and one in an object store; and what happens when that store fails."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import pickle
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import ALWAYS, Proxy, S3Server, Trouble, free_ports, proxy, s3_server

from teacher_cache.errors import BuildError, CacheError, CorruptionError, SpecError, TeacherCacheError
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.remote_root import RemoteRoot
from teacher_cache.storage.root import Root, open_root

NAMES = ["a-b.json", "a/b.json", "a/b/c d", "a.c", "a0", "b#+%?&=", "Zahl/größe 1", "日本/語", "z/" + "y" * 200]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in running.environment().items():
            patch.setenv(name, value)
        running.make_bucket("bucket")
        yield running


@pytest.fixture(scope="module")
def between(server: S3Server) -> Iterator[Proxy]:
    with proxy(server.endpoint) as running:
        yield running


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "local":
        return open_root(tmp_path / "cache")
    request.getfixturevalue("server")
    return open_root(f"s3://bucket/{uuid.uuid4().hex}", tmp_path / "copies")


@pytest.fixture
def remote(server: S3Server, tmp_path: Path) -> RemoteRoot:
    """Straight to the store: connected before the environment names a proxy."""
    straight = RemoteRoot(f"s3://bucket/{uuid.uuid4().hex}", tmp_path / "copies", tries=4, timeout=20.0)
    assert not straight.exists("nothing")
    return straight


@pytest.fixture
def shaky(remote: RemoteRoot, between: Proxy, monkeypatch: pytest.MonkeyPatch) -> RemoteRoot:
    """The same place, through the proxy; connected, and known to heed conditions."""
    between.troubles.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
    monkeypatch.setattr("teacher_cache.storage.remote_requests.FIRST_PAUSE", 0.01)
    through = dataclasses.replace(remote)
    assert through.create("warm", b"")
    through.remove("warm")
    between.requests.clear()
    return through


def test_is_a_root(root: Root) -> None:
    assert isinstance(root, Root)
    assert root.url in (str(getattr(root, "path", "")), root.url)


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * (32 << 10)], ids=["empty", "one", "8MiB"])
def test_reads_what_was_written(root: Root, data: bytes) -> None:
    assert root.size("a/b") is None
    assert not root.exists("a/b")
    root.write("a/b", b"before")
    root.write("a/b", data)
    assert root.read("a/b") == data
    assert root.size("a/b") == len(data)
    assert root.exists("a/b")
    assert root.create("a/c", data)
    assert not root.create("a/c", b"other")
    assert root.read("a/c") == data
    assert root.local("a/c", len(data), "digest").read_bytes() == data


@pytest.mark.parametrize("root", ["local", "remote"], indirect=True)
def test_names(root: Root) -> None:
    assert list(root.names()) == []
    for name in (name for name in NAMES if name != "a/b/c d"):
        root.write(name, name.encode())
    root.write("a/d/c d", b"")
    expected = sorted({*NAMES, "a/d/c d"} - {"a/b/c d"})
    assert list(root.names()) == expected
    for prefix in ("a", "a/", "a/b", "Zahl/gr", "nothing/", "nothing"):
        assert list(root.names(prefix)) == [name for name in expected if name.startswith(prefix)]
    for name in set(NAMES) & set(expected):
        assert root.read(name) == name.encode()
        root.remove(name)
        root.remove(name)
    assert list(root.names()) == ["a/d/c d"]


def test_pages_of_a_listing_are_joined(remote: RemoteRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{folder}{index}" for folder in ("p/", "p-", "p/q/") for index in range(9)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: remote.write(name, b""), names))
    send = remote._requests.send
    monkeypatch.setattr(remote._requests, "send", lambda *at, **rest: send(*at, **rest, MaxKeys=4))
    assert list(remote.names()) == sorted(names)
    assert list(remote.names("p/q")) == sorted(name for name in names if name.startswith("p/q"))


def test_unfinished_files_are_not_listed(root: Root) -> None:
    root.write(f"a/b.{uuid.uuid4().hex}.tmp", b"")
    root.write("a/b.tmp", b"")
    assert list(root.names()) == ["a/b.tmp"]


def test_missing(root: Root) -> None:
    for name in ("nothing", "no/thing"):
        with pytest.raises(FileNotFoundError, match=name):
            root.read(name)
        with pytest.raises(FileNotFoundError, match=name):
            root.local(name, 1, "")
        root.remove(name)
    assert list(root.names()) == []


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../../b", "a//b", "a/", "./a", "a\\b"])
def test_names_stay_below_the_root(root: Root, name: str) -> None:
    for attempt in (root.read, root.size, root.remove, lambda name: root.write(name, b"")):
        with pytest.raises(CacheError, match="a relative path"):
            attempt(name)


def test_wrong_size(root: Root) -> None:
    root.write("a", b"1234")
    with pytest.raises(CorruptionError, match=r"5 bytes.*4"):
        root.local("a", 5, "digest")


def test_one_of_many_threads_creates(root: Root) -> None:
    """SeaweedFS takes seconds to tell the fifteen others."""
    barrier = threading.Barrier(16)

    def attempt(index: int) -> bool:
        barrier.wait()
        return root.create("claims/lead.json", b"%d" % index * 1000)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in range(10 if isinstance(root, LocalRoot) else 1):
            made = list(pool.map(attempt, range(16)))
            assert made.count(True) == 1
            assert root.read("claims/lead.json") == b"%d" % made.index(True) * 1000
            root.remove("claims/lead.json")
    assert list(root.names()) == []


def race(root: Root, name: str, index: int) -> bool:
    return root.create(name, b"%d" % index * 1000)


def test_one_of_many_processes_creates(root: Root) -> None:
    """Forked behind a root that is in use: connections are not shared with a parent."""
    root.write("used", b"1")
    with multiprocessing.get_context("fork").Pool(16) as pool:
        for turn in range(10 if isinstance(root, LocalRoot) else 1):
            made = pool.starmap(race, [(root, f"claims/{turn}", index) for index in range(16)], chunksize=1)
            assert made.count(True) == 1
            assert root.read(f"claims/{turn}") == b"%d" % made.index(True) * 1000
        # Not terminated: a fork has whatever handler of SIGTERM an earlier test has left here.
        pool.close()
        pool.join()
    assert root.read("used") == b"1"


def test_files_are_seen_whole(root: Root) -> None:
    """Whoever reads while others write sees one of the contents."""
    contents = [bytes([index]) * 300_000 for index in range(4)]
    root.write("a", contents[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(12):
            root.write("a", contents[turn % 4])
        done.set()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not done.wait(0.001) and not writing.done():
            assert root.read("a") in contents
            assert root.size("a") == 300_000
        writing.result()


def test_pickled(root: Root) -> None:
    root.write("a", b"1")
    assert root.create("b", b"2")
    data = pickle.dumps(root)
    assert len(data) < 2000
    assert b"test-secret" not in data
    assert b"test-key" not in data
    copy = pickle.loads(data)
    assert copy.read("a") == b"1"
    assert not copy.create("b", b"3")
    assert copy == root


# What a remote root does with a store that fails.

PASSING = [
    *(Trouble(kind, after=after) for kind in ("500", "503", "reset", "lost") for after in (0, 1)),
    Trouble("503", times=3),
    Trouble("cut", "PUT"),
    Trouble("torn", "GET"),
    Trouble("torn", "GET", times=3),
    Trouble("flip", "GET"),
    Trouble("hang", "PUT", seconds=0.4),
    Trouble("hang", "GET", seconds=0.4),
    Trouble("slow", seconds=0.05),
    Trouble("500", times=ALWAYS, every=3),
    Trouble("reset", times=ALWAYS, every=4),
]


@pytest.mark.parametrize(
    "trouble", PASSING, ids=lambda one: f"{one.kind}-{one.method}-{one.after}-{one.times}-{one.every}"
)
def test_what_passes_is_survived(shaky: RemoteRoot, remote: RemoteRoot, between: Proxy, trouble: Trouble) -> None:
    """Every operation succeeds, answers rightly, and leaves the right state; `create` also where its own first
    attempt is in its way."""
    data = os.urandom(200_000)
    if trouble.kind == "hang":
        shaky = dataclasses.replace(shaky, timeout=0.3)
    steps = [
        lambda: shaky.write("a", data) or remote.read("a") == data,
        lambda: shaky.create("b", data) is True and remote.read("b") == data,
        lambda: shaky.create("b", b"other") is False and remote.read("b") == data,
        lambda: shaky.read("b") == data,
        lambda: shaky.size("b") == len(data),
        lambda: not shaky.exists("c"),
        lambda: list(shaky.names()) == ["a", "b"],
        lambda: shaky.local("b", len(data), uuid.uuid4().hex).read_bytes() == data,
        lambda: shaky.remove("b") or list(remote.names()) == ["a"],
    ]
    for step in steps:
        between.troubles[:] = [dataclasses.replace(trouble)]
        assert step()


LASTING = {
    "500": r"the store refuses|the connection breaks",
    "503": r"fewer requests",
    "reset": r"the connection breaks|cannot be reached",
    "lost": r"the connection breaks|cannot be reached",
    "hang": r"does not answer in time",
}


@pytest.mark.parametrize("kind", LASTING)
def test_what_lasts_is_said(shaky: RemoteRoot, remote: RemoteRoot, between: Proxy, kind: str) -> None:
    """A bounded number of attempts, an error that says what to do, and nothing half done."""
    remote.write("a", b"before")
    # A short time only where it is what is tested: a busy machine may take as long to answer.
    shaky = dataclasses.replace(shaky, tries=2, timeout=0.15 if kind == "hang" else 20.0)
    steps = [
        lambda: shaky.write("a", b"after"),
        lambda: shaky.read("a"),
        lambda: shaky.size("a"),
        lambda: list(shaky.names()),
        lambda: shaky.local("a", 6, "digest"),
        lambda: shaky.remove("a"),
    ]
    for step in steps:
        between.troubles[:] = [Trouble(kind, times=ALWAYS, seconds=0.3)]
        between.requests.clear()
        with pytest.raises(BuildError, match=f"{shaky.url}.*cannot be .*({LASTING[kind]}).*2 times.*run the same"):
            step()
        # aiohttp itself sends again what a kept connection lost.
        assert 2 <= len(between.requests) <= 4
    left = list(remote.names())
    assert left == (["a"] if kind != "lost" else [])
    if left:
        assert remote.read("a") == b"before"
    assert list(Path(shaky.copies or "").glob("*")) == []


@pytest.mark.parametrize("kind", ["torn", "flip"])
def test_an_answer_that_stays_torn(shaky: RemoteRoot, between: Proxy, kind: str) -> None:
    shaky.write("a", b"1234")
    between.troubles[:] = [Trouble(kind, "GET", times=ALWAYS)]
    for step in (lambda: shaky.read("a"), lambda: shaky.local("a", 4, "digest")):
        with pytest.raises(TeacherCacheError, match=r"the connection breaks|arrives as it was written"):
            step()
    assert list(Path(shaky.copies or "").glob("*")) == []


def test_a_store_that_ignores_conditions(shaky: RemoteRoot, remote: RemoteRoot, between: Proxy) -> None:
    remote.write("claims/lead.json", b"theirs")
    new = dataclasses.replace(shaky)
    between.troubles[:] = [Trouble("lie", "PUT", times=ALWAYS)]
    with pytest.raises(BuildError, match=r"creates a file only where there is none.*it overwrites.*into a folder"):
        new.create("claims/lead.json", b"ours")
    between.troubles[:] = [Trouble("501", "PUT", times=ALWAYS)]
    with pytest.raises(BuildError, match="the store refuses"):
        new.create("claims/lead.json", b"ours")
    assert remote.read("claims/lead.json") == b"theirs"


def test_a_store_whose_etag_is_no_digest(remote: RemoteRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is read back, and what differs is refused."""
    call = type(remote._requests).call
    monkeypatch.setattr(type(remote._requests), "call", lambda *at, **rest: call(*at, **rest) | {"ETag": '"1-2"'})
    remote.write("a", b"1")
    monkeypatch.setattr("teacher_cache.storage.remote_objects.crc32c", lambda _data: 0)
    monkeypatch.setattr(type(remote._objects), "get", lambda *_: (b"2", {"ETag": '"1-2"'}))
    with pytest.raises(BuildError, match="is stored as it was sent"):
        remote.write("a", b"1")


def digest(root: Root, name: str, size: int, check: str) -> str:
    return hashlib.md5(root.local(name, size, check).read_bytes()).hexdigest()


def fetches(between: Proxy) -> int:
    return sum(method == "GET" and "list-type" not in path for method, path in between.requests)


def test_copies_are_kept(shaky: RemoteRoot, between: Proxy) -> None:
    """The next process downloads nothing; a copy with another size is made again, and another content has its own."""
    data = os.urandom(3 << 20)
    shaky.write("data/x.bin", data)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        places = set(threads.map(lambda _: shaky.local("data/x.bin", len(data), "one"), range(8)))
    assert fetches(between) == 1
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(digest, (shaky, "data/x.bin", len(data), "one")) == hashlib.md5(data).hexdigest()
    assert fetches(between) == 1

    place = places.pop()
    assert not places
    place.write_bytes(data[:1000])
    assert shaky.local("data/x.bin", len(data), "one").read_bytes() == data
    assert fetches(between) == 2
    shaky.write("data/x.bin", data[::-1])
    assert shaky.local("data/x.bin", len(data), "two").read_bytes() == data[::-1]
    assert shaky.local("data/x.bin", len(data), "one").read_bytes() == data
    assert fetches(between) == 3
    assert len(list(Path(shaky.copies or "").iterdir())) == 2
    with pytest.raises(CorruptionError, match=f"{len(data) + 1} bytes.*{len(data)}"):
        shaky.local("data/x.bin", len(data) + 1, "one")
    assert fetches(between) == 5


def place_of(root: Root) -> Path:
    place = root.local("a", 4, "digest")
    assert place.read_bytes() == b"1234"
    return place


def test_temporary_copies_go_with_their_process(remote: RemoteRoot) -> None:
    remote.write("a", b"1234")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        place = pool.apply(place_of, (dataclasses.replace(remote, copies=None),))
        assert place.exists()
        pool.close()
        pool.join()
    assert not place.parent.exists()


def test_a_folder_for_copies_that_cannot_be_written(remote: RemoteRoot, tmp_path: Path) -> None:
    remote.write("a", b"1234")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BuildError, match="a file stands where a folder should be"):
        dataclasses.replace(remote, copies=tmp_path / "file").local("a", 4, "digest")


NOBODY = f"127.0.0.1:{free_ports(1)[0]}"
SETTINGS = [
    ("AWS_ACCESS_KEY_ID", None, "no credentials are given.*Set AWS_ACCESS_KEY_ID"),
    ("AWS_SECRET_ACCESS_KEY", "wrong", "the credentials are not accepted.*Correct AWS_ACCESS_KEY_ID|forbidden"),
    ("AWS_ACCESS_KEY_ID", "wrong", "the credentials are not accepted.*Correct AWS_ACCESS_KEY_ID|forbidden"),
    ("AWS_ENDPOINT_URL", f"http://{NOBODY}", f"cannot be reached.*2 times.* at {NOBODY}"),
    ("AWS_ENDPOINT_URL", f"http://user:pass@{NOBODY}", f"cannot be reached.*2 times.* at {NOBODY}"),
    ("AWS_PROFILE", "nobody", "AWS_PROFILE names no profile"),
]


@pytest.mark.parametrize(("name", "value", "says"), SETTINGS, ids=range(len(SETTINGS)))
def test_settings(remote: RemoteRoot, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, says: str) -> None:
    if value is None:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    new = dataclasses.replace(remote, tries=2)
    steps = [lambda: new.read("a"), lambda: new.write("a", b""), lambda: new.exists("a"), lambda: list(new.names())]
    for step in [*steps, lambda: new.create("a", b"")]:
        with pytest.raises(BuildError, match=f"{new.url}.*({says})") as caught:
            step()
        assert "test-" not in str(caught.value)
        assert "pass" not in str(caught.value)


def test_no_url_as_endpoint(remote: RemoteRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(BuildError, match=r"cannot be reached.*AWS_ENDPOINT_URL right"):
        dataclasses.replace(remote).read("a")


def test_missing_bucket(server: S3Server) -> None:
    new = RemoteRoot("s3://no-such-bucket/cache")
    steps = [lambda: new.read("a"), lambda: new.write("a", b""), lambda: new.exists("a"), lambda: list(new.names())]
    for step in [*steps, lambda: new.create("a", b""), lambda: new.local("a", 1, "")]:
        with pytest.raises(BuildError, match=r"the bucket does not exist.*Create it"):
            step()


@pytest.mark.parametrize("url", ["gs://bucket/a", "memory://a", "s3://", "s3:///a", "s3://bucket/a?versionId=1"])
def test_other_urls(url: str) -> None:
    with pytest.raises(SpecError, match="s3://bucket/prefix"):
        open_root(url)


def test_a_folder_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    test_one_of_many_threads_creates(open_root(tmp_path))
