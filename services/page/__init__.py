"""The page for people at `/`: a few files that hold no data, the same for everybody.

What it shows it asks of the endpoints, as any client does, with the key that its reader types.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Request, Response

from services.headers import names_digest

_FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/service.js": ("service.js", "text/javascript"),
    "/page/target.js": ("target.js", "text/javascript"),
    "/page/trial.js": ("trial.js", "text/javascript"),
    "/page/dial.js": ("dial.js", "text/javascript"),
    "/page/bars.js": ("bars.js", "text/javascript"),
    "/page/card.js": ("card.js", "text/javascript"),
    "/page/load.js": ("load.js", "text/javascript"),
}
PATHS = frozenset(_FILES)
"""All that the page consists of."""

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A browser asks each time, so that page and service are of one version; the ETag spares it the bytes.
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """The routes of the page, with its files in memory."""
    found = APIRouter()
    for path, (name, media_type) in _FILES.items():
        content = (resources.files(__name__) / name).read_bytes()
        found.add_api_route(path, _sends(content, media_type), include_in_schema=False)
    return found


def _sends(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    digest = hashlib.sha256(content).hexdigest()
    headers = {**_HEADERS, "ETag": f'"{digest}"'}

    async def send(request: Request) -> Response:
        known = request.headers.get("if-none-match")
        if known is not None and names_digest("If-None-Match", known, digest, weak=True):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return send
