"""color_jitter, rand_augment, trivial_augment_wide, random_erasing: torchvision's pixels and distributions.

Distributions are compared by two-sample tests that would fail by chance once in a million; all seeds are fixed.
"""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from strategies import SEEDS
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from teacher_cache.fingerprint import key_digests
from teacher_cache.views.operations.auto_augment import STEPS, RandAugment, TrivialAugmentWide
from teacher_cache.views.operations.base import Operation, Params
from teacher_cache.views.operations.color_jitter import ColorJitter
from teacher_cache.views.operations.random_erasing import RandomErasing, masked
from teacher_cache.views.philox import Words

FALSE_ALARM = 1e-6
COUNT = 8000
AMOUNTS = ("brightness", "contrast", "saturation", "hue")
DIGESTS = key_digests([f"n01440764/{number}.jpg" for number in range(COUNT)])

EVERY: list[Operation] = [
    ColorJitter(),
    ColorJitter(0.4, (0.5, 3.0), None, 0.5),
    RandAugment(),
    RandAugment(num_ops=3, magnitude=30, interpolation="bilinear", fill=(1.0, 2.0, 3.0)),
    RandAugment(num_ops=0),
    TrivialAugmentWide(),
    RandomErasing(),
    RandomErasing(p=1.0, scale=(0.0, 1.0), value=(1, 2, 3)),
]


def drawn(operation: Operation, height: int = 60, width: int = 80, count: int = COUNT, seed: int = 7) -> Params:
    return operation.draw(Words(DIGESTS[:count], 3, 1, seed), np.tile([height, width], (count, 1)))


