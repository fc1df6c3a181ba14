"""The pixel digest."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor

from teacher_cache.views import digest
from teacher_cache.views.digest import as_unsigned, pixel_digests
from teacher_cache.views.philox import philox4x32

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
LARGE_SHAPES = st.tuples(st.integers(1, 4), st.integers(120, 260), st.integers(120, 260))
"""14 kB to 270 kB an image: below and above the 8,192 words that NumPy's `einsum` converts at once."""


def images(seed: int, batch: int, shape: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=generator)


def window(views: Tensor) -> Tensor:
    return torch.nn.functional.pad(views, (1, 2, 3, 0))[:, :, 3:, 1:-2]


def shifted(views: Tensor, offset: int) -> Tensor:
    return views.new_empty(views.numel() + offset)[offset:].view(views.shape).copy_(views)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "channels last": lambda views: views.contiguous(memory_format=torch.channels_last),
    "window": window,
    "begins at 1": lambda views: shifted(views, 1),
    "begins at 8": lambda views: shifted(views, 8),
    "every second view": lambda views: views.repeat_interleave(2, 0)[::2],
    "rows of odd length": lambda views: torch.nn.functional.pad(views.flatten(1), (0, 1))[:, :-1].view(views.shape),
    "transposed in memory": lambda views: views.transpose(0, 3).contiguous().transpose(0, 3),
}
"""The same pixels otherwise in memory."""


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
def test_it_does_not_depend_on_the_batch(seed: int, batch: int, shape: tuple[int, int, int]) -> None:
    """One at a time and together: the same digests."""
    views = images(seed, batch, shape)
    assert torch.equal(pixel_digests(views), torch.cat([pixel_digests(view[None]) for view in views]))


def documented(view_CHW: Tensor) -> int:
    """The digest as FORMAT.md has it, in Python's own integers."""

    def mix(value: int) -> int:
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            value = (value ^ value >> 33) * multiplier % 2**64
        return value ^ value >> 33

    data = view_CHW.contiguous().numpy().tobytes()
    words = [word for (word,) in struct.iter_unpack("<Q", data + bytes(-len(data) % 8))]
    counter = np.zeros((len(words), 4), np.uint32)
    counter[:, 0] = np.arange(len(words))
    random = philox4x32(counter, (0x7E4C4E52, 0x0D16E575)).tolist()
    low = sum(word * (r[0] | r[1] << 32 | 1) for word, r in zip(words, random, strict=True))
    high = sum((word >> 32) * (r[2] | r[3] << 32 | 1) for word, r in zip(words, random, strict=True))
    channels, height, width = view_CHW.shape
    shape = (channels << 42) + (height << 21) + width
    return mix((low + shape) % 2**64) ^ mix((high + shape * 0xFF51AFD7ED558CCD + 1) % 2**64)


def check_both_paths(views: Tensor, layout: str, sample: slice = slice(None)) -> None:
    """What NumPy, torch and, for the views of `sample`, FORMAT.md say of the pixels in a layout; they stay as is."""
    laid = LAYOUTS[layout](views)
    found = pixel_digests(laid)
    _, channels, height, width = views.shape
    assert torch.equal(found, digest._torch_digests(laid, (channels << 42) + (height << 21) + width))
    assert as_unsigned(found)[sample].tolist() == [documented(view) for view in views[sample]]
    assert torch.equal(laid, views)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(seed=SEEDS, batch=st.integers(0, 7), shape=SHAPES)
@example(seed=0, batch=1, shape=(1, 1, 8))
@example(seed=0, batch=0, shape=(3, 5, 7))
def test_numpy_and_torch_give_the_documented_integers(
    layout: str, seed: int, batch: int, shape: tuple[int, int, int]
) -> None:
    """Any strides, any first byte, no views at all: neither path sees more than the pixels."""
    check_both_paths(images(seed, batch, shape), layout)


@given(seed=SEEDS, batch=st.integers(1, 5), shape=LARGE_SHAPES, layout=st.sampled_from(sorted(LAYOUTS)))
@example(seed=0, batch=3, shape=(3, 224, 224), layout="contiguous")
@example(seed=0, batch=2, shape=(1, 256, 256), layout="begins at 1")
def test_large_images(seed: int, batch: int, shape: tuple[int, int, int], layout: str) -> None:
    check_both_paths(images(seed, batch, shape), layout, slice(-1, None))


@given(batch=st.integers(1, 3), shape=LARGE_SHAPES)
def test_white_images(batch: int, shape: tuple[int, int, int]) -> None:
    """Every bit set: no sum may saturate, no shift may keep a sign."""
    check_both_paths(torch.full((batch, *shape), 255, dtype=torch.uint8), "contiguous", slice(1))


@pytest.mark.parametrize("made", [True, False], ids=["inference first", "inference last"])
def test_inference_mode(made: bool) -> None:
    """Tensors of inference mode, and multipliers that were first needed there, are ordinary elsewhere."""
    views = images(5, 2, (3, 5, 7))
    expected = [documented(view) for view in views]
    digest._multipliers.cache_clear()
    for inference in (made, not made):
        with torch.inference_mode(inference):
            given = views.clone()
            assert as_unsigned(pixel_digests(given)).tolist() == expected
            assert as_unsigned(digest._torch_digests(given, (3 << 42) + (5 << 21) + 7)).tolist() == expected


def test_pixels_that_may_not_be_written() -> None:
    """Memory that belongs to a read-only array (a memory-mapped shard, for one)."""
    array = images(5, 2, (3, 4, 4)).numpy()
    array.flags.writeable = False
    with warnings.catch_warnings(action="ignore"):
        views = torch.from_numpy(array)
    assert as_unsigned(pixel_digests(views)).tolist() == [documented(view) for view in views]


def test_results_are_not_shared() -> None:
    """A later call does not change what an earlier one gave."""
    views = images(5, 2, (3, 4, 4))
    first = pixel_digests(views)
    kept = first.clone()
    pixel_digests(255 - views)
    assert torch.equal(first, kept)


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
@given(seed=SEEDS, batch=st.integers(0, 7), shape=SHAPES | LARGE_SHAPES, layout=st.sampled_from(sorted(LAYOUTS)))
def test_a_gpu_gives_the_same_integers(seed: int, batch: int, shape: tuple[int, int, int], layout: str) -> None:
    """On the GPU, and they stay there."""
    views = images(seed, batch, shape)
    found = pixel_digests(LAYOUTS[layout](views.cuda()))
    assert found.is_cuda
    assert torch.equal(found.cpu(), pixel_digests(views))
