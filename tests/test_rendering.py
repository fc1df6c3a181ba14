"""Rendering: a batch is its samples pixel for pixel, and the arithmetic of every fast path is the stated one.

The fast paths for other devices run on any machine: `Elsewhere` stands in for a GPU. Where there is one, the same
tests run on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from operator import mul
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from strategies import SEEDS
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2 import functional as tv

from teacher_cache.fingerprint import key_digests
from teacher_cache.views import How, Mixed, Pool
from teacher_cache.views.beta import draw_beta
from teacher_cache.views.drawing import Drawn, image_sizes
from teacher_cache.views.operations import OPERATIONS, Images, Mix, Params
from teacher_cache.views.operations.crops import cut_windows, put_rows
from teacher_cache.views.operations.integer_resize import crop_resize
from teacher_cache.views.operations.mix import CutMix, MixUp, in_boxes
from teacher_cache.views.operations.resized_crop import RandomResizedCrop
from teacher_cache.views.parse import parse_recipe
from teacher_cache.views.philox import Words, first_blocks, philox4x32, view_words
from teacher_cache.views.recipe import Recipe

FALSE_ALARM = 1e-6
DIGESTS = key_digests([f"n01440764/{number}.jpg" for number in range(20_000)])
CPU, GPU = torch.device("cpu"), torch.device("cuda")
WHERE = [
    "cpu",
    "elsewhere",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "resize": [{"size": [11, 9]}],
    "center_crop": [{"size": [8, 9]}, {"size": [30, 27]}, {"size": [31, 8]}],
    "pad_crop": [
        *({"size": [9, 12], "padding": 3, "fill": 7, "padding_mode": mode} for mode in ("constant", "edge")),
        *({"size": [12, 9], "padding": 3, "padding_mode": mode} for mode in ("reflect", "symmetric")),
        {"size": 8, "padding": 0},
    ],
    "random_resized_crop": [
        {"size": [10, 9], "kernel": "integer"},
        {"size": 30, "scale": [0.5, 1], "kernel": "integer"},
        {"size": [9, 10]},
    ],
    "horizontal_flip": [{}, {"p": 1.0}],
    "color_jitter": [{"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}],
    "rand_augment": [{}],
    "trivial_augment": [{}],
    "random_erasing": [{"p": 0.7}, {"p": 1.0, "scale": [0.2, 0.5], "value": 200}],
    "mixup": [{"alpha": 0.4}],
    "cutmix": [{}],
}
"""Arguments that hold for images of at least 8×8, and make such images."""
STEPS = [{name: arguments} for name in OPERATIONS for arguments in EXAMPLES.get(name, [])]
MIXING = ("mixup", "cutmix")


def test_every_operation_has_an_example() -> None:
    assert set(OPERATIONS) <= set(EXAMPLES), "a new operation needs a line here"


class OnGpu(Tensor):
    """A tensor that says so, and what is calculated from it; all of it is in the memory of the CPU."""


class Elsewhere(TorchFunctionMode):
    """A GPU for machines without one: NumPy cannot read its tensors, and they meet no others in an operation."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if isinstance(args[0], OnGpu) else CPU
        tensors = [value for value in args if isinstance(value, Tensor) and value.dim()]
        assert len({isinstance(value, OnGpu) for value in tensors}) <= 1, f"{func} of tensors on two devices"
        assert func is not Tensor.numpy or not isinstance(args[0], OnGpu), "NumPy cannot read the memory of a GPU"
        devices = [value for value in (*args, kwargs.pop("device", None)) if isinstance(value, torch.device)]
        result = func(*[value for value in args if not isinstance(value, torch.device)], **kwargs)
        return result.clone().as_subclass(OnGpu) if GPU in devices else result


@contextmanager
def device_of(where: str) -> Iterator[torch.device]:
    """The device of a place in `WHERE`."""
    with Elsewhere() if where == "elsewhere" else nullcontext():
        yield CPU if where == "cpu" else GPU


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for one another on a busy machine can take thirty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images_of(count: int, channels: int, height: int, width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator))


def images_of_many_sizes(count: int, channels: int, seed: int) -> list[Tensor]:
    sizes: list[list[int]] = np.random.default_rng(seed).integers(8, 40, (count, 2)).tolist()
    return [images_of(1, channels, height, width, seed)[0] for height, width in sizes]


