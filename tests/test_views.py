"""Views: a pure function of identity; torchvision's pixels; drawn parameters in range and well spread."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from teacher_cache.errors import SpecError
from teacher_cache.fingerprint import key_digests
from teacher_cache.spec import NormalizeSpec, ViewSpec, parse
from teacher_cache.views import Recipe, normalize, open_recipe, render_views
from teacher_cache.views.operations import OPERATIONS
from teacher_cache.views.parse import parse_recipe
from teacher_cache.views.philox import Words

ALL_STEPS: list[dict[str, Any]] = [
    {"resize": {"size": 20}},
    {"center_crop": {"size": [20, 22]}},
    {"pad_crop": {"size": [18, 20], "padding": 3, "padding_mode": "reflect"}},
    {"horizontal_flip": {}},
    {"random_resized_crop": {"size": 16}},
    {"color_jitter": {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}},
    {"rand_augment": {}},
    {"trivial_augment": {}},
    {"random_erasing": {"p": 0.7}},
    {"normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}},
]


def recipe_of(*steps: Any, seed: int = 7, count: int = 5) -> Recipe:
    return open_recipe(ViewSpec.model_validate({"recipe": steps, "seed": seed, "count": count}))


def images_of(count: int, height: int = 24, width: int = 28, channels: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, height, width)
    return list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))


KEYS = [f"n01440764/{number}.jpg" for number in range(9)]
DIGESTS = key_digests(KEYS)


class TestIdentity:
    """The view of (recipe, seed, sample, view number) depends on nothing else."""

    @given(rows=st.lists(st.integers(0, 8), min_size=1, max_size=9), view=st.integers(0, 2**32 - 2))
    def test_any_order_any_batch(self, rows: list[int], view: int) -> None:
        recipe, images = recipe_of(*ALL_STEPS), images_of(9)
        together = render_views(recipe, [images[row] for row in rows], DIGESTS[rows], view)
        for place, row in enumerate(rows):
            alone = render_views(recipe, [images[row]], DIGESTS[[row]], view)
            assert torch.equal(alone.pixels_BCHW[0], together.pixels_BCHW[place])
            assert (alone.params_BP[0] == together.params_BP[place]).all()
            assert alone.digests()[0] == together.digests()[place]

    @given(order=st.permutations(range(9)), world=st.integers(1, 4), size=st.integers(1, 4))
    def test_any_world_size(self, order: list[int], world: int, size: int) -> None:
        """Rows dealt out to any number of ranks, each with its own batches: every row's view is the same."""
        recipe, images = recipe_of(*ALL_STEPS), images_of(9)
        whole = render_views(recipe, images, DIGESTS, 2).digests()
        for rank in range(world):
            mine = order[rank::world]
            for first in range(0, len(mine), size):
                rows = mine[first : first + size]
                views = render_views(recipe, [images[row] for row in rows], DIGESTS[rows], 2)
                assert (views.digests() == whole[rows]).all()

    def test_a_fresh_process_gives_the_same(self) -> None:
        """Only the recipe and the keys travel."""
        spec = ViewSpec.model_validate({"recipe": ALL_STEPS, "seed": 7, "count": 5})
        program = (
            "import sys, json, test_views as t; from teacher_cache.spec import ViewSpec\n"
            "from teacher_cache.views import open_recipe, render_views\n"
            "recipe = open_recipe(ViewSpec.model_validate(json.loads(sys.argv[1])))\n"
            "views = render_views(recipe, t.images_of(9), t.DIGESTS, 3)\n"
            "print(json.dumps([recipe.fingerprint, views.digests().tolist(), views.params_BP.tolist()]))"
        )
        command = [sys.executable, "-c", program, spec.model_dump_json()]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        recipe = open_recipe(spec)
        views = render_views(recipe, images_of(9), DIGESTS, 3)
        ours = [recipe.fingerprint, views.digests().tolist(), views.params_BP.tolist()]
        assert json.loads(answer) == ours

    def test_no_global_generator_is_touched_or_read(self) -> None:
        """Native operations leave torch, NumPy and random as they are, and do not depend on them."""
        recipe, found = recipe_of(*ALL_STEPS), []
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            states = (torch.get_rng_state(), str(np.random.get_state()), random.getstate())
            found.append(render_views(recipe, images_of(9), DIGESTS, 1).pixels_BCHW)
            assert torch.equal(torch.get_rng_state(), states[0])
            assert str(np.random.get_state()) == states[1]
            assert random.getstate() == states[2]
        assert torch.equal(*found)

    def test_samples_views_and_seeds_differ(self) -> None:
        """Among 9 samples × 5 views × 2 seeds of large crops, no two resolve alike."""
        size = np.full((9, 2), 500)
        recipes = [recipe_of({"random_resized_crop": {"size": 8}}, seed=seed) for seed in (7, 8)]
        params = [recipe.draw(DIGESTS, size, view).params_BP for recipe in recipes for view in range(5)]
        drawn = {tuple(row) for part in params for row in part.tolist()}
        assert len(drawn) == 90

    def test_the_source_image_stays_as_it_was(self) -> None:
        """Rendering never writes into what the source gave."""
        images = images_of(2)
        before = [image.clone() for image in images]
        views = render_views(recipe_of({"horizontal_flip": {"p": 0.0}}), images, DIGESTS[:2], 0)
        views.pixels_BCHW.zero_()
        assert all(torch.equal(*pair) for pair in zip(images, before, strict=True))

    def test_a_later_operation_has_its_own_words(self) -> None:
        """Two equal operations in one recipe draw differently: the place is part of the address."""
        recipe = recipe_of({"pad_crop": {"size": 24, "padding": 40}}, {"pad_crop": {"size": 24, "padding": 40}})
        params = recipe.draw(DIGESTS, np.full((9, 2), 24), 0).params_BP
        assert (params[:, :2] != params[:, 2:]).any(axis=1).all()