def image_of(channels: int, height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def torchvision_draws(draw: Callable[[], Any], count: int = COUNT) -> list[Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [draw() for _ in range(count)]


def assert_same_categories(ours: Iterable[Hashable], theirs: Iterable[Hashable]) -> None:
    """Two-sample chi-square; categories that are too rare for it are one category together."""
    counts = [Counter(ours), Counter(theirs)]
    names = sorted({*counts[0], *counts[1]}, key=repr)
    table = np.array([[count[name] for name in names] for count in counts])
    common = table.sum(axis=0) >= 16
    rest = table[:, ~common].sum(axis=1, keepdims=True)
    table = np.concatenate([table[:, common], rest], axis=1) if rest.sum() >= 16 else table[:, common]
    if table.shape[1] > 1:
        assert stats.chi2_contingency(table).pvalue > FALSE_ALARM, dict(zip(names, table.T.tolist(), strict=False))


def assert_same_numbers(ours: Any, theirs: Any) -> None:
    """Two-sample Kolmogorov-Smirnov."""
    assert stats.ks_2samp(ours, theirs, method="asymp").pvalue > FALSE_ALARM


class TestIdentity:
    """Parameters are a pure function of the address and the image's size."""

    @pytest.mark.parametrize("operation", EVERY, ids=repr)
    @given(rows=st.lists(st.integers(0, 20), min_size=1, max_size=9), view=st.integers(0, 2**32 - 2), seed=SEEDS)
    def test_any_order_any_batch(self, operation: Operation, rows: list[int], view: int, seed: int) -> None:
        sizes = np.array([[7 + 3 * number, 40 - number] for number in range(21)])
        together = operation.draw(Words(DIGESTS[rows], view, 2, seed), sizes[rows])
        assert together.dtype == np.int32
        assert together.shape == (len(rows), len(operation.params))
        for place, row in enumerate(rows):
            alone = operation.draw(Words(DIGESTS[[row]], view, 2, seed), sizes[[row]])
            assert (alone[0] == together[place]).all()

    @pytest.mark.parametrize("operation", EVERY, ids=repr)
    def test_no_global_generator_is_touched_or_read(self, operation: Operation) -> None:
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            states = (torch.get_rng_state(), str(np.random.get_state()), random.getstate())
            params = drawn(operation, 12, 9, 30)
            found.append([operation.apply(image_of(3, 12, 9, 0), tuple(row)) for row in params.tolist()])
            assert torch.equal(torch.get_rng_state(), states[0])
            assert str(np.random.get_state()) == states[1]
            assert random.getstate() == states[2]
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    @pytest.mark.parametrize("operation", EVERY, ids=repr)
    def test_blocks_are_those_announced(self, operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
        """A recipe is random exactly where an operation has blocks."""
        asked, original = [-1], Words.block

        def spy(self: Words, number: int, rows: Any = None) -> NDArray[np.uint32]:
            asked.append(number)
            return original(self, number, rows)

        monkeypatch.setattr(Words, "block", spy)
        drawn(operation, 3, 200)
        assert max(asked) < operation.blocks
        assert (max(asked) >= 0) == (operation.blocks > 0)

    @pytest.mark.parametrize("operation", EVERY, ids=repr)
    def test_it_travels_and_leaves_the_image_and_its_size_alone(self, operation: Operation) -> None:
        assert pickle.loads(pickle.dumps(operation)) == operation
        image = image_of(3, 20, 22, 1)
        before, sizes = image.clone(), np.array([[20, 22]])
        assert (operation.output_sizes(sizes) == sizes).all()
        for row in drawn(operation, 20, 22, 200).tolist():
            view = operation.apply(image, tuple(row))
            assert view.dtype == torch.uint8
            assert view.shape == image.shape
            assert torch.equal(image, before)

    @pytest.mark.parametrize("operation", EVERY, ids=repr)
    def test_an_empty_batch(self, operation: Operation) -> None:
        params = operation.draw(Words(DIGESTS[:0], 0, 0, 0), np.empty((0, 2), np.int64))
        assert params.shape == (0, len(operation.params))


def below(word: int, bound: int) -> int:
    return word * bound >> 32


def unit(word: int) -> float:
    return word / 2**32


class TestWords:
    """Parameters from words by the docstrings' letter, one sample at a time: a cache holds what these give."""

    def _blocks(self, sample: int, blocks: int) -> list[list[int]]:
        words = Words(DIGESTS[[sample]], 3, 1, 7)
        return [words.block(number)[0].tolist() for number in range(blocks)]

    def test_color_jitter(self) -> None:
        params = drawn(ColorJitter(0.4, (0.5, 3.0), None, 0.5), count=50)
        for sample, row in enumerate(params.tolist()):
            first, second = self._blocks(sample, 2)
            amounts = [
                low + unit(word) * (high - low)
                for word, (low, high) in zip(second, [(0.6, 1.4), (0.5, 3.0), (1.0, 1.0), (-0.5, 0.5)], strict=True)
            ]
            assert row == [below(first[0], 24), *[round(amount * 2**16) for amount in amounts]]

    @pytest.mark.parametrize("operation", [RandAugment(3, 13), TrivialAugmentWide(23)], ids=repr)
    def test_auto_augment(self, operation: RandAugment | TrivialAugmentWide) -> None:
        wide = isinstance(operation, TrivialAugmentWide)
        signed = (
            [0.99, 0.99, 32, 32, 135, *[0.99] * 4]
            if wide
            else [0.3, 0.3, 150 * 80 / 331, 150 * 60 / 331, 30, *[0.9] * 4]
        )
        for sample, row in enumerate(drawn(operation, 60, 80, 200).tolist()):
            expected = []
            for words in self._blocks(sample, operation.blocks):
                chosen = below(words[1], operation.num_magnitude_bins) if wide else 13
                step, part = below(words[0], 14), chosen / (operation.num_magnitude_bins - 1)
                sign = -1 if words[2] < 2**31 else 1
                magnitudes = [
                    0,
                    *[sign * top * part for top in signed],
                    round(8 - (6 if wide else 4) * part),
                    1 - part,
                    0,
                    0,
                ]
                expected += [step, round(magnitudes[step] * 2**16)]
            assert row == expected

    def test_random_erasing(self) -> None:
        operation = RandomErasing(p=0.7, scale=(0.3, 0.9), ratio=(0.2, 2.0))
        for sample, row in enumerate(drawn(operation, 60, 80, 200).tolist()):
            first, *tries = self._blocks(sample, 11)
            assert row == (self._box(tries) if first[0] < round(0.7 * 2**32) else [0, 0, 0, 0])

    def _box(self, tries: list[list[int]]) -> list[int]:
        for words in tries:
            area = 60 * 80 * (0.3 + unit(words[0]) * 0.6)
            aspect = math.exp(math.log(0.2) + unit(words[1]) * (math.log(2.0) - math.log(0.2)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < 60 and width < 80:
                return [below(words[2], 60 - height + 1), below(words[3], 80 - width + 1), height, width]
        return [0, 0, 0, 0]


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize(
    ("operation", "params"),
    [(ColorJitter(), (0, 0, 0, 0, 0)), (RandAugment(num_ops=1), (0, 0)), (RandAugment(num_ops=0), ())]
    + [(TrivialAugmentWide(), (step, 2**16)) for step in range(14)],
)
def test_other_channels_are_refused_whatever_was_drawn(
    operation: Operation, params: tuple[int, ...], channels: int
) -> None:
    assert operation.channels == (1, 3)
    with pytest.raises(ValueError, match=f"channels must be 1 or 3 .*{type(operation).__name__}, found {channels}"):
        operation.apply(image_of(channels, 8, 8, 0), params)


SPANS = {
    "brightness": st.floats(0, 5) | st.tuples(st.floats(-1, 3), st.floats(-1, 3)) | st.sampled_from([1, 0, (1, 1)]),
    "hue": st.floats(-0.2, 0.6) | st.tuples(st.floats(-0.6, 0.6), st.floats(-0.6, 0.6)) | st.sampled_from([0, (0, 0)]),
}


class TestColorJitter:
    ORDERS = sorted(itertools.permutations(range(4)))

    @given(
        seed=SEEDS,
        channels=st.sampled_from([1, 3]),
        amounts=st.tuples(*[st.sampled_from([None, 0.4, (0.0, 3.0)])] * 3, st.sampled_from([None, 0.1, (-0.5, 0.5)])),
    )
    def test_pixels(self, seed: int, channels: int, amounts: tuple[Any, ...]) -> None:
        image, operation, theirs = image_of(channels, 9, 13, seed), ColorJitter(*amounts), v2.ColorJitter(*amounts)
        for row in drawn(operation, 9, 13, 8, seed).tolist():
            params: dict[str, Any] = {"fn_idx": torch.tensor(self.ORDERS[row[0]])}
            for name, amount, value in zip(AMOUNTS, amounts, row[1:], strict=True):
                params[f"{name}_factor"] = None if amount is None else value / 2**16
            assert torch.equal(operation.apply(image, tuple(row)), theirs.transform(image, params))

    def test_ranks_of_the_order(self) -> None:
        """0 is brightness, contrast, saturation, hue; 1 exchanges the last two; 23 is all reversed."""
        operation, image = ColorJitter(0.9, 0.9, 0.9, 0.5), image_of(3, 16, 16, 0)
        values = (1.5, 0.25, 1.75, 0.25)
        calls = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
        for rank, order in ((0, (0, 1, 2, 3)), (1, (0, 1, 3, 2)), (6, (1, 0, 2, 3)), (23, (3, 2, 1, 0))):
            expected = image
            for which in order:
                expected = calls[which](expected, values[which])
            stored = [round(value * 2**16) for value in values]
            assert torch.equal(operation.apply(image, (rank, *stored)), expected)

    @pytest.mark.parametrize("which", range(4), ids=AMOUNTS)
    def test_a_drawn_zero_is_applied(self, which: int) -> None:
        """Whether an amount is applied is a matter of the recipe, not of what was drawn."""
        image, neutral = image_of(3, 16, 16, 0), [2**16, 2**16, 2**16, 0]
        neutral[which] = 0
        expected = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue][which](image, 0.0)
        operation = ColorJitter(**{AMOUNTS[which]: 0.5 if which == 3 else 1.0})
        assert torch.equal(operation.apply(image, (0, *neutral)), expected)

    @pytest.mark.parametrize("amounts", [(0.4, 0.3, (0.2, 1.9), 0.1), ((0.9, 1.0), 1.5, None, (-0.5, 0.2))])
    def test_distribution(self, amounts: tuple[Any, ...]) -> None:
        transform = v2.ColorJitter(*amounts)
        theirs = torchvision_draws(lambda: transform.make_params([]))
        order, *values = drawn(ColorJitter(*amounts)).T
        assert_same_categories(order.tolist(), [self.ORDERS.index(tuple(one["fn_idx"].tolist())) for one in theirs])
        joint = []
        for name, amount, value in zip(AMOUNTS, amounts, values, strict=True):
            if amount is not None:
                other = np.array([one[f"{name}_factor"] for one in theirs])
                assert_same_numbers(value / 2**16, other)
                edges = np.quantile(other, [0.25, 0.5, 0.75])
                joint.append((np.digitize(value / 2**16, edges), np.digitize(other, edges)))
        ours, others = (zip(*columns, strict=True) for columns in zip(*joint, strict=True))
        assert_same_categories([tuple(map(int, one)) for one in ours], [tuple(map(int, one)) for one in others])
        assert abs(np.corrcoef(order, values[0])[0, 1]) < 5 / COUNT**0.5

    @given(name=st.sampled_from(AMOUNTS), data=st.data(), seed=SEEDS)
    def test_ranges_and_refusals_are_torchvisions(self, name: str, data: st.DataObject, seed: int) -> None:
        value = data.draw(SPANS["hue" if name == "hue" else "brightness"])
        try:
            span = getattr(v2.ColorJitter(**{name: value}), name)
        except ValueError:
            with pytest.raises(ValueError, match=name):
                ColorJitter(**{name: value})
            return
        params = drawn(ColorJitter(**{name: value}), count=400, seed=seed)
        neutral = {other: 2**16 * (other != "hue") for other in AMOUNTS}
        for other, column in zip(AMOUNTS, params[:, 1:].T, strict=True):
            if other != name or span is None:
                assert (column == neutral[other]).all()
            else:
                low, high = span[0] * 2**16, span[1] * 2**16
                assert low - 0.5 <= column.min() <= low + (high - low) * 0.05 + 0.5
                assert high + 0.5 >= column.max() >= high - (high - low) * 0.05 - 0.5

    @pytest.mark.parametrize("channels", [1, 3])
    def test_nothing_to_do(self, channels: int) -> None:
        """Not applied at all, even where torchvision's call would not be neutral."""
        image = image_of(channels, 8, 8, 0)
        assert ColorJitter(0, (1, 1), None, 0.0).apply(image, (5, 0, 0, 0, 2**14)) is image

    @pytest.mark.parametrize("name", AMOUNTS)
    def test_refusals(self, name: str) -> None:
        nan, inf = float("nan"), float("inf")
        numbers = [True, "0.5", nan, inf, -0.1, 1e9, 10**400, {}, [0.5, 1.0]]
        pairs = [
            (0.5,),
            (0.1, 0.2, 0.3),
            (2.0, 1.0),
            (True, 1),
            (0.1, nan),
            (0, inf),
            (0, 40_000),
            ("0", "1"),
            (None, 1),
        ]
        for value in [*numbers, *pairs]:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                ColorJitter(**{name: value})


class _Spied:
    """Records (operation, magnitude) in place of applying them."""

    seen: list[tuple[str, float]]

    def _apply_image_or_video_transform(self, image: Tensor, transform_id: str, magnitude: float, **_: Any) -> Tensor:
        self.seen.append((transform_id, round(magnitude, 3) + 0.0))
        return image


class SpiedRandAugment(_Spied, v2.RandAugment):
    pass


class SpiedTrivialAugmentWide(_Spied, v2.TrivialAugmentWide):
    pass


def table_of(transform: Any, bins: int, height: int, width: int) -> list[Any]:
    """torchvision's magnitudes of every operation, by bin; zeros where there are none."""
    spaces = transform._AUGMENTATION_SPACE
    assert tuple(spaces) == STEPS
    found = [magnitudes(bins, height, width) for magnitudes, _ in spaces.values()]
    return [np.zeros(bins) if one is None else one.numpy().astype(float) for one in found]


class TestAutoAugment:
    @pytest.mark.parametrize("mode", ["nearest", "bilinear"])
    @pytest.mark.parametrize("step", range(14), ids=STEPS)
    @given(
        channels=st.sampled_from([1, 3]),
        height=st.integers(1, 24),
        width=st.integers(1, 24),
        filled=st.sampled_from([None, 0, 7, 127.5, "each"]),
        part=st.floats(-1, 1) | st.integers(-30, 30).map(lambda number: number / 30),
        seed=SEEDS,
    )
    def test_pixels_of_one_step(
        self, step: int, mode: str, channels: int, height: int, width: int, filled: Any, part: float, seed: int
    ) -> None:
        image = image_of(channels, height, width, seed)
        fill = tuple(range(3, 3 + channels)) if filled == "each" else filled
        tables = [table_of(space, 31, 70, 70)[step] for space in (v2.RandAugment, v2.TrivialAugmentWide)]
        top = max(abs(table).max() for table in tables)
        stored = round((part if 1 <= step <= 9 else abs(part)) * top * 2**16)
        theirs = v2.TrivialAugmentWide(interpolation=InterpolationMode(mode), fill=fill)
        expected = theirs._apply_image_or_video_transform(
            image, STEPS[step], stored / 2**16, interpolation=theirs.interpolation, fill=theirs._fill
        )
        for operation in (TrivialAugmentWide(31, mode, fill), RandAugment(1, interpolation=mode, fill=fill)):
            assert torch.equal(operation.apply(image, (step, stored)), expected)

    @given(seed=SEEDS, steps=st.lists(st.integers(0, 13), max_size=4))
    def test_steps_follow_one_another(self, seed: int, steps: list[int]) -> None:
        image = expected = image_of(3, 15, 12, seed)
        params: list[int] = []
        for step in steps:
            params += [step, 2**15]
            expected = TrivialAugmentWide().apply(expected, (step, 2**15))
        assert torch.equal(RandAugment(num_ops=len(steps)).apply(image, tuple(params)), expected)

    @pytest.mark.parametrize("bins", [2, 10, 31])
    def test_magnitudes_of_trivial_augment_wide(self, bins: int) -> None:
        """Every operation, every bin, both signs, and nothing else; equal to float32's last bits."""
        step, stored = drawn(TrivialAugmentWide(bins)).T
        for place, table in enumerate(table_of(v2.TrivialAugmentWide, bins, 60, 80)):
            signs = (1, -1) if 1 <= place <= 9 else (1,)
            expected = {sign * round(value * 2**16) for value in table for sign in signs}
            found = set(stored[step == place].tolist())
            assert all(min(abs(one - other) for other in expected) <= 1 for one in found)
            assert all(min(abs(one - other) for one in found) <= 1 for other in expected)

    @given(bins=st.integers(2, 60), data=st.data(), height=st.integers(1, 2000), width=st.integers(1, 2000), seed=SEEDS)
    def test_magnitudes_of_rand_augment(
        self, bins: int, data: st.DataObject, height: int, width: int, seed: int
    ) -> None:
        magnitude = data.draw(st.integers(0, bins - 1))
        params = drawn(RandAugment(1, magnitude, bins), height, width, 300, seed)
        tables = table_of(v2.RandAugment, bins, height, width)
        assert len(np.unique(params[:, 0])) == 14
        for step, stored in params.tolist():
            expected = tables[step][magnitude] * 2**16
            assert abs(abs(stored) - expected) <= 1 + 1e-6 * expected
            assert 1 <= step <= 9 or stored >= 0

    def test_each_sample_has_its_own_size(self) -> None:
        sizes = np.stack([np.arange(COUNT) + 10, 3 * np.arange(COUNT) + 50], axis=1)
        params = RandAugment(num_ops=1, magnitude=30).draw(Words(DIGESTS, 0, 0, 1), sizes)
        for step, edge in ((3, 1), (4, 0)):
            rows = params[:, 0] == step
            assert abs(np.abs(params[rows, 1]) / 2**16 - sizes[rows, edge] * 150 / 331).max() < 2**-16

    @pytest.mark.parametrize("magnitude", [0, 9, 30])
    def test_distribution_of_rand_augment(self, magnitude: int) -> None:
        """Both steps together, so that they are independent too."""
        transform, image = SpiedRandAugment(2, magnitude), torch.zeros((3, 60, 80), dtype=torch.uint8)

        def draw() -> Hashable:
            transform.seen = []
            transform(image)
            return tuple(transform.seen)

        theirs = torchvision_draws(draw)
        ours = [self._named(row) for row in drawn(RandAugment(2, magnitude)).tolist()]
        assert_same_categories(ours, theirs)
        for place in (0, 1):
            assert_same_categories([one[place] for one in ours], [one[place] for one in theirs])

    @pytest.mark.parametrize("bins", [4, 31])
    def test_distribution_of_trivial_augment_wide(self, bins: int) -> None:
        transform, image = SpiedTrivialAugmentWide(bins), torch.zeros((3, 60, 80), dtype=torch.uint8)
        transform.seen = []
        torchvision_draws(lambda: transform(image))
        assert_same_categories(
            [self._named(row)[0] for row in drawn(TrivialAugmentWide(bins)).tolist()], transform.seen
        )

    @pytest.mark.parametrize("operation", [RandAugment(num_ops=1), TrivialAugmentWide()], ids=repr)
    def test_half_of_the_signs_are_negative(self, operation: Operation) -> None:
        step, magnitude = drawn(operation).T
        signs = np.sign(magnitude)
        for places in ([1, 2, 3, 4, 5, 6, 7, 8, 9], *([place] for place in range(1, 10))):
            mine = signs[np.isin(step, places) & (signs != 0)]
            assert abs(mine.mean()) < 5 / len(mine) ** 0.5

    def _named(self, row: list[int]) -> tuple[tuple[str, float], ...]:
        pairs = zip(row[::2], row[1::2], strict=True)
        return tuple((STEPS[step], round(stored / 2**16, 3) + 0.0) for step, stored in pairs)

    def test_names_of_the_parameters(self) -> None:
        names = ("0.operation", "0.magnitude", "1.operation", "1.magnitude")
        assert RandAugment().params == names
        assert RandAugment(num_ops=0).params == ()
        assert TrivialAugmentWide().params == ("operation", "magnitude")

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("num_magnitude_bins", [1, 0, -31, 31.0, True, None, "31", 2**16 + 1]),
            ("interpolation", ["bicubic", "nearest-exact", "lanczos", "", None, 0, True]),
            ("fill", [-1, 256, float("nan"), True, "0", (), (1, 2, 300), (1, True), (1, None), [1, 2, 3], {}]),
            ("num_ops", [-1, 2.0, True, None, "2", 2**16]),
            ("magnitude", [-1, 31, 9.0, True, None, "9"]),
        ],
    )
    def test_refusals(self, name: str, values: list[Any]) -> None:
        kinds = [RandAugment] if name in ("num_ops", "magnitude") else [RandAugment, TrivialAugmentWide]
        for kind, value in itertools.product(kinds, values):
            with pytest.raises(ValueError, match=f"^{name} "):
                kind(**{name: value})

    def test_magnitude_must_be_one_of_the_bins(self) -> None:
        assert RandAugment(magnitude=4, num_magnitude_bins=5).magnitude == 4
        with pytest.raises(ValueError, match=r"magnitude must be an integer in 0\.\.4"):
            RandAugment(magnitude=5, num_magnitude_bins=5)

    @pytest.mark.parametrize("operation", [RandAugment(1, fill=(1, 2, 3)), TrivialAugmentWide(fill=(1, 2, 3))])
    def test_a_fill_for_other_channels_is_refused_whatever_was_drawn(self, operation: Operation) -> None:
        with pytest.raises(ValueError, match=r"fill .* 1 channels, found \(1, 2, 3\)"):
            operation.apply(image_of(1, 8, 8, 0), (0, 0))

    def test_an_image_too_wide_for_an_int32_is_refused(self) -> None:
        assert drawn(RandAugment(20, 30), 1, 72_000, 20).min() < -(2**30)
        with pytest.raises(ValueError, match="longer edge must be at most 72000 pixels, found 72001"):
            drawn(RandAugment(), 1, 72_001, 20)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def boxes(height: int, width: int) -> st.SearchStrategy[list[int]]:
    """Any box of an image of this size, empty ones too."""
    corner = st.tuples(st.integers(0, height), st.integers(0, width))
    return corner.flatmap(
        lambda at: st.tuples(st.integers(0, height - at[0]), st.integers(0, width - at[1])).map(lambda by: [*at, *by])
    )


class TestRandomErasing:
    @given(seed=SEEDS, height=st.integers(1, 30), width=st.integers(1, 30), channels=st.sampled_from([1, 3, 4]))
    def test_pixels(self, seed: int, height: int, width: int, channels: int) -> None:
        image = image_of(channels, height, width, seed)
        for value in (0, 255, tuple(range(9, 9 + channels))):
            operation = RandomErasing(p=1.0, scale=(0.0, 1.0), value=value)
            transform = v2.RandomErasing(p=1.0, value=value)
            for top, left, box_h, box_w in drawn(operation, height, width, 12, seed).tolist():
                assert 0 <= top <= top + box_h <= height
                assert 0 <= left <= left + box_w <= width
                assert (box_h == 0) == (box_w == 0)
                assert box_h or (top, left) == (0, 0)
                params = {
                    "i": top,
                    "j": left,
                    "h": box_h,
                    "w": box_w,
                    "v": torch.tensor(transform.value)[:, None, None],
                }
                expected = transform.transform(image, params)
                assert torch.equal(operation.apply(image, (top, left, box_h, box_w)), expected)

    @pytest.mark.parametrize("device", DEVICES)
    @given(data=st.data(), height=st.integers(1, 12), width=st.integers(1, 12), each=st.booleans())
    def test_a_batch_is_its_samples(
        self, device: str, data: st.DataObject, height: int, width: int, each: bool
    ) -> None:
        params = np.array(data.draw(st.lists(boxes(height, width), max_size=6)), np.int32).reshape(-1, 4)
        images = image_of(len(params) * 3, height, width, 0).view(-1, 3, height, width)
        operation, before = RandomErasing(value=(1, 20, 200) if each else 7), images.clone()
        batch = operation.apply_batch(images.to(device), params)
        assert batch.device.type == device
        assert batch.dtype == torch.uint8
        assert operation.batched
        assert torch.equal(images, before)
        value = torch.tensor([1, 20, 200] if each else [7], dtype=torch.uint8, device=device).view(-1, 1, 1)
        assert torch.equal(masked(images.to(device), params, value), batch)
        for row, view in enumerate(batch.cpu()):
            assert torch.equal(view, operation.apply(images[row], tuple(params[row].tolist())))

    @pytest.mark.parametrize(
        ("height", "width", "scale", "ratio"),
        [
            (60, 80, (0.02, 0.33), (0.3, 3.3)),
            (6, 9, (0.02, 0.33), (0.3, 3.3)),
            (6, 40, (0.5, 1.0), (0.1, 0.9)),
            (10, 10, (0.0, 0.02), (0.3, 3.3)),
            (1, 9, (0.0, 0.5), (0.3, 3.3)),
        ],
    )
    def test_distribution(
        self, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
    ) -> None:
        """Small images by the whole box, large ones by its parts and their products."""
        image = torch.zeros((3, height, width), dtype=torch.uint8)
        transform = v2.RandomErasing(scale=scale, ratio=ratio)

        def draw() -> list[int]:
            params = transform.make_params([image])
            found = [int(params[name]) for name in "ijhw"]
            return found if params["v"] is not None and params["h"] and params["w"] else [0, 0, 0, 0]

        theirs = np.array(torchvision_draws(draw))
        ours = drawn(RandomErasing(p=1.0, scale=scale, ratio=ratio), height, width)
        assert_same_categories(map(tuple, ours.tolist()), map(tuple, theirs.tolist()))
        for measure in (
            *(lambda boxes, place=place: boxes[:, place] for place in range(4)),
            lambda boxes: boxes[:, 2] * boxes[:, 3],
            lambda boxes: boxes[:, 2] / np.maximum(boxes[:, 3], 1),
            lambda boxes: boxes[:, 0] / (height - boxes[:, 2]),
            lambda boxes: boxes[:, 1] / (width - boxes[:, 3]),
        ):
            assert_same_numbers(measure(ours), measure(theirs))
        quarters = [(2 * boxes[:, :2] + boxes[:, 2:]) // [height, width] for boxes in (ours, theirs)]
        assert_same_categories(*(map(tuple, quarter.tolist()) for quarter in quarters))

    @pytest.mark.parametrize("p", [0, 0.0, 0.2, 0.5, 1.0, 1])
    def test_probability(self, p: float) -> None:
        erased = drawn(RandomErasing(p=p))[:, 2] > 0
        assert abs(erased.mean() - p) <= 5 * (p * (1 - p) / COUNT) ** 0.5

    def test_the_chance_says_nothing_about_the_box(self) -> None:
        """The word that decides whether is not one of those that decide where."""
        some, every = drawn(RandomErasing(p=0.3)), drawn(RandomErasing(p=1.0), seed=8)
        for column in range(4):
            assert_same_numbers(some[some[:, 2] > 0, column], every[:, column])

    def test_a_box_as_high_or_wide_as_the_image_is_no_box(self) -> None:
        """torchvision tries for boxes that are smaller both ways, then leaves the image as it is."""
        assert not drawn(RandomErasing(p=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)), 30, 30, 300).any()
        assert not drawn(RandomErasing(p=1.0), 1, 1, 300).any()
        assert not drawn(RandomErasing(p=1.0, scale=(0.0, 0.0)), 30, 30, 300).any()

    @given(data=st.data(), height=st.integers(1, 40), width=st.integers(1, 40))
    def test_rescaled(self, data: st.DataObject, height: int, width: int) -> None:
        """Edges move with the image; there and back by a whole factor is where it was."""
        params = np.array(data.draw(st.lists(boxes(height, width), max_size=5)), np.int32).reshape(-1, 4)
        operation, size = RandomErasing(), (height, width)
        assert (operation.rescaled(params, size, size) == params).all()
        larger = operation.rescaled(params, size, (2 * height, 3 * width))
        assert larger.dtype == np.int32
        assert (larger == params * [2, 3, 2, 3]).all()
        assert (operation.rescaled(larger, (2 * height, 3 * width), size) == params).all()
        other = (data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60)))
        moved = operation.rescaled(params, size, other)
        for row, (top, left, box_h, box_w) in zip(moved.tolist(), params.tolist(), strict=True):
            edges = [row[0], row[1], row[0] + row[2], row[1] + row[3]]
            exact = [top * other[0] / height, left * other[1] / width]
            exact += [(top + box_h) * other[0] / height, (left + box_w) * other[1] / width]
            assert all(abs(edge - wish) <= 0.5 for edge, wish in zip(edges, exact, strict=True))
            assert all(box_h or not row[2] for _ in row)

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("p", [-0.1, 1.1, float("nan"), True, None, "0.5", (0.5,)]),
            (
                "scale",
                [(-0.1, 0.5), (0.5, 0.1), (0.1, 1.1), (0.1,), 0.5, None, (0.1, float("nan")), (False, 1), [0, 1]],
            ),
            ("ratio", [(0, 1), (2, 1), (-1, 1), (1,), 1.0, None, (1, float("inf")), (float("nan"), 1), (1, 10**400)]),
            ("value", [-1, 256, 0.0, 1.5, True, None, (), (1, 256), (1, 2.0), (True,), [1, 2, 3], "other", {}]),
        ],
    )
    def test_refusals(self, name: str, values: list[Any]) -> None:
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} "):
                RandomErasing(**{name: value})

    def test_random_noise_is_refused_with_a_reason(self) -> None:
        with pytest.raises(ValueError, match=r"value draws normal noise, for float images.*uint8.*give a level"):
            RandomErasing(value="random")  # type: ignore[arg-type]

    @pytest.mark.parametrize("channels", [1, 4])
    def test_a_value_for_other_channels_is_refused_whatever_was_drawn(self, channels: int) -> None:
        operation, nothing = RandomErasing(value=(1, 2, 3)), np.zeros((2, 4), np.int32)
        message = rf"value .* {channels} channels, found \(1, 2, 3\)"
        with pytest.raises(ValueError, match=message):
            operation.apply(image_of(channels, 4, 4, 0), (0, 0, 0, 0))
        with pytest.raises(ValueError, match=message):
            operation.apply_batch(image_of(2 * channels, 4, 4, 0).view(2, channels, 4, 4), nothing)
