"""The pixel digest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from teacher_cache.views.digest import as_unsigned, pixel_digests

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def images(seed: int, batch: int, shape: tuple[int, int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=generator)


@given(seed=SEEDS, shape=SHAPES, data=st.data())
def test_any_changed_pixel_changes_it(seed: int, shape: tuple[int, int, int], data: st.DataObject) -> None:
    image = images(seed, 1, shape)
    changed = image.clone().reshape(-1)
    changed[data.draw(st.integers(0, changed.numel() - 1))] ^= data.draw(st.integers(1, 255))
    assert pixel_digests(image) != pixel_digests(changed.reshape(image.shape))


@given(seed=SEEDS, shape=SHAPES)
def test_every_single_bit_counts(seed: int, shape: tuple[int, int, int]) -> None:
    """All one-bit neighbours of an image have digests of their own."""
    flat = images(seed, 1, shape).reshape(-1)[:24]
    neighbours = [flat.clone() for _ in range(8 * len(flat) + 1)]
    for bit in range(8 * len(flat)):
        neighbours[bit][bit // 8] ^= 1 << (bit % 8)
    batch = torch.stack(neighbours).reshape(len(neighbours), 1, 1, len(flat))
    assert len(set(pixel_digests(batch).tolist())) == len(neighbours)


@given(seed=SEEDS, shape=SHAPES)
def test_shape_counts(seed: int, shape: tuple[int, int, int]) -> None:
    """The same bytes in another shape, and the transposed image, differ."""
    image = images(seed, 1, shape)
    flat = image.reshape(1, 1, 1, -1)
    if flat.shape != image.shape:
        assert pixel_digests(image) != pixel_digests(flat)
    turned = image.transpose(2, 3)
    if not (turned.shape == image.shape and torch.equal(turned, image)):
        assert pixel_digests(image) != pixel_digests(turned)


@given(batch=st.integers(1, 3), shape=SHAPES, more=st.integers(1, 9))
def test_padding_is_not_pixels(batch: int, shape: tuple[int, int, int], more: int) -> None:
    """A black image is not another, larger black image."""
    black = torch.zeros((batch, *shape), dtype=torch.uint8)
    larger = torch.zeros((batch, shape[0], shape[1], shape[2] + more), dtype=torch.uint8)
    assert (pixel_digests(black) != pixel_digests(larger)).all()


@given(seed=SEEDS, batch=st.integers(1, 7), shape=SHAPES)
def test_it_does_not_depend_on_the_batch_or_on_strides(seed: int, batch: int, shape: tuple[int, int, int]) -> None:
    """One at a time, together, channels-last and as a window into a larger tensor: the same digests."""
    views = images(seed, batch, shape)
    together = pixel_digests(views)
    assert torch.equal(together, torch.cat([pixel_digests(view[None]) for view in views]))
    assert torch.equal(together, pixel_digests(views.contiguous(memory_format=torch.channels_last)))
    wide = torch.nn.functional.pad(views, (1, 2, 3, 0))
    assert torch.equal(together, pixel_digests(wide[:, :, 3:, 1 : 1 + shape[2]]))


def test_golden_values() -> None:
    """Frozen: stored in every cache. If these change, the format's version must."""
    ramp = torch.arange(2 * 3 * 5 * 7, dtype=torch.int64).to(torch.uint8).reshape(2, 3, 5, 7)
    found = [*as_unsigned(pixel_digests(ramp)), *as_unsigned(pixel_digests(ramp[:, :1, :4, :4]))]
    zero = torch.zeros((1, 1, 8, 8), dtype=torch.uint8)
    found += [*as_unsigned(pixel_digests(zero)), *as_unsigned(pixel_digests(zero + 255))]
    assert [f"{int(digest):016x}" for digest in found] == GOLDEN


GOLDEN = [
    "67d8e1c89c07db13",
    "eea91b7fd6881d1c",
    "0896cbea74839fdc",
    "35ae36dfcc3ff8b2",
    "40e8bb12683838b2",
    "864360bbb2fe65fa",
]


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)], ids=["float", "no batch"]
)
def test_other_tensors_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B, C, H, W\]"):
        pixel_digests(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@given(seed=SEEDS, batch=st.integers(1, 7), shape=SHAPES)
def test_a_gpu_gives_the_same_integers(seed: int, batch: int, shape: tuple[int, int, int]) -> None:
    views = images(seed, batch, shape)
    assert torch.equal(pixel_digests(views), pixel_digests(views.cuda()).cpu())


def test_a_slice_that_begins_anywhere() -> None:
    """Contiguous, but not at a multiple of eight bytes: found by Hypothesis once in many runs."""
    pixels = torch.arange(10 * 8, dtype=torch.uint8).view(10, 1, 1, 8)
    shifted = torch.empty(81, dtype=torch.uint8)[1:].view(10, 1, 1, 8).copy_(pixels)
    assert shifted.storage_offset() == 1
    assert torch.equal(pixel_digests(shifted), pixel_digests(pixels))