def drawn(recipe: Recipe, images: Sequence[Tensor], view: int) -> Drawn:
    """Parameters and partners; the images are the whole plan."""
    digests = DIGESTS[: len(images)]
    return recipe.draw(digests, image_sizes(images), view, Pool(digests, lambda row: images[row]))


def rendered(
    recipe: Recipe, images: Images, params_BP: Params, partners: Images, how: How
) -> tuple[Tensor, Mixed | None]:
    views, mixed = recipe.render(images, params_BP, partners, how)
    return views if isinstance(views, Tensor) else torch.stack(list(views)), mixed


def assert_a_batch_is_its_samples(recipe: Recipe, images: Sequence[Tensor], view: int, where: str) -> None:
    """As a batch, image by image, and each sample alone: the same pixels, partners and shares."""
    draw = drawn(recipe, images, view)
    before = [image.clone() for image in (*images, *draw.partners)]
    with device_of(where) as device:
        fast, mixed = rendered(recipe, images, draw.params_BP, draw.partners, How(device, batched=True))
        moved = recipe.batched_from < len(recipe.operations)
        assert fast.device.type == (device.type if moved else "cpu"), "what is left to do is done on the device"
    slow, mixed_slowly = rendered(recipe, images, draw.params_BP, draw.partners, How(batched=False))
    assert fast.dtype == torch.uint8
    assert torch.equal(fast.cpu(), slow)
    for place, image in enumerate(images):
        params, partner = draw.params_BP[[place]], draw.partners[place : place + 1]
        alone, mixed_alone = rendered(recipe, [image], params, partner, How(batched=False))
        assert torch.equal(alone[0], slow[place])
        for both in (mixed, mixed_slowly):
            assert (both is None) == (mixed_alone is None) == (recipe.mixing is None)
            if both is not None and mixed_alone is not None:
                assert both.partners_B[place] == mixed_alone.partners_B[0]
                assert both.shares_B[place] == mixed_alone.shares_B[0]
    assert all(torch.equal(*pair) for pair in zip((*images, *draw.partners), before, strict=True))


def taken_by(recipe: Recipe, channels: int) -> int:
    """The number of channels, or the nearest that all operations take."""
    return channels if all(channels in (step.channels or (channels,)) for step in recipe.operations) else 3


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """One to four steps, of which one may mix, for images of at least 8×8."""
    plain = st.sampled_from([step for step in STEPS if not {*step} & {*MIXING}])
    steps = draw(st.lists(plain, min_size=1, max_size=4))
    mix = draw(st.none() | st.sampled_from([step for step in STEPS if {*step} & {*MIXING}]))
    if mix is not None:
        steps.insert(draw(st.integers(0, len(steps))), mix)
    return parse_recipe(steps, draw(SEEDS))


EDGES = st.integers(8, 34)


