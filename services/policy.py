"""Who may ask what: one function, and nothing is allowed that it does not allow."""

from __future__ import annotations

import hmac

from services.problems import Problem
from services.settings import Settings

OPEN_PATHS = frozenset({"/livez", "/readyz"})
"""The two probes: they say nothing about a teacher."""


def require_allowed(settings: Settings, path: str, authorization: bytes | None) -> None:
    """Decides whether a request may proceed.

    Args:
        settings: holds the key.
        path: as the router sees it; unknown paths are refused like known ones, so that nothing can be probed.
        authorization: the header's raw bytes.

    Raises:
        Problem: 401, the same for a missing, malformed and wrong key.
    """
    if settings.api_key is None or path in OPEN_PATHS:
        return
    scheme, _, given = (authorization or b"").partition(b" ")
    expected = settings.api_key.get_secret_value().encode()
    # Compared even where the scheme is wrong, in time that does not depend on where the keys differ.
    same = hmac.compare_digest(given.strip(), expected)
    if not (same and scheme.lower() == b"bearer"):
        hint = "Send `Authorization: Bearer <key>`."
        headers = {"WWW-Authenticate": "Bearer"}
        raise Problem(401, "Authorization", "must carry this server's key", "(hidden)", hint, headers)
