"""Fingerprints: one canonical form, one hash, one version number for each kind of thing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def canonical_json(value: object) -> bytes:
    """The one way this project writes a value down to be hashed: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def fingerprint(kind: str, version: int, fields: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that name a thing by an explicit list of its fields.

    Args:
        kind: what is being named (`recipe`, `teacher`); two kinds never share a fingerprint.
        version: raised when the meaning of a field changes.
        fields: JSON values; each one changes the fingerprint.
    """
    body = canonical_json({"kind": kind, "version": version, "fields": dict(fields)})
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def bytes_digest(data: bytes | memoryview) -> str:
    """32 hexadecimal digits of blake2b over raw bytes (files, tables)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def content_digest(data: bytes | memoryview) -> int:
    """64-bit digest of a sample's stored bytes, before decoding."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def key_digest(key: str) -> int:
    """64-bit digest of a sample's stable key: the sample's part of every Philox address."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, person=b"sample-key").digest(), "little")


def key_digests(keys: Sequence[str]) -> NDArray[np.uint64]:
    """`key_digest` of each key, uint64 [N]."""
    return np.fromiter((key_digest(key) for key in keys), dtype=np.uint64, count=len(keys))