class TestBatches:
    """Nothing of a batch is seen in a view: not its size, not its other samples, not the device."""

    @pytest.mark.parametrize("where", WHERE)
    @pytest.mark.parametrize("step", STEPS, ids=str)
    @settings(max_examples=15)
    @given(count=st.integers(1, 6), channels=st.sampled_from([1, 3, 5]), height=EDGES, width=EDGES, seed=SEEDS)
    def test_one_operation(
        self, step: dict[str, Any], where: str, count: int, channels: int, height: int, width: int, seed: int
    ) -> None:
        recipe = parse_recipe([step], seed)
        images = images_of(count, taken_by(recipe, channels), height, width, seed)
        assert_a_batch_is_its_samples(recipe, images, seed, where)

    @pytest.mark.parametrize("where", WHERE)
    @settings(max_examples=120)
    @given(
        recipe=recipes(),
        count=st.integers(1, 6),
        channels=st.sampled_from([1, 3, 5]),
        height=EDGES,
        width=EDGES,
        seed=SEEDS,
    )
    def test_whole_recipes(
        self, where: str, recipe: Recipe, count: int, channels: int, height: int, width: int, seed: int
    ) -> None:
        images = images_of(count, taken_by(recipe, channels), height, width, seed)
        assert_a_batch_is_its_samples(recipe, images, seed, where)

    @pytest.mark.parametrize("where", WHERE)
    @pytest.mark.parametrize("kernel", ["torchvision", "integer"])
    @pytest.mark.parametrize("mix", [None, *MIXING])
    @settings(max_examples=15)
    @given(count=st.integers(1, 6), channels=st.sampled_from([1, 3, 5]), seed=SEEDS)
    def test_images_of_different_sizes(
        self, kernel: str, mix: str | None, where: str, count: int, channels: int, seed: int
    ) -> None:
        """One by one until they have one size, as a batch from there on."""
        crop: dict[str, Any] = {"random_resized_crop": {"size": [12, 9], "kernel": kernel}}
        recipe = parse_recipe([crop, {"horizontal_flip": {}}, *([{mix: {}}] if mix else [])], seed)
        assert_a_batch_is_its_samples(recipe, images_of_many_sizes(count, channels, seed), seed, where)

    @pytest.mark.parametrize("mix", MIXING)
    def test_images_of_different_sizes_are_not_mixed(self, mix: str) -> None:
        recipe, images = parse_recipe([{mix: {}}], 0), images_of_many_sizes(2, 3, 0)
        params = np.zeros((2, len(recipe.param_names)), np.int32)
        with pytest.raises(ValueError, match="one shape"):
            recipe.render(images, params, images)
        same = images_of(2, 3, 8, 8, 0)
        for others in (images, images_of(2, 3, 8, 1, 0), images_of(2, 1, 8, 8, 0)):
            with pytest.raises(ValueError, match="one shape"):
                recipe.render(same, params, others)

    @pytest.mark.parametrize("where", WHERE)
    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize("as_batches", [True, False])
    @pytest.mark.parametrize("after", [[], [{"horizontal_flip": {"p": 1.0}}]], ids=["", "then_flip"])
    def test_the_callers_images_stay_as_they_were(
        self, after: list[dict[str, Any]], as_batches: bool, batched: bool, where: str
    ) -> None:
        """Operations may overwrite a batch, but never the caller's; in a batch, views share no memory with it."""
        for step in STEPS:
            recipe = parse_recipe([step, *after], 3)
            images: Images = images_of(4, 3, 20, 17, 1)
            draw = drawn(recipe, list(images), 3)
            partners: Images = draw.partners
            if as_batches:
                images, partners = torch.stack(list(images)), torch.stack(list(partners)) if partners else ()
            before = [image.clone() for image in (*images, *partners)]
            with device_of(where) as device:
                views, _ = rendered(recipe, images, draw.params_BP, partners, How(device, batched))
                views.zero_()
            assert all(torch.equal(*pair) for pair in zip((*images, *partners), before, strict=True)), step

    @given(recipe=recipes())
    def test_batched_from(self, recipe: Recipe) -> None:
        """The first place from which on nothing is done image by image."""
        can = [operation.batched for operation in recipe.operations]
        assert recipe.batched_from == min(place for place in range(len(can) + 1) if all(can[place:]))

    @pytest.mark.parametrize(
        ("steps", "place"),
        [
            ([], 0),
            ([{"horizontal_flip": {}}, {"center_crop": {"size": 8}}, {"pad_crop": {"size": 8}}], 0),
            ([{"random_resized_crop": {"size": 8, "kernel": "integer"}}, {"mixup": {}}], 0),
            ([{"random_resized_crop": {"size": 8}}, {"horizontal_flip": {}}, {"cutmix": {}}], 1),
            ([{"horizontal_flip": {}}, {"resize": {"size": [8, 8]}}, {"horizontal_flip": {}}], 2),
            ([{"horizontal_flip": {}}, {"resize": {"size": 8}}], 2),
        ],
    )
    def test_batched_from_of_known_recipes(self, steps: list[dict[str, Any]], place: int) -> None:
        assert parse_recipe(steps, 0).batched_from == place


class Products(TorchFunctionMode):
    """Records the types that matrices are multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "matmul" in getattr(func, "__name__", ""):
            self.types |= {operand.dtype for operand in args}
        return func(*args, **(kwargs or {}))


def exact_weights(length: int, size: int) -> list[list[Fraction]]:
    """The antialiased triangle from `length` pixels to `size`, in multiples of 2⁻¹⁶, every row's sum 1."""
    scale = Fraction(length, size)
    reach = max(scale, Fraction(1))
    rows = []
    for output in range(size):
        middle = (output + Fraction(1, 2)) * scale
        heights = [max(Fraction(0), 1 - abs(place + Fraction(1, 2) - middle) / reach) for place in range(length)]
        row = [Fraction(half_up(height / sum(heights) * 2**16), 2**16) for height in heights]
        row[row.index(max(row))] += 1 - sum(row)
        rows.append(row)
    return rows


