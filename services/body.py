"""A request's body: read within limits of bytes and of time, whatever its headers say.

What took a while to arrive is put together beside the event loop, a chunk at a time.
"""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np
from fastapi import Request

from services.beside import beside
from services.problems import Problem
from services.settings import Settings
from services.tensor_body import Buffer


async def read_body(request: Request, settings: Settings) -> Buffer:
    """Reads the body, and stops where it grows too long or takes too long, whatever its headers say.

    Raises:
        Problem: 408 or 413.
    """
    try:
        async with asyncio.timeout(settings.body_seconds) as limit:
            chunks = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        if not limit.expired():
            raise
        rule = f"must arrive within {settings.body_seconds:g} seconds"
        raise Problem(408, "body", rule, "not all of it", "Send less at a time.", {"Connection": "close"}) from None
    return chunks[0] if len(chunks) == 1 else await beside(partial(_joined, chunks), sum(map(len, chunks)))


def require_json(data: Buffer, settings: Settings) -> None:
    """Refuses JSON that would take more memory than any other body: parsed, a number of two bytes has up to forty.

    Raises:
        Problem: 413, it is longer than an eighth of the longest body.
    """
    most = settings.max_body_bytes // 8
    if len(data) > most:
        rule, hint = f"must be at most {most} bytes where it is JSON", "Send tensors in binary, or several requests."
        raise Problem(413, "body", rule, len(data), hint)


async def _read(request: Request, most: int) -> list[bytes]:
    rule, hint = f"must be at most {most} bytes", "Send fewer images a request."
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise Problem(413, "body", rule, f"Content-Length {declared}", hint)
    chunks, length = list[bytes](), 0
    async for chunk in request.stream():
        length += len(chunk)
        if length > most:
            raise Problem(413, "body", rule, "more", hint)
        if chunk:
            chunks.append(chunk)
    return chunks


def _joined(chunks: list[bytes]) -> memoryview:
    """One after the other; to join or to extend is one call, in which no other thread runs."""
    whole = np.empty(sum(map(len, chunks)), np.uint8)
    at = 0
    # Each is let go of here: to free hundreds of them takes the event loop milliseconds.
    chunks.reverse()
    while chunks:
        chunk = chunks.pop()
        whole[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
    return whole.data
