"""Bodies: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save
from toy_service_models import SHAPE, views

from services.wire import WireError, as_views, pack_images, pack_tensors, unpack_metadata, unpack_tensors


def unpack_images(data: bytes, view_shape: tuple[int, int, int]) -> torch.Tensor:
    """As `upload` takes them."""
    tensors = unpack_tensors(data)
    if tensors.keys() != {"images"}:
        raise WireError("body", "must hold `images`", "others")
    return as_views(tensors["images"], view_shape)


ARRAYS = st.sampled_from([np.uint8, np.int32, np.int64, np.float32, np.float16]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter("__metadata__".__ne__)


@given(st.dictionaries(NAMES, ARRAYS, max_size=4), st.dictionaries(st.text(), st.text(), max_size=3))
def test_tensors_and_metadata_come_back_bit_for_bit(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    data = pack_tensors({name: torch.from_numpy(array) for name, array in arrays.items()}, metadata)
    found = unpack_tensors(data)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].numpy().dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].numpy().tobytes() == array.tobytes()
    assert unpack_metadata(data) == metadata


@given(hnp.arrays(np.uint8, st.tuples(*map(st.integers, (1, 1, 1, 1), (4, 4, 6, 6)))))
def test_images_come_back_and_are_nhwc_on_the_wire(array: np.ndarray) -> None:
    images_BCHW = torch.from_numpy(array)
    data = pack_images(images_BCHW)
    shape = tuple(images_BCHW.shape[1:])
    assert torch.equal(unpack_images(data, (shape[0], shape[1], shape[2])), images_BCHW)
    assert unpack_tensors(data)["images"].shape == (len(array), shape[1], shape[2], shape[0])


def test_a_transposed_permutation_is_packed_as_it_is_seen() -> None:
    images_BCHW = views(3).permute(0, 1, 3, 2)
    assert torch.equal(unpack_images(pack_images(images_BCHW), SHAPE), images_BCHW)


def body(header: object, payload: bytes = b"", length: int | None = None) -> bytes:
    """A hand-made body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def entry(shape: list[int], stop: int, dtype: str = "U8", start: int = 0) -> dict[str, object]:
    """A tensor's description."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


ONE = [1, 8, 8, 3]
HOSTILE = {
    "empty": b"",
    "short": b"\x08\0\0",
    "lying header length": body({"images": entry(ONE, 192)}, bytes(192), length=10**6),
    "endless header length": body({"images": entry(ONE, 192)}, bytes(192), length=2**63),
    "header is no JSON": body(b"not json at all", bytes(192)),
    "header is a list": body([1, 2], bytes(192)),
    "header is not UTF-8": body(b"\xff\xfe{}", bytes(192)),
    "truncated payload": body({"images": entry(ONE, 192)}, bytes(100)),
    "bytes behind the payload": body({"images": entry(ONE, 192)}, bytes(200)),
    "offsets that overlap": body({"images": entry(ONE, 192), "b": entry(ONE, 192)}, bytes(192)),
    "offsets backwards": body({"images": entry(ONE, 0, start=192)}, bytes(192)),
    "shape larger than the data": body({"images": entry([2, 8, 8, 3], 192)}, bytes(192)),
    "shape that overflows": body({"images": entry([2**62, 8, 8, 3], 192)}, bytes(192)),
    "nothing, 2⁶² times": body({"images": entry([0, 2**62, 2], 0)}),
    "nothing, 2⁶³ times": body({"images": entry([0, 2**63, 8, 3], 0)}),
    "negative shape": body({"images": entry([-1, 8, 8, 3], 192)}, bytes(192)),
    "pickle": pickle.dumps({"images": [1]}),
    "another name": save({"pictures": np.zeros(ONE, np.uint8)}),
    "a second tensor": save({"images": np.zeros(ONE, np.uint8), "more": np.zeros(1, np.uint8)}),
    "no tensor": save({}),
    "wrong dtype": save({"images": np.zeros(ONE, np.float32)}),
    "channels first": save({"images": np.zeros((1, 3, 8, 8), np.uint8)}),
    "three dimensions": save({"images": np.zeros((8, 8, 3), np.uint8)}),
    "zero images": save({"images": np.zeros((0, 8, 8, 3), np.uint8)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused_and_not_quoted(name: str) -> None:
    with pytest.raises(WireError) as refused:
        unpack_images(HOSTILE[name], SHAPE)
    assert len(str(refused.value)) < 200


@given(st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack_images(data, SHAPE)


def test_other_types_are_not_packed_as_images() -> None:
    for wrong in (torch.zeros(1, *SHAPE), torch.zeros(SHAPE, dtype=torch.uint8)):
        with pytest.raises(WireError, match="uint8"):
            pack_images(wrong)


def test_bfloat16_comes_back_and_tensors_may_share_their_memory() -> None:
    values = torch.tensor([1.0, -3.375, float("nan"), -torch.inf]).bfloat16()
    found = unpack_tensors(pack_tensors({"a": values, "b": values[1:], "c": values.reshape(2, 2).T}))
    assert [one.dtype for one in found.values()] == [torch.bfloat16] * 3
    assert torch.equal(found["a"].view(torch.int16), values.view(torch.int16))
    assert torch.equal(found["b"][:1], values[1:2])
    assert found["c"].stride() == (2, 1)
    found["a"][0] = 5.0
    assert values[0] == 1


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(WireError, match="F64"):
        unpack_tensors(save({"values": np.zeros(2)}))
