"""JSON that states its own digest: the manifest and the receipts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from teacher_cache.errors import CorruptionError
from teacher_cache.fingerprint import bytes_digest, canonical_json


def signed(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON with the digest of all else in it, and a line feed."""
    return canonical_json({**body, "digest": bytes_digest(canonical_json(body))}) + b"\n"


def checked(data: bytes, place: str) -> dict[str, Any]:
    """The body of such a document.

    Raises:
        CorruptionError: it is not, byte for byte, what `signed` makes of its body.
    """
    hint = "Restore it from a copy, or remove it and build again."
    try:
        body = json.loads(data)
        digest = body.pop("digest")
        again = signed(body)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CorruptionError(place, "must be JSON with a digest", error, hint) from error
    # The bytes themselves are compared: JSON that parses to the same values is still not what was written.
    if data != again or digest != bytes_digest(canonical_json(body)):
        raise CorruptionError(place, "does not have the digest that it states", digest, hint)
    return dict(body)