def half_up(value: Fraction) -> int:
    return (value + Fraction(1, 2)).__floor__()


def exactly_resized(pixels: list[list[int]], size: tuple[int, int]) -> list[list[int]]:
    """One channel: every row to its new width, rounded, then every column to its new height, rounded."""
    for edge in (size[1], size[0]):
        weights = exact_weights(len(pixels[0]), edge)
        wide = [[half_up(sum(map(mul, row, line), Fraction(0))) for row in weights] for line in pixels]
        pixels = [list(column) for column in zip(*wide, strict=True)]
    return pixels


def boxes_in(rng: np.random.Generator, count: int, height: int, width: int) -> Params:
    """Boxes (top, left, height, width) [B, 4] inside an image."""
    lengths = rng.integers(1, [height + 1, width + 1], (count, 2))
    corners = rng.integers(0, np.array([height, width]) - lengths + 1)
    return np.concatenate([corners, lengths], axis=1).astype(np.int32)


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


class TestIntegerResize:
    """`crop_resize`: integers, so that no machine, device, batch or mode changes a pixel."""

    @pytest.mark.parametrize("where", WHERE)
    @given(seed=SEEDS, height=st.integers(1, 7), width=st.integers(1, 7), size=SIZES)
    def test_it_is_the_stated_arithmetic(
        self, where: str, seed: int, height: int, width: int, size: tuple[int, int]
    ) -> None:
        """Against fractions."""
        images = torch.stack(images_of(2, 2, height, width, seed))
        boxes = boxes_in(np.random.default_rng(seed), 2, height, width)
        with device_of(where) as device:
            found = crop_resize(images.to(device), boxes, size)
        assert found.dtype == torch.uint8
        for image, (top, left, high, wide), views in zip(images, boxes.tolist(), found.tolist(), strict=True):
            cut = image[:, top : top + high, left : left + wide].tolist()
            assert views == [exactly_resized(channel, size) for channel in cut]

    @pytest.mark.parametrize(
        ("length", "size"), [(5, 1), (5, 224), (300, 7), (300, 224), (4000, 1), (4000, 224), (16_000, 1)]
    )
    def test_constant_images_stay_constant(self, length: int, size: int) -> None:
        """All weights of an output sum to exactly 1, which only very long boxes show: rounding alone loses 1 %."""
        for level in (0, 1, 127, 128, 254, 255):
            images = torch.full((1, 1, 3, length), level, dtype=torch.uint8)
            assert (crop_resize(images, np.array([[0, 0, 3, length]], np.int32), (2, size)) == level).all()
            images = images.transpose(2, 3)
            assert (crop_resize(images, np.array([[0, 0, length, 3]], np.int32), (size, 2)) == level).all()

    def test_boxes_that_are_too_long_are_refused(self) -> None:
        """Their single weights would be lost in rounding."""
        images = torch.zeros((1, 1, 1, 2**14 + 1), dtype=torch.uint8)
        with pytest.raises(ValueError, match="up to 16384 pixels an edge, found 16385"):
            crop_resize(images, np.array([[0, 0, 1, 2**14 + 1]], np.int32), (1, 9))

    @given(seed=SEEDS, height=st.integers(1, 60), width=st.integers(1, 60), size=SIZES)
    def test_the_machines_modes_do_not_matter(
        self, seed: int, height: int, width: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """float64 where float32 products may be rounded, autocast switched off."""
        images = torch.stack(images_of(3, 3, height, width, seed))
        boxes = boxes_in(np.random.default_rng(seed), 3, height, width)
        with Products() as plain:
            expected = crop_resize(images, boxes, size)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(crop_resize(images, boxes, size), expected)
        with monkeypatch.context() as patch, Products() as careful:
            patch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
            assert torch.equal(crop_resize(images, boxes, size), expected)
        with device_of("elsewhere") as device, Products() as other:
            found = crop_resize(images.to(device), boxes, size)
        assert torch.equal(found, expected)
        assert (plain.types, careful.types, other.types) == ({torch.float32}, {torch.float64}, {torch.float64})

    @given(seed=SEEDS, rows=st.lists(st.integers(0, 4), min_size=1, max_size=8), size=SIZES)
    def test_a_batch_a_sample_and_a_crop_are_one(self, seed: int, rows: list[int], size: tuple[int, int]) -> None:
        """`apply` cuts first; `apply_batch` gives weights of 0 outside the box."""
        height, width = np.random.default_rng(seed).integers(1, 60, 2).tolist()
        images = torch.stack(images_of(5, 3, height, width, seed))
        boxes = boxes_in(np.random.default_rng(seed), 5, height, width)
        operation = RandomResizedCrop(size, kernel="integer")
        together = operation.apply_batch(images[rows], boxes[rows])
        for row, view in zip(rows, together, strict=True):
            assert torch.equal(operation.apply(images[row], tuple(boxes[row].tolist())), view)
            assert torch.equal(operation.apply_batch(images[[row]], boxes[[row]])[0], view)

    @pytest.mark.parametrize("largest", [20, 300])
    def test_at_most_two_levels_from_torchvision(self, largest: int) -> None:
        """And hardly ever one: in 1 of 80 values of small images, 1 of 150 of larger ones."""
        rng, differing, values = np.random.default_rng(largest), 0, 0
        for _ in range(300):
            height, width, *size = rng.integers(2, largest + 1, 4).tolist()
            image = torch.from_numpy(rng.integers(0, 256, (1, height, width), np.uint8))
            image = image if rng.random() < 0.5 else (image > 127) * torch.tensor(255, dtype=torch.uint8)
            box = boxes_in(rng, 1, height, width)
            ours = crop_resize(image[None], box, (size[0], size[1]))[0].short()
            theirs = tv.resized_crop(image, *box[0].tolist(), size, antialias=True).short()
            away = (ours - theirs).abs()
            assert away.max() <= 2, (height, width, box, size)
            differing, values = differing + int((away > 0).sum()), values + away.numel()
        assert differing / values < 0.03


class TestMixing:
    """mixup and cutmix against plain loops."""

    @pytest.mark.parametrize("where", WHERE)
    @given(seed=SEEDS, lams=st.lists(st.integers(0, 2**16), min_size=1, max_size=5))
    def test_mixup(self, where: str, seed: int, lams: list[int]) -> None:
        """λ · image + (1 − λ) · partner, halves rounded up."""
        own, others = (torch.stack(images_of(len(lams), 3, 4, 5, seed + side)) for side in (0, 1))
        params = np.array(lams, np.int32)[:, None]
        with device_of(where) as device:
            found = MixUp().mix(own.to(device), others.to(device), params)
        for lam, image, partner, view in zip(lams, own, others, found.cpu(), strict=True):
            pairs = zip(image.flatten().tolist(), partner.flatten().tolist(), strict=True)
            exact = [half_up(Fraction(lam * one + (2**16 - lam) * other, 2**16)) for one, other in pairs]
            assert view.flatten().tolist() == exact
        assert MixUp().shares(params, (4, 5)).tolist() == [lam / 2**16 for lam in lams]

    @pytest.mark.parametrize("where", WHERE)
    @given(seed=SEEDS, height=st.integers(1, 9), width=st.integers(1, 9), count=st.integers(1, 5))
    def test_cutmix_and_in_boxes(self, where: str, seed: int, height: int, width: int, count: int) -> None:
        """Inside is the partner, the far edges excluded; empty boxes are legal."""
        rng = np.random.default_rng(seed)
        x, y = (np.sort(rng.integers(0, edge + 1, (count, 2)), axis=1) for edge in (width, height))
        boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1).astype(np.int32)
        own, others = (torch.stack(images_of(count, 2, height, width, seed + side)) for side in (0, 1))
        with device_of(where) as device:
            inside = in_boxes(boxes, (height, width), device)
            found = CutMix().mix(own.to(device), others.to(device), boxes)
        expected, places = own.clone(), torch.zeros((count, height, width), dtype=torch.bool)
        for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            for row in range(y1, y2):
                for column in range(x1, x2):
                    places[number, row, column] = True
                    expected[number, :, row, column] = others[number, :, row, column]
        assert torch.equal(inside.cpu(), places)
        assert torch.equal(found.cpu(), expected)
        own_share = 1 - places.sum(dim=(1, 2)) / (height * width)
        assert np.allclose(CutMix().shares(boxes, (height, width)), own_share.numpy(), rtol=0, atol=1e-6)