class TestFingerprint:
    """Any change of the recipe changes it; nothing else does."""

    def test_every_parameter_of_every_operation(self) -> None:
        others = {
            "resize": {"size": 21, "interpolation": "bicubic", "antialias": False},
            "center_crop": {"size": 20},
            "pad_crop": {"size": 18, "padding": 4, "fill": 1, "padding_mode": "edge"},
            "horizontal_flip": {"p": 0.25},
            "random_resized_crop": {
                "size": 15,
                "scale": [0.1, 1.0],
                "ratio": [0.5, 2.0],
                "interpolation": "nearest",
                "antialias": False,
            },
            "color_jitter": {"brightness": 0.5, "contrast": None, "saturation": [0.7, 1.2], "hue": 0.2},
            "rand_augment": {
                "num_ops": 3,
                "magnitude": 8,
                "num_magnitude_bins": 30,
                "interpolation": "bilinear",
                "fill": 3,
            },
            "trivial_augment": {"num_magnitude_bins": 30, "interpolation": "bilinear", "fill": 3},
            "random_erasing": {"p": 0.6, "scale": [0.1, 0.3], "ratio": [0.5, 2.0], "value": 7},
            "mixup": {"alpha": 0.5},
            "cutmix": {"alpha": 0.5},
            "normalize": {"mean": [0.5, 0.4, 0.2], "std": [0.2, 0.2, 0.2]},
        }
        assert set(others) == {*OPERATIONS, "normalize"}, "a new operation needs a line here"
        for operation in OPERATIONS.values():
            arguments = {field.name for field in dataclasses.fields(operation)}  # type: ignore[arg-type]
            name = next(name for name, kind in OPERATIONS.items() if kind is operation)
            assert set(others[name]) | {"kernel"} >= arguments, f"an argument of {name} has no line here"
        every = [*ALL_STEPS[:-1], {"mixup": {}}, ALL_STEPS[-1]]
        bases = [every, [*every[:-2], {"cutmix": {}}, every[-1]]]
        seen = {recipe_of(*base).fingerprint for base in bases}
        for base in bases:
            for place, step in enumerate(base):
                ((name, given_),) = step.items()
                for key, value in others[name].items():
                    changed = {name: {**given_, key: value}}
                    seen.add(recipe_of(*base[:place], changed, *base[place + 1 :]).fingerprint)
        everywhere = sum(len(values) for name, values in others.items() if name not in ("mixup", "cutmix"))
        assert len(seen) == 2 * (1 + everywhere + 1)
        plain, integer = ({"random_resized_crop": {"size": 9, "kernel": kind}} for kind in ("torchvision", "integer"))
        assert recipe_of(plain).fingerprint != recipe_of(integer).fingerprint

    def test_an_argument_that_was_added_later_changes_no_older_name(self) -> None:
        """Frozen: recipes of the first release keep their fingerprints."""
        recipe = recipe_of({"random_resized_crop": {"size": 9}}, {"horizontal_flip": {}})
        assert recipe.fingerprint == "c4d5150b3b30805f09700f03f182233b"

    def test_order_seed_and_length(self) -> None:
        flip, crop = {"horizontal_flip": {}}, {"pad_crop": {"size": 24}}
        recipes = [
            recipe_of(flip, crop),
            recipe_of(crop, flip),
            recipe_of(crop),
            recipe_of(crop, flip, seed=8),
            recipe_of(crop, flip, {"normalize": {"mean": [0.5], "std": [0.5]}}),
        ]
        assert len({recipe.fingerprint for recipe in recipes}) == 5

    def test_defaults_written_out_are_the_same_recipe(self) -> None:
        """What is drawn and rendered is named, not how the YAML was written."""
        short, long = recipe_of("horizontal_flip"), recipe_of({"horizontal_flip": {"p": 0.5}})
        assert short.fingerprint == long.fingerprint
        again = recipe_of(*recipe_of(*ALL_STEPS).describe())  # type: ignore[misc]
        assert again.fingerprint == recipe_of(*ALL_STEPS).fingerprint

    def test_a_number_is_the_same_however_it_is_written(self) -> None:
        """1 is 1.0 in a YAML file: a cosmetic edit must not refuse to go on."""
        one = recipe_of({"random_resized_crop": {"size": 8, "scale": [0.08, 1]}}, {"horizontal_flip": {"p": 1}})
        other = recipe_of({"random_resized_crop": {"size": 8}}, {"horizontal_flip": {"p": 1.0}})
        assert one.fingerprint == other.fingerprint

    def test_normalisation_is_no_part_of_the_view(self) -> None:
        """`view_fingerprint` is what teacher and student share; each may normalise for itself."""
        plain, normal = recipe_of(*ALL_STEPS[:-1]), recipe_of(*ALL_STEPS)
        assert plain.view_fingerprint == normal.view_fingerprint
        assert plain.fingerprint != normal.fingerprint
        assert recipe_of(*ALL_STEPS[1:]).view_fingerprint != normal.view_fingerprint


