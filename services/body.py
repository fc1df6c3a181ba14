"""A request's body: read within limits of bytes and of time, whatever its headers say."""

from __future__ import annotations

import asyncio

from fastapi import Request

from services.problems import Problem
from services.settings import Settings


async def read_body(request: Request, settings: Settings) -> bytes:
    """Reads the body, and stops where it grows too long or takes too long, whatever its headers say."""
    try:
        async with asyncio.timeout(settings.body_seconds) as limit:
            return await _read(request, settings.max_body_bytes)
    except TimeoutError:
        if not limit.expired():
            raise
        rule = f"must arrive within {settings.body_seconds:g} seconds"
        raise Problem(408, "body", rule, "not all of it", "Send less at a time.", {"Connection": "close"}) from None


def require_json(data: bytes, settings: Settings) -> None:
    """Refuses JSON that would take more memory than any other body: parsed, a number of two bytes has up to forty.

    Raises:
        Problem: 413, it is longer than an eighth of the longest body.
    """
    most = settings.max_body_bytes // 8
    if len(data) > most:
        rule, hint = f"must be at most {most} bytes where it is JSON", "Send tensors in binary, or several requests."
        raise Problem(413, "body", rule, len(data), hint)


async def _read(request: Request, most: int) -> bytes:
    rule, hint = f"must be at most {most} bytes", "Send fewer images a request."
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise Problem(413, "body", rule, f"Content-Length {declared}", hint)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise Problem(413, "body", rule, "more", hint)
    return bytes(data)