class TestCopies:
    """`cut_windows` and `put_rows` against plain loops, in each of their ways."""

    @pytest.mark.parametrize("where", WHERE)
    @given(seed=SEEDS, height=st.integers(1, 9), width=st.integers(1, 9), count=st.integers(0, 5), data=st.data())
    def test_cut_windows(self, where: str, seed: int, height: int, width: int, count: int, data: st.DataObject) -> None:
        size = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
        images = torch.stack(images_of(count + 1, 3, height, width, seed))[:count]
        room = np.array([height - size[0] + 1, width - size[1] + 1])
        corners = np.random.default_rng(seed).integers(0, room, (count, 2)).astype(np.int32)
        with device_of(where) as device:
            found = cut_windows(images.to(device), corners, size)
        expected = torch.empty((count, 3, *size), dtype=torch.uint8)
        for number, (top, left) in enumerate(corners.tolist()):
            expected[number] = images[number, :, top : top + size[0], left : left + size[1]]
        assert torch.equal(found.cpu(), expected)

    @pytest.mark.parametrize("where", WHERE)
    @given(seed=SEEDS, count=st.integers(1, 6), data=st.data())
    def test_put_rows(self, where: str, seed: int, count: int, data: st.DataObject) -> None:
        """In place, also where the batch is a part of a larger one."""
        rows = data.draw(st.lists(st.integers(0, count - 1), unique=True))
        larger = torch.stack(images_of(count, 3, 5, 6, seed))
        values = torch.stack(images_of(count, 3, 5, 3, seed + 1))[: len(rows)]
        expected = larger.clone()
        for place, row in enumerate(rows):
            expected[row, :, :, 2:5] = values[place]
        index = torch.tensor(rows, dtype=torch.int64)
        with device_of(where) as device:
            larger = larger.to(device)
            window = larger[..., 2:5]
            assert put_rows(window, index.to(device), values.to(device)) is window
        assert torch.equal(larger.cpu(), expected)