class TestPixels:
    """Equal to torchvision's own functional calls for equal parameters."""

    @given(seed=SEEDS, height=st.integers(9, 40), width=st.integers(9, 40), padding=st.integers(0, 8))
    def test_pad_crop(self, seed: int, height: int, width: int, padding: int) -> None:
        (image,) = images_of(1, height, width, seed=seed)
        for mode in ("constant", "edge", "reflect", "symmetric"):
            step = {"pad_crop": {"size": 9, "padding": padding, "fill": 7, "padding_mode": mode}}
            views = render_views(recipe_of(step), [image], DIGESTS[:1], seed)
            top, left = views.params_BP[0].tolist()
            assert 0 <= top <= height + 2 * padding - 9
            assert 0 <= left <= width + 2 * padding - 9
            padded = tv.pad(image, [padding], fill=7, padding_mode=mode)
            assert torch.equal(views.pixels_BCHW[0], tv.crop(padded, top, left, 9, 9))

    @given(seed=SEEDS, width=st.integers(1, 9))
    def test_horizontal_flip(self, seed: int, width: int) -> None:
        (image,) = images_of(1, 5, width, seed=seed)
        views = render_views(recipe_of("horizontal_flip"), [image], DIGESTS[:1], seed)
        (flip,) = views.params_BP[0].tolist()
        assert flip in (0, 1)
        assert torch.equal(views.pixels_BCHW[0], tv.horizontal_flip(image) if flip else image)

    @given(
        seed=SEEDS,
        height=st.integers(1, 40),
        width=st.integers(1, 40),
        # Not 1×1: torch 2.15's own kernel fails on that (an internal assertion about channels-last).
        size=st.one_of(st.integers(2, 20), st.tuples(st.integers(2, 20), st.integers(1, 20))),
        mode=st.sampled_from(["nearest", "bilinear", "bicubic"]),
        antialias=st.booleans(),
    )
    def test_resize(self, seed: int, height: int, width: int, size: Any, mode: str, antialias: bool) -> None:
        (image,) = images_of(1, height, width, seed=seed)
        step = {"resize": {"size": size, "interpolation": mode, "antialias": antialias}}
        views = render_views(recipe_of(step, count=1), [image], DIGESTS[:1], 0)
        transform = v2.Resize(size, interpolation=InterpolationMode(mode), antialias=antialias)
        assert torch.equal(views.pixels_BCHW[0], transform(image))

    @given(seed=SEEDS, height=st.integers(1, 20), width=st.integers(1, 20), size=st.integers(1, 24))
    def test_center_crop(self, seed: int, height: int, width: int, size: int) -> None:
        (image,) = images_of(1, height, width, seed=seed)
        views = render_views(recipe_of({"center_crop": {"size": size}}, count=1), [image], DIGESTS[:1], 0)
        assert torch.equal(views.pixels_BCHW[0], v2.CenterCrop(size)(image))

    @given(seed=SEEDS, height=st.integers(1, 40), width=st.integers(1, 40), low=st.floats(0.01, 1))
    def test_random_resized_crop(self, seed: int, height: int, width: int, low: float) -> None:
        (image,) = images_of(1, height, width, seed=seed)
        step = {"random_resized_crop": {"size": [11, 13], "scale": [low, 1.0]}}
        views = render_views(recipe_of(step), [image], DIGESTS[:1], seed)
        top, left, crop_h, crop_w = views.params_BP[0].tolist()
        assert 0 <= top <= top + crop_h <= height
        assert 0 <= left <= left + crop_w <= width
        assert crop_h > 0
        assert crop_w > 0
        expected = tv.resized_crop(image, top, left, crop_h, crop_w, [11, 13], antialias=True)
        assert torch.equal(views.pixels_BCHW[0], expected)

    @given(seed=SEEDS, channels=st.sampled_from([1, 3]))
    def test_normalize(self, seed: int, channels: int) -> None:
        """Division by 255 (as `ToTensor`; v2 multiplies by 1/255, one last bit away), then tv's `normalize`."""
        images = torch.stack(images_of(3, 5, 6, channels, seed))
        spec = NormalizeSpec(mean=(0.485, 0.456, 0.406)[:channels], std=(0.229, 0.224, 0.225)[:channels])
        scaled = images.float().div(255)
        assert torch.equal(normalize(images, None), scaled)
        assert torch.allclose(scaled, tv.to_dtype(images, torch.float32, scale=True), rtol=1e-6, atol=0)
        expected = tv.normalize(scaled, list(spec.mean), list(spec.std))
        assert torch.equal(normalize(images, spec), expected)

    def test_normalize_refuses_other_channels(self) -> None:
        spec = NormalizeSpec(mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
        with pytest.raises(SpecError, match="1 channels"):
            normalize(torch.zeros((2, 1, 4, 4), dtype=torch.uint8), spec)


@given(
    seed=SEEDS,
    height=st.integers(8, 70),
    width=st.integers(8, 70),
    step=st.sampled_from(
        [
            {"resize": {"size": 9}},
            {"resize": {"size": [9, 5]}},
            {"center_crop": {"size": [30, 3]}},
            {"pad_crop": {"size": [8, 10], "padding": 1}},
            {"horizontal_flip": {}},
            {"random_resized_crop": {"size": [4, 6]}},
        ]
    ),
)
def test_output_sizes_tell_the_truth(seed: int, height: int, width: int, step: dict[str, Any]) -> None:
    """What an operation announces is what it gives: the next operation draws from it."""
    (operation,) = parse_recipe([step], 0).operations
    sizes = np.array([[height, width]])
    params = operation.draw(Words(DIGESTS[:1], 0, 0, seed), sizes)
    assert params.dtype == np.int32
    assert params.shape == (1, len(operation.params))
    (image,) = images_of(1, height, width)
    view = operation.apply(image, tuple(params[0].tolist()))
    assert operation.output_sizes(sizes).tolist() == [list(view.shape[1:])]
    assert view.dtype == torch.uint8


class TestDistribution:
    """Loosely torchvision's own, by histogram over the same number of draws."""

    COUNT = 6000

    def _close(self, ours: Any, theirs: Any, bins: int) -> None:
        ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
        edges = np.linspace(min(ours.min(), theirs.min()), max(ours.max(), theirs.max()) + 1e-9, bins + 1)
        one, other = (np.histogram(values, edges)[0] / len(values) for values in (ours, theirs))
        assert np.abs(one - other).sum() / 2 < 0.06, (one, other)

    def _params(self, step: dict[str, Any], height: int, width: int) -> Any:
        digests = key_digests([str(number) for number in range(self.COUNT)])
        return recipe_of(step).draw(digests, np.tile([height, width], (self.COUNT, 1)), 3).params_BP

    def test_random_resized_crop(self) -> None:
        ours = self._params({"random_resized_crop": {"size": 8}}, 60, 80)
        transform, image = v2.RandomResizedCrop(8), torch.zeros((3, 60, 80), dtype=torch.uint8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drawn = [transform.make_params([image]) for _ in range(self.COUNT)]
        for column, name in enumerate(("top", "left", "height", "width")):
            self._close(ours[:, column], [params[name] for params in drawn], 12)
        area = [params["height"] * params["width"] for params in drawn]
        self._close(ours[:, 2] * ours[:, 3], area, 12)
        self._close(ours[:, 3] / ours[:, 2], [params["width"] / params["height"] for params in drawn], 12)

    def test_random_resized_crop_falls_back_to_the_middle(self) -> None:
        """Where ten tries do not fit, torchvision takes the largest central crop within the ratio."""
        wide, tall = (4, 100), (100, 4)
        for height, width in (wide, tall):
            ours = self._params({"random_resized_crop": {"size": 8, "scale": [0.9, 1.0]}}, height, width)
            transform = v2.RandomResizedCrop(8, scale=(0.9, 1.0))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                params = transform.make_params([torch.zeros((3, height, width), dtype=torch.uint8)])
            expected = [params[name] for name in ("top", "left", "height", "width")]
            assert (ours == np.array(expected)).all()

    def test_pad_crop_is_even(self) -> None:
        ours = self._params({"pad_crop": {"size": 32, "padding": 4}}, 32, 32)
        for column in (0, 1):
            counts = np.bincount(ours[:, column], minlength=9)
            assert len(counts) == 9
            assert (np.abs(counts / self.COUNT - 1 / 9) < 0.02).all()
        assert abs(np.corrcoef(ours[:, 0], ours[:, 1])[0, 1]) < 0.05

    @pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
    def test_horizontal_flip_has_its_probability(self, p: float) -> None:
        ours = self._params({"horizontal_flip": {"p": p}}, 8, 8)
        assert abs(ours.mean() - p) <= (0.02 if 0 < p < 1 else 0)


class TestRefusals:
    """A recipe that cannot be is a `SpecError` that names the step."""

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            ({"rotate": {}}, "not a known operation"),
            ({"resize": {}}, "size"),
            ({"resize": {"size": 0}}, "positive"),
            ({"resize": {"size": 8, "interpolation": "lanczos"}}, "interpolation"),
            ({"resize": {"size": 8, "colour": 1}}, "colour"),
            ({"pad_crop": {"size": 8, "padding": -1}}, "padding"),
            ({"pad_crop": {"size": 8, "fill": 256}}, "fill"),
            ({"pad_crop": {"size": 8, "padding_mode": "wrap"}}, "padding_mode"),
            ({"horizontal_flip": {"p": 1.5}}, "p must be"),
            ({"random_resized_crop": {"size": 8, "scale": [0.5, 0.1]}}, "scale"),
            ({"random_resized_crop": {"size": 8, "ratio": [0, 1]}}, "ratio"),
            ({"random_resized_crop": {"size": 8, "scale": [0.5]}}, "scale"),
            ({"random_resized_crop": {"size": 8, "scale": 0.5}}, "scale"),
            ({"normalize": {"mean": [0.5], "std": [0]}}, "std"),
            ({"resize": {"size": 8, "antialias": "no"}}, "antialias must be true or false"),
            ({"random_resized_crop": {"size": 8, "antialias": 1}}, "antialias must be true or false"),
            ({"random_resized_crop": {"size": 8, "kernel": "fast"}}, "kernel"),
            ({"random_resized_crop": {"size": 8, "kernel": "integer", "interpolation": "bicubic"}}, "bilinear"),
            ({"horizontal_flip": {"p": "0.5"}}, "p must be"),
            ({"horizontal_flip": {"p": True}}, "p must be"),
            ({"pad_crop": {"size": 8, "fill": 1.5}}, "fill"),
            ({"pad_crop": {"size": 8, "fill": [1, 2, 3]}}, "fill"),
            ({"pad_crop": {"size": 8, "padding": True}}, "padding"),
            ({"random_resized_crop": {"size": 8, "ratio": [1, 10**400]}}, "ratio"),
        ],
    )
    def test_bad_steps(self, step: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message) as caught:
            recipe_of(step)
        assert caught.value.field.startswith("views.recipe.0")
        assert caught.value.exit_code == 2

    @given(
        name=st.sampled_from(sorted(OPERATIONS)),
        arguments=st.dictionaries(
            st.sampled_from(["size", "scale", "ratio", "p", "padding", "fill", "antialias", "interpolation"]),
            st.recursive(
                st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-2, 2) | st.text(max_size=3),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=4,
            ),
        ),
    )
    def test_whatever_is_written_is_a_recipe_or_a_spec_error(self, name: str, arguments: Any) -> None:
        """No value of a YAML file raises anything else."""
        try:
            recipe = recipe_of({name: arguments}, count=1)
        except SpecError:
            return
        assert len(recipe.operations) == 1

    def test_steps_that_are_no_steps(self) -> None:
        with pytest.raises(SpecError, match=r"one \{name: parameters\}"):
            recipe_of({"resize": {"size": 1}, "center_crop": {"size": 1}})
        with pytest.raises(SpecError, match="nothing may follow"):
            recipe_of({"normalize": {"mean": [0.5], "std": [1]}}, "horizontal_flip")
        with pytest.raises(SpecError, match="exactly one of"):
            parse(ViewSpec, {"recipe": [], "callable": "toy_models:half_up"}, "test")
        with pytest.raises(SpecError, match="exactly one of"):
            parse(ViewSpec, {"seed": 1}, "test")

    def test_equal_views_are_not_built_twice(self) -> None:
        """More than one view of a recipe in which nothing is random is a mistake."""
        with pytest.raises(SpecError, match=r"views\.count"):
            recipe_of({"resize": {"size": 8}}, count=2)
        assert not recipe_of({"resize": {"size": 8}}, count=1).random

    def test_padding_beyond_the_image(self) -> None:
        """torchvision's own refusals, of whatever class, become one that names the recipe."""
        step = {"pad_crop": {"size": 8, "padding": 9, "padding_mode": "symmetric"}}
        with pytest.raises(SpecError, match=r"views\.recipe: cannot be rendered"):
            render_views(recipe_of(step), images_of(1, 8, 8), DIGESTS[:1], 0)

    @pytest.mark.parametrize("kernel", ["torchvision", "integer"])
    def test_a_ratio_that_no_pixel_fits(self, kernel: str) -> None:
        """The box is never empty."""
        step = {"random_resized_crop": {"size": 4, "ratio": [0.01, 0.02], "kernel": kernel}}
        views = render_views(recipe_of(step), images_of(3, 8, 8), DIGESTS[:3], 0)
        assert (views.params_BP[:, 2:] > 0).all()

    def test_views_of_different_shapes_make_no_batch(self) -> None:
        images = [*images_of(1, 8, 8), *images_of(1, 9, 8)]
        with pytest.raises(SpecError, match="one shape"):
            render_views(recipe_of("horizontal_flip"), images, DIGESTS[:2], 0)

    def test_a_crop_that_does_not_fit_says_so(self) -> None:
        with pytest.raises(SpecError, match="fit into the padded image"):
            render_views(recipe_of({"pad_crop": {"size": 30, "padding": 2}}), images_of(1), DIGESTS[:1], 0)


