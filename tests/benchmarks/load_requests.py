"""Requests whose bodies never repeat, over connections that are kept: HTTP/1.1, written and read by hand.

A client library would take longer over a request than a small teacher does, and so the load, not the server, would be
measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from dataclasses import dataclass

IDLE = 2.0
"""Seconds after which a connection is not used again: uvicorn closes them after five."""
STAMP = 8
"""Bytes of an image that are overwritten: no single flight and no cache finds it again."""


@dataclass(frozen=True)
class Question:
    """What is asked again and again, of a server on this machine."""

    port: int
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    images: tuple[int, ...] = ()
    """Where in the body an image begins, each to be made unlike all before; none is changed where this is empty."""

    def head(self) -> bytes:
        """The request up to its body."""
        lines = [f"POST {self.path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", f"Content-Length: {len(self.body)}"]
        return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in self.headers), "\r\n"]).encode()

    def stamped(self, numbers: itertools.count[int]) -> bytes:
        """The next body."""
        if not self.images:
            return self.body
        body = bytearray(self.body)
        for start in self.images:
            body[start : start + STAMP] = next(numbers).to_bytes(STAMP, "little")
        return bytes(body)


class Pool:
    """Connections that wait for a next request."""

    def __init__(self, port: int) -> None:
        self._port, self._idle = port, list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]]()

    async def ask(self, head: bytes, body: bytes) -> int:
        """One request; the status of its answer, which has been read to the end."""
        # Whoever was used last is first: so those that the server may have closed are all at the other end.
        if self._idle and time.monotonic() - self._idle[-1][0] < IDLE:
            _, reader, writer = self._idle.pop()
        else:
            await self.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.writelines((head, body))
        said = await reader.readuntil(b"\r\n\r\n")
        lines = said.lower().split(b"\r\n")
        fields = dict(line.split(b": ", 1) for line in lines[1:] if line)
        await reader.readexactly(int(fields[b"content-length"]))
        if fields.get(b"connection") == b"close":
            writer.close()
        else:
            self._idle.append((time.monotonic(), reader, writer))
        return int(lines[0].split()[1])

    async def close(self) -> None:
        """All that wait."""
        idle, self._idle = self._idle, []
        for *_, writer in idle:
            writer.close()
            with contextlib.suppress(OSError):
                # Whoever hung up first may have done so rudely.
                await writer.wait_closed()