U64, U32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)


def some(values: Sequence[int], dtype: type[np.uint64] | type[np.uint32]) -> NDArray[Any]:
    return np.array(values, dtype)


class TestWords:
    """However words are asked for, an address has one answer."""

    @given(
        samples=st.lists(st.tuples(U64, U32), min_size=1, max_size=6),
        view=st.none() | U32,
        start=st.integers(0, 2**16 - 4),
        count=st.integers(0, 3),
        seed=U64,
        block=st.integers(0, 300),
    )
    def test_every_way_gives_the_same(
        self, samples: list[tuple[int, int]], view: int | None, start: int, count: int, seed: int, block: int
    ) -> None:
        """`first_blocks`, `Words` with and without them, one view for all or one each, and `view_words`."""
        digests = some([digest for digest, _ in samples], np.uint64)
        views = some([own if view is None else view for _, own in samples], np.uint32)
        given_view = views if view is None else view
        places = range(start, start + count)
        first = first_blocks(digests, given_view, places, seed)
        assert first.shape == (count, len(samples), 4)
        for place, first_B4 in zip(places, first, strict=True):
            plain, ready = Words(digests, given_view, place, seed), Words(digests, views, place, seed, first_B4)
            assert len(plain) == len(ready) == len(samples)
            for row in range(len(samples)):
                alone = view_words(digests[[row]], int(views[row]), place, block + 1, seed)[0]
                assert (first_B4[row] == alone[:4]).all()
                for words in (plain, ready):
                    assert (words.block(0)[row] == alone[:4]).all()
                    assert (words.block(block)[row] == alone[4 * block :]).all()

    @given(
        rows=st.lists(st.integers(0, 8), max_size=12),
        block=st.integers(0, 3),
        each=st.booleans(),
        ready=st.booleans(),
        seed=U64,
    )
    def test_some_rows(self, rows: list[int], block: int, each: bool, ready: bool, seed: int) -> None:
        """In any order, with repeats, or none."""
        view: int | NDArray[np.uint32] = np.arange(9, dtype=np.uint32) if each else 5
        first = first_blocks(DIGESTS[:9], view, range(3, 4), seed)[0] if ready else None
        words, places = Words(DIGESTS[:9], view, 3, seed, first), np.array(rows, np.intp)
        assert (words.block(block, places) == words.block(block)[places]).all()

    @pytest.mark.parametrize("count", [2047, 2048, 2049, 5000])
    def test_many_addresses(self, count: int) -> None:
        """More than are worked on at once."""
        counters = np.random.default_rng(count).integers(0, 2**32, (count, 4), np.uint32)
        whole = philox4x32(counters, (3, 2**32 - 1))
        pieces = [philox4x32(counters[start : start + 777], (3, 2**32 - 1)) for start in range(0, count, 777)]
        assert (whole == np.concatenate(pieces)).all()


