"""A large answer in slices: one write of 20 MB would keep the event loop from everyone else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from fastapi import Response
from starlette.types import Receive, Scope, Send

SLICE = 2**18
"""Bytes of one write."""


class LargeResponse(Response):
    """As a `Response` of all pieces together; they are never put together."""

    def __init__(self, pieces: Sequence[bytes], media_type: str) -> None:
        """Sets Content-Length, so that nothing is sent in chunks of HTTP's own."""
        self._pieces = pieces
        length = sum(map(len, pieces))
        super().__init__(None, headers={"Content-Length": str(length)}, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; the server waits here for a client that reads slowly, and others have their turn between slices."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        slices = _slices(self._pieces)
        body = next(slices, b"")
        for following in slices:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0)
            body = following
        await send({"type": "http.response.body", "body": body})


def _slices(pieces: Sequence[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for start in range(0, len(piece), SLICE):
            yield piece[start : start + SLICE]
