"""safetensors read where it lies: what the library finds, and nothing that it would refuse."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from services.tensor_body import LONGEST_HEADER, LayoutError, Part, parts_of

DTYPES = st.sampled_from([np.uint8, np.int32, np.float32, np.float16, np.int64, np.bool_])
ARRAYS = st.builds(
    lambda dtype, shape: np.arange(int(np.prod(shape))).astype(dtype).reshape(shape),
    DTYPES,
    st.lists(st.integers(0, 4), max_size=4),
)
NAMES = st.text(max_size=6).filter(lambda name: name != "__metadata__" and "\x00" not in name)
BODIES = st.builds(
    lambda arrays, metadata: save(arrays, metadata or None),
    st.dictionaries(NAMES, ARRAYS, max_size=4),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)


def body(header: object, data: bytes = b"", text: bytes | None = None) -> bytes:
    """A body with any header."""
    written = json.dumps(header).encode() if text is None else text
    return len(written).to_bytes(8, "little") + written + data


def plain(parts: dict[str, Part]) -> dict[str, Any]:
    """As the library shows it."""
    return {name: (part.dtype, list(part.shape), bytes(part.data)) for name, part in parts.items()}


def theirs(data: bytes) -> dict[str, Any]:
    """What the library finds."""
    found = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    return {name: (part["dtype"], part["shape"], bytes(part["data"])) for name, part in found}


@given(BODIES)
def test_every_body_of_the_library_is_read(data: bytes) -> None:
    assert plain(parts_of(data)) == plain(parts_of(bytearray(data))) == theirs(data)


@given(BODIES, st.data())
def test_what_is_accepted_the_library_accepts_too(data: bytes, drawn: st.DataObject) -> None:
    """A byte changed, cut off or added anywhere."""
    at = drawn.draw(st.integers(0, len(data) - 1))
    with_byte = data[:at] + drawn.draw(st.binary(max_size=3)) + data[at + drawn.draw(st.integers(0, 3)) :]
    try:
        found = plain(parts_of(with_byte))
    except LayoutError:
        return
    assert found == theirs(with_byte)


@given(st.binary(max_size=64))
@example(b"")
@example(bytes(8))
@example(b"\xff" * 8)
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(LayoutError):
        parts_of(data)


def of(**changes: Any) -> dict[str, Any]:
    """The header of two bytes."""
    return {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        of(shape=[3]),
        of(shape=[True, 2]),
        of(shape=[2.0]),
        of(shape=[-1, -2]),
        of(shape=2),
        of(shape=[2**64, 0], data_offsets=[0, 0]),
        of(dtype="U16"),
        of(dtype="OBJ"),
        of(dtype=8),
        of(data_offsets=[0, 1], shape=[1]),
        of(data_offsets=[0, 3], shape=[3]),
        of(data_offsets=[1, 2], shape=[1]),
        of(data_offsets=[2, 0]),
        of(data_offsets=[0]),
        of(more=1),
        {"a": {"dtype": "U8", "shape": [2]}},
        {"a": [0, 2]},
        {**of(), "b": of()["a"]},
        {**of(), "__metadata__": {"a": 1}},
        {**of(), "__metadata__": "text"},
        [of()],
        {},
    ],
)
def test_a_header_that_contradicts_itself_or_the_data_is_refused(header: object) -> None:
    assert plain(parts_of(body(of(), b"ab"))) == {"a": ("U8", [2], b"ab")}
    with pytest.raises(LayoutError):
        parts_of(body(header, b"ab"))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}',
        b' {"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b'{"\xff":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,2]}}' % (b"1" * 5000),
        b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}' + b" " * LONGEST_HEADER,
    ],
    ids=["twice", "twice inside", "NaN", "space", "UTF-8", "digits", "depth", "length"],
)
def test_a_header_that_is_not_plain_json_is_refused(text: bytes) -> None:
    with pytest.raises(LayoutError):
        parts_of(body(None, b"ab", text))


def test_nothing_is_copied() -> None:
    data = bytearray(body(of(), b"ab"))
    found = parts_of(data)["a"].data
    data[-1] = ord("z")
    assert bytes(found) == b"az"
    with pytest.raises(TypeError):
        found[0] = 1