class TestSeededGlobal:
    """The user's own callable, under the weaker promise."""

    def _recipe(self, reference: str = "toy_models:half_up", seed: int = 3) -> Recipe:
        return open_recipe(ViewSpec(callable=reference, seed=seed, count=3))

    def test_repeats_in_any_order_and_differs_between_samples(self) -> None:
        recipe, images = self._recipe(), images_of(4)
        first = render_views(recipe, images, DIGESTS[:4], 1)
        torch.manual_seed(99)
        again = render_views(recipe, images[::-1], DIGESTS[:4][::-1], 1)
        assert torch.equal(first.pixels_BCHW, again.pixels_BCHW.flip(0))
        other = render_views(recipe, images, DIGESTS[:4], 2)
        assert len({*first.digests().tolist(), *other.digests().tolist()}) == 8
        assert not torch.equal(
            render_views(self._recipe(seed=4), images, DIGESTS[:4], 1).pixels_BCHW, first.pixels_BCHW
        )

    def test_the_global_generator_is_put_back(self) -> None:
        state = torch.get_rng_state()
        render_views(self._recipe(), images_of(2), DIGESTS[:2], 0)
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(SpecError):
            render_views(self._recipe("toy_models:as_float"), images_of(1), DIGESTS[:1], 0)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_stored_parameter_is_the_seed(self) -> None:
        """`generator_seed` alone re-creates the view: seed torch with it, call the callable."""
        import toy_models

        (image,) = images_of(1)
        views = render_views(self._recipe(), [image], DIGESTS[:1], 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(views.params_BP[0, 0]) & 0xFFFFFFFF)
            assert torch.equal(toy_models.half_up(image), views.pixels_BCHW[0])

    def test_floats_are_refused(self) -> None:
        with pytest.raises(SpecError, match=r"uint8 tensor \[C, H, W\].*float32"):
            render_views(self._recipe("toy_models:as_float"), images_of(1), DIGESTS[:1], 0)

    def test_a_torchvision_transform_may_be_named(self) -> None:
        """A v2 transform that is an instance or a functional; versions are in the fingerprint."""
        recipe = self._recipe("torchvision.transforms.v2.functional:horizontal_flip")
        (image,) = images_of(1)
        assert torch.equal(render_views(recipe, [image], DIGESTS[:1], 0).pixels_BCHW[0], image.flip(-1))
        described = recipe.describe()
        assert isinstance(described, dict)
        assert described["torch"] == torch.__version__
        assert recipe.fingerprint != self._recipe().fingerprint
        assert self._recipe(seed=4).fingerprint != self._recipe().fingerprint

    def test_a_whole_pipeline_is_seeded_the_cheap_way(self) -> None:
        """Any torchvision v2 pipeline: what `manual_seed` with the stored number gives, and no `fork_rng`."""
        import toy_models

        images = images_of(3)
        views = render_views(self._recipe("toy_models:PIPELINE"), images, DIGESTS[:3], 2)
        for image, seed, view in zip(images, views.params_BP[:, 0].tolist(), views.pixels_BCHW, strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed & 0xFFFFFFFF)
                assert torch.equal(toy_models.PIPELINE(image), view)

    def test_a_transform_in_place_does_not_reach_the_decoded_image(self) -> None:
        """Several views are made from one decoding."""
        recipe, images = self._recipe("toy_models:in_place"), images_of(3)
        first = render_views(recipe, images, DIGESTS[:3], 0)
        render_views(recipe, images, DIGESTS[:3], 1)
        assert torch.equal(first.pixels_BCHW, render_views(recipe, images, DIGESTS[:3], 0).pixels_BCHW)
        assert all(torch.equal(*pair) for pair in zip(images, images_of(3), strict=True))

    def test_whatever_a_callable_raises_names_it(self) -> None:
        with pytest.raises(SpecError, match=r"toy_models:wants_a_picture: raised AttributeError.*uint8 tensor"):
            render_views(self._recipe("toy_models:wants_a_picture"), images_of(1), DIGESTS[:1], 0)

    @pytest.mark.parametrize(
        "reference", ["half_up", "toy_models:", "toy_models:missing", "no_module_of_this_name:x", "math:pi"]
    )
    def test_what_is_no_callable_is_refused(self, reference: str) -> None:
        with pytest.raises(SpecError):
            self._recipe(reference)