def johnk(u: float, v: float, alpha: float) -> float | None:
    y, z = u ** (1 / alpha), v ** (1 / alpha)
    return y / (y + z) if y + z <= 1 else None


def cheng(u: float, v: float, alpha: float) -> float | None:
    """BB with a = b = α: then its λ is √α and its γ is α + √α."""
    w = alpha * math.exp(math.log(u / (1 - u)) / math.sqrt(alpha))
    r = (alpha + math.sqrt(alpha)) * math.log(u / (1 - u)) / math.sqrt(alpha) - math.log(4)
    return w / (alpha + w) if r + 2 * alpha * math.log(2 * alpha / (alpha + w)) >= math.log(u * u * v) else None


class TestBeta:
    """Beta(α, α) by rejection."""

    @pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1, 2, 5, 8])
    def test_distribution(self, alpha: float) -> None:
        """Kolmogorov-Smirnov over 20,000 fixed addresses: would fail by chance once in a million."""
        values = draw_beta(Words(DIGESTS, 1, 2, 7), alpha, first=1)
        assert ((values >= 0) & (values <= 1)).all()
        assert stats.kstest(values, stats.beta(alpha, alpha).cdf).pvalue > FALSE_ALARM

    @pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 1.1, 2.0, 8.0])
    def test_it_is_the_stated_algorithm(self, alpha: float) -> None:
        """Jöhnk's below 1 and Cheng's BB above, as Devroye writes them, from the words of each try's block."""
        found = draw_beta(Words(DIGESTS[:300], 1, 2, 7), alpha, first=3)
        blocks = view_words(DIGESTS[:300], 1, 2, 3 + 40, 7).reshape(300, -1, 4)[:, 3:, :2]
        for number, tries in zip(found.tolist(), ((blocks + 0.5) / 2**32).tolist(), strict=True):
            values = (johnk(u, v, alpha) if alpha < 1 else cheng(u, v, alpha) for u, v in tries)
            assert math.isclose(number, next(value for value in values if value is not None), rel_tol=1e-9)

    @given(
        rows=st.lists(st.integers(0, 99), min_size=1, max_size=9),
        alpha=st.sampled_from([0.1, 0.5, 1.0, 2.0, 8.0]),
        view=U32,
        first=st.integers(0, 3),
    )
    def test_a_number_is_its_samples_own(self, rows: list[int], alpha: float, view: int, first: int) -> None:
        """Not the batch's: rejected tries of one sample move no other's number."""
        together = draw_beta(Words(DIGESTS[rows], view, 2, 7), alpha, first)
        alone = [draw_beta(Words(DIGESTS[[row]], view, 2, 7), alpha, first)[0] for row in rows]
        assert together.tolist() == alone

    @pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
    def test_different_addresses_differ(self, alpha: float) -> None:
        """View, operation and first block are all part of a number's address."""
        known = draw_beta(Words(DIGESTS[:200], 1, 2, 7), alpha, first=1)
        for view, place, seed, first in ((2, 2, 7, 1), (1, 3, 7, 1), (1, 2, 8, 1), (1, 2, 7, 600)):
            other = draw_beta(Words(DIGESTS[:200], view, place, seed), alpha, first)
            assert (known != other).mean() > 0.9


def test_mixing_operations_are_those_named_here() -> None:
    mixing = [name for name, kind in OPERATIONS.items() if isinstance(kind, type) and issubclass(kind, Mix)]
    assert sorted(mixing) == sorted(MIXING)
