"""The layout of a safetensors body, read where it lies: no byte of a tensor is copied, and nothing is unpickled.

The library copies each tensor in one call that no other thread can interrupt: with a body of 64 MB, a tenth of a second
in which nobody else is answered. What is accepted here, the library accepts too, and it finds the same in it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

Buffer = bytes | bytearray | memoryview
LONGEST_HEADER = 2**16
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64}
_LARGEST = 2**63


class LayoutError(ValueError):
    """It is not what the format says. Has no text: that could quote the sender's."""


@dataclass(frozen=True)
class Part:
    """One tensor."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    """Its bytes, little-endian, in the body's own memory."""


def parts_of(body: Buffer) -> dict[str, Part]:
    """The tensors of a body, by name.

    Raises:
        LayoutError: a length, the header or a tensor's place is wrong, or the tensors do not fill the body exactly.
    """
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(LONGEST_HEADER, len(body) - 8):
        raise LayoutError
    tensors = _header(bytes(body[8 : 8 + length]))
    data, found, at = memoryview(body).toreadonly()[8 + length :], dict[str, Part](), 0
    for name, given in sorted(tensors.items(), key=lambda item: _place(item[1])):
        start, stop = _place(given)
        dtype, shape = given["dtype"], given["shape"]
        if not isinstance(dtype, str) or dtype not in _BITS or not _counts(shape):
            raise LayoutError
        # One after the other, without a gap: so none lies over another.
        if start != at or stop > len(data) or (stop - start) * 8 != math.prod(shape) * _BITS[dtype]:
            raise LayoutError
        found[name], at = Part(dtype, tuple(shape), data[start:stop]), stop
    if at != len(data):
        raise LayoutError
    return found


def _header(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise LayoutError
    try:
        found = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise LayoutError from None
    strings = found.pop("__metadata__", {})
    if not isinstance(strings, dict) or not all(isinstance(value, str) for value in strings.values()):
        raise LayoutError
    return dict(found)


def _place(given: object) -> tuple[int, int]:
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise LayoutError
    offsets = given["data_offsets"]
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise LayoutError
    return offsets[0], offsets[1]


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _LARGEST for value in values)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise LayoutError
    return found


def _refuse(_constant: str) -> None:
    raise LayoutError