def test_parameters_of_a_callable_are_in_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """One name, another parameter: other views. Addresses are left out: they change from process to process."""
    import toy_models

    spec = ViewSpec(callable="toy_models:SHIFT_ONE")
    one = open_recipe(spec)
    before = one.view_fingerprint
    assert " at 0x" not in str(one.describe())
    monkeypatch.setattr(toy_models, "SHIFT_ONE", toy_models.SHIFT_TWO)
    assert open_recipe(spec).view_fingerprint != before


class TestOtherImages:
    """Views are uint8 with any number of channels; operations that need colours say so before anything is drawn."""

    @given(channels=st.sampled_from([1, 2, 4, 7]), seed=SEEDS)
    def test_any_number_of_channels(self, channels: int, seed: int) -> None:
        geometric = [*ALL_STEPS[:5], {"random_erasing": {}}]
        images = images_of(3, channels=channels, seed=seed)
        views = render_views(recipe_of(*geometric), images, DIGESTS[:3], 1)
        assert views.pixels_BCHW.shape == (3, channels, 16, 16)
        for channel in range(channels):
            alone = render_views(
                recipe_of(*geometric), [image[channel : channel + 1] for image in images], DIGESTS[:3], 1
            )
            assert torch.equal(alone.pixels_BCHW[:, 0], views.pixels_BCHW[:, channel])

    @pytest.mark.parametrize("step", ["color_jitter", "rand_augment", "trivial_augment"])
    @pytest.mark.parametrize("channels", [2, 4])
    def test_colours_need_one_or_three(self, step: str, channels: int) -> None:
        with pytest.raises(SpecError, match=f"channels must be 1 or 3.*found {channels}"):
            render_views(recipe_of(step), images_of(1, channels=channels), DIGESTS[:1], 0)
        assert len(render_views(recipe_of(step), images_of(2, channels=1), DIGESTS[:2], 0).pixels_BCHW) == 2
