"""A student's own input size: the same boxes, flips and shares from the same stored parameters, at another size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEEDS
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from teacher_cache.errors import SpecError
from teacher_cache.fingerprint import key_digests
from teacher_cache.loader import Decoded, ViewLoader
from teacher_cache.sources import Item
from teacher_cache.spec import ViewSpec
from teacher_cache.views import Views, open_recipe
from teacher_cache.views.operations import Params
from teacher_cache.views.parse import parse_recipe
from teacher_cache.views.recipe import Recipe
from teacher_cache.views.student_size import Resized, at_size

COUNT = 6
DIGESTS = key_digests([f"n01440764/{number}.jpg" for number in range(COUNT)])
EDGES = st.integers(1, 40)
PAIRS = st.tuples(EDGES, EDGES).filter(lambda size: size != (1, 1))
"""Not 1×1: torch 2.15's own kernel fails on that (see `test_views.py`)."""

Step = dict[str, Any] | str


def crop(size: Any = 224, **arguments: Any) -> Step:
    return {"random_resized_crop": {"size": size, **arguments}}


def recipe_of(*steps: Step, seed: int = 7) -> Recipe:
    return parse_recipe([{step: {}} if isinstance(step, str) else step for step in steps], seed)


def photos(seed: int = 0) -> list[Tensor]:
    """Of different sizes."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(0, 256, (3, *size), np.uint8)) for size in rng.integers(50, 120, (COUNT, 2))]


class Shown:
    """The views of some photos at the teacher's size, and from their stored parameters at a student's."""

    def __init__(self, recipe: Recipe, size: int | tuple[int, int], images: list[Tensor], view: int = 3) -> None:
        self.images, self.resized = images, at_size(recipe, size)
        self.names = recipe.param_names
        loader = ViewLoader(recipe, DIGESTS, lambda row: Item(images[row], 0))
        decoded = Decoded(np.arange(COUNT), images, np.zeros(COUNT, np.uint64), [])
        self.teacher: Views = loader.views(decoded, view)
        self.student: Views = loader.views_again(decoded, self.teacher.params_BP, self.resized)

    @property
    def partners(self) -> list[Tensor]:
        """The photo that each one is mixed with."""
        assert self.teacher.mixed is not None
        return [self.images[DIGESTS.tolist().index(digest)] for digest in self.teacher.mixed.partners_B.tolist()]

    def stored(self, prefix: str) -> Params:
        """The teacher's parameters whose names begin so."""
        return self._columns(prefix, self.teacher.params_BP)

    def converted(self, prefix: str) -> Params:
        """The student's."""
        return self._columns(prefix, self.student.params_BP)

    def _columns(self, prefix: str, params_BP: Params) -> Params:
        places = [place for place, name in enumerate(self.names) if name.startswith(prefix)]
        assert places, (prefix, self.names)
        return params_BP[:, places]


def cropped(image: Tensor, box: NDArray[Any], flip: int, size: tuple[int, int]) -> Tensor:
    """torchvision's crop of a stored box, at a size, then the stored flip."""
    top, left, height, width = box.tolist()
    view: Tensor = tv.resized_crop(image, top, left, height, width, list(size), antialias=True)
    return tv.horizontal_flip(view) if flip else view


def own_views(shown: Shown, size: tuple[int, int]) -> list[Tensor]:
    boxes, flips = shown.stored("0.random_resized_crop"), shown.stored("1.horizontal_flip")
    return [cropped(*each, size) for each in zip(shown.images, boxes, flips[:, 0].tolist(), strict=True)]


def partner_views(shown: Shown, size: tuple[int, int]) -> list[Tensor]:
    boxes, flips = shown.stored("partner.0.random_resized_crop"), shown.stored("partner.1.horizontal_flip")
    return [cropped(*each, size) for each in zip(shown.partners, boxes, flips[:, 0].tolist(), strict=True)]


def scaled(edges: Params, before: int, after: int) -> NDArray[np.int64]:
    """Positions on an edge of another length: within half a pixel of where they are, halves up."""
    nearest: NDArray[np.int64] = np.floor(edges * (after / before) + 0.5).astype(np.int64)
    assert (np.abs(nearest - edges * (after / before)) <= 0.5).all()
    return nearest


class TestSameShow:
    """What a student of 160 pixels sees is what the teacher of 224 pixels saw."""

    def test_crop_and_flip(self) -> None:
        shown = Shown(recipe_of(crop(), "horizontal_flip"), 160, photos())
        assert shown.teacher.pixels_BCHW.shape == (COUNT, 3, 224, 224)
        assert torch.equal(shown.teacher.pixels_BCHW, torch.stack(own_views(shown, (224, 224))))
        assert torch.equal(shown.student.pixels_BCHW, torch.stack(own_views(shown, (160, 160))))
        assert set(shown.stored("1.horizontal_flip")[:, 0].tolist()) == {0, 1}, "a test of nothing"
        assert (shown.student.params_BP == shown.teacher.params_BP).all()

    @settings(max_examples=25)
    @given(before=PAIRS, after=PAIRS, view=st.integers(0, 2**32 - 2))
    def test_any_sizes(self, before: tuple[int, int], after: tuple[int, int], view: int) -> None:
        """(height, width), smaller or larger, square or not; the integer kernel keeps its own pixels."""
        shown = Shown(recipe_of(crop(list(before)), "horizontal_flip"), after, photos(), view)
        assert (shown.resized.before, shown.resized.after, shown.resized.place) == (before, after, 0)
        assert torch.equal(shown.teacher.pixels_BCHW, torch.stack(own_views(shown, before)))
        assert torch.equal(shown.student.pixels_BCHW, torch.stack(own_views(shown, after)))
        integer = Shown(recipe_of(crop(list(before), kernel="integer"), "horizontal_flip"), after, photos(), view)
        assert (integer.student.params_BP == shown.student.params_BP).all()
        away = integer.student.pixels_BCHW.short() - shown.student.pixels_BCHW.short()
        assert away.abs().max() <= 2

    @settings(max_examples=25)
    @given(before=PAIRS, after=PAIRS)
    def test_resize_to_a_pair(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        """Not square, not of the image's shape."""
        shown = Shown(recipe_of({"resize": {"size": list(before)}}, {"horizontal_flip": {"p": 1.0}}), after, photos())
        for image, teacher, student in zip(
            shown.images, shown.teacher.pixels_BCHW, shown.student.pixels_BCHW, strict=True
        ):
            assert torch.equal(teacher, tv.horizontal_flip(tv.resize(image, list(before), antialias=True)))
            assert torch.equal(student, tv.horizontal_flip(tv.resize(image, list(after), antialias=True)))

    @pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
    @pytest.mark.parametrize("name", ["resize", "random_resized_crop"])
    def test_other_arguments_stay(self, name: str, mode: str) -> None:
        recipe = recipe_of({name: {"size": [20, 30], "interpolation": mode, "antialias": False}})
        ((step,), (resized,)) = recipe.describe(), at_size(recipe, (11, 12)).recipe.describe()
        assert resized == {name: {**step[name], "size": (11, 12)}}

    def test_one_number_is_both_edges(self) -> None:
        recipe = recipe_of(crop([20, 30]))
        assert at_size(recipe, 9) == at_size(recipe, (9, 9))

    def test_what_comes_before_the_sizing_operation_stays(self) -> None:
        """Pixels of the source are the same pixels for both; the last sizing operation is the one that counts."""
        before: list[Step] = [{"resize": {"size": 60}}, {"pad_crop": {"size": [70, 60], "padding": 8}}]
        middle: list[Step] = [{"resize": {"size": [48, 48]}}, {"center_crop": {"size": 40}}]
        shown = Shown(recipe_of(*before, *middle, crop([24, 32])), (13, 17), photos())
        assert shown.resized.place == 4
        assert (shown.student.params_BP == shown.teacher.params_BP).all()
        start = Shown(recipe_of(*before, *middle[:1]), (48, 48), photos()).teacher.pixels_BCHW
        boxes = shown.stored("4.random_resized_crop")
        expected = [
            cropped(tv.center_crop(image, [40]), box, 0, (13, 17)) for image, box in zip(start, boxes, strict=True)
        ]
        assert torch.equal(shown.student.pixels_BCHW, torch.stack(expected))


class TestLengthsAfterTheSize:
    """Boxes of the teacher's pixels are scaled; shares and flips are what they were."""

    @settings(max_examples=15)
    @given(before=PAIRS, after=PAIRS, seed=SEEDS)
    def test_mixup(self, before: tuple[int, int], after: tuple[int, int], seed: int) -> None:
        shown = Shown(recipe_of(crop(list(before)), "horizontal_flip", "mixup", seed=seed), after, photos(seed))
        assert (shown.student.params_BP == shown.teacher.params_BP).all()
        lams = torch.from_numpy(shown.stored("2.mixup.lam")).long()[:, :, None, None]
        own, others = (torch.stack(views(shown, after)).long() for views in (own_views, partner_views))
        expected = (own * lams + others * (2**16 - lams) + 2**15) >> 16
        assert torch.equal(shown.student.pixels_BCHW.long(), expected)
        assert shown.student.mixed is not None
        assert shown.teacher.mixed is not None
        assert (shown.student.mixed.partners_B == shown.teacher.mixed.partners_B).all()
        assert (shown.student.mixed.shares_B == shown.teacher.mixed.shares_B).all()

    @settings(max_examples=15)
    @given(before=PAIRS, after=PAIRS, seed=SEEDS)
    def test_cutmix(self, before: tuple[int, int], after: tuple[int, int], seed: int) -> None:
        shown = Shown(recipe_of(crop(list(before)), "horizontal_flip", "cutmix", seed=seed), after, photos(seed))
        boxes = shown.converted("2.cutmix.")[:, 3:]
        teachers = shown.stored("2.cutmix.")[:, 3:]
        for column, axis in enumerate((1, 0, 1, 0)):
            assert (boxes[:, column] == scaled(teachers[:, column], before[axis], after[axis])).all()
        lengths = np.stack([boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1)
        exact = np.stack([teachers[:, 3] - teachers[:, 1], teachers[:, 2] - teachers[:, 0]], axis=1)
        assert (np.abs(lengths - exact * np.array(after) / before) <= 1).all()
        own, others = own_views(shown, after), partner_views(shown, after)
        for place, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            own[place][:, y1:y2, x1:x2] = others[place][:, y1:y2, x1:x2]
        assert torch.equal(shown.student.pixels_BCHW, torch.stack(own))
        assert shown.student.mixed is not None
        assert np.allclose(shown.student.mixed.shares_B, 1 - lengths.prod(axis=1) / (after[0] * after[1]))
        assert (shown.converted("2.cutmix.partner_") == shown.stored("2.cutmix.partner_")).all()

    @settings(max_examples=15)
    @given(before=PAIRS, after=PAIRS, seed=SEEDS)
    def test_random_erasing(self, before: tuple[int, int], after: tuple[int, int], seed: int) -> None:
        erasing: Step = {"random_erasing": {"p": 0.8, "scale": [0.05, 0.5], "value": 99}}
        shown = Shown(recipe_of(crop(list(before)), "horizontal_flip", erasing, seed=seed), after, photos(seed))
        boxes, teachers = shown.converted("2.random_erasing"), shown.stored("2.random_erasing")
        self._assert_scaled(boxes, teachers, before, after)
        assert (shown.converted("1.") == shown.stored("1.")).all()
        expected = own_views(shown, after)
        for view, (top, left, height, width) in zip(expected, boxes.tolist(), strict=True):
            view[:, top : top + height, left : left + width] = 99
        assert torch.equal(shown.student.pixels_BCHW, torch.stack(expected))

    @pytest.mark.parametrize("mix", ["mixup", "cutmix"])
    def test_the_partners_boxes_too(self, mix: str) -> None:
        """What was erased in the partner's view before it was mixed in."""
        erasing: Step = {"random_erasing": {"p": 1.0, "scale": [0.3, 0.5]}}
        shown = Shown(recipe_of(crop([64, 48]), "horizontal_flip", erasing, mix), (31, 37), photos())
        for side in ("", "partner."):
            boxes, teachers = (part(f"{side}2.random_erasing") for part in (shown.converted, shown.stored))
            self._assert_scaled(boxes, teachers, (64, 48), (31, 37))
            assert (boxes != teachers).any()
            for same in ("0.random_resized_crop", "1.horizontal_flip"):
                assert (shown.converted(side + same) == shown.stored(side + same)).all()
        assert (shown.converted(f"3.{mix}.partner_") == shown.stored(f"3.{mix}.partner_")).all()

    @staticmethod
    def _assert_scaled(boxes: Params, teachers: Params, before: tuple[int, int], after: tuple[int, int]) -> None:
        """Near and far edges where they were; lengths within one pixel."""
        for axis in (0, 1):
            near, length = teachers[:, axis], teachers[:, 2 + axis]
            start, stop = (scaled(edge, before[axis], after[axis]) for edge in (near, near + length))
            assert (boxes[:, axis] == start).all()
            assert (boxes[:, 2 + axis] == stop - start).all()
            assert (np.abs(boxes[:, 2 + axis] - length * after[axis] / before[axis]) <= 1).all()

    def test_colours_have_no_size(self) -> None:
        jitter: Step = {"color_jitter": {"brightness": 0.4, "hue": 0.1}}
        shown = Shown(recipe_of(crop(24), jitter), 16, photos())
        assert (shown.student.params_BP == shown.teacher.params_BP).all()


class TestWhatIsLeftAsItWas:
    """Recipes are values: the student's is a new one."""

    STEPS: tuple[Step, ...] = (crop([64, 48]), "horizontal_flip", {"random_erasing": {"p": 1.0}}, "cutmix")

    def test_the_teachers_recipe(self) -> None:
        recipe, same = recipe_of(*self.STEPS), recipe_of(*self.STEPS)
        resized = at_size(recipe, 33)
        assert recipe == same
        assert (recipe.fingerprint, recipe.describe()) == (same.fingerprint, same.describe())
        assert resized.recipe.view_fingerprint != recipe.view_fingerprint
        assert (resized.recipe.param_names, resized.recipe.seed) == (recipe.param_names, recipe.seed)
        assert at_size(recipe, (64, 48)).recipe == recipe

    def test_stored_parameters(self) -> None:
        """Converted into new ones; at the teacher's size into equal ones; none at all are legal."""
        shown = Shown(recipe_of(*self.STEPS), 33, photos())
        params = shown.teacher.params_BP
        before = params.copy()
        converted = shown.resized.convert(params)
        assert (params == before).all()
        assert (converted != before).any()
        assert converted.dtype == np.int32
        converted[:] = -1
        assert (params == before).all()
        same: Resized = at_size(recipe_of(*self.STEPS), (64, 48))
        assert (same.convert(params) == before).all()
        assert shown.resized.convert(params[:0]).shape == (0, params.shape[1])

    def test_normalisation(self) -> None:
        normal: Step = {"normalize": {"mean": [0.5], "std": [0.25]}}
        recipe = recipe_of(crop(), normal)
        assert at_size(recipe, 160).recipe.normalize == recipe.normalize


class TestRefusals:
    """A recipe that counts the teacher's pixels is refused, and the message says which step and what to do."""

    @pytest.mark.parametrize(
        ("last", "name"),
        [
            ({"pad_crop": {"size": 224}}, "pad_crop"),
            ({"center_crop": {"size": 200}}, "center_crop"),
            ({"resize": {"size": 100}}, "resize"),
            ("rand_augment", "rand_augment"),
            ("trivial_augment", "trivial_augment"),
        ],
    )
    @pytest.mark.parametrize("first", [crop([224, 192]), {"resize": {"size": [224, 192]}}], ids=["crop", "resize"])
    def test_pixels_are_counted_after_the_size(self, first: Step, last: Step, name: str) -> None:
        for between in ([], ["horizontal_flip"]):
            with pytest.raises(SpecError, match=rf"\b{name} counts pixels of 224×192") as caught:
                at_size(recipe_of(first, *between, last, "mixup"), 160)
            assert caught.value.field == "size"
            assert "Move it before the operation that resizes" in str(caught.value)
            assert "train at the teacher's size" in str(caught.value)

    @pytest.mark.parametrize(
        "steps",
        [
            [],
            ["horizontal_flip"],
            [{"resize": {"size": 224}}],
            [{"resize": {"size": 256}}, {"center_crop": {"size": 224}}],
            [{"pad_crop": {"size": 32}}, "horizontal_flip"],
        ],
        ids=str,
    )
    def test_nothing_fixes_the_size(self, steps: list[Step]) -> None:
        with pytest.raises(SpecError, match="an operation that resizes to a fixed size") as caught:
            at_size(recipe_of(*steps), 160)
        assert caught.value.field == "size"
        assert "random_resized_crop, or resize to a pair (height, width)" in str(caught.value)

    def test_a_callable(self) -> None:
        recipe = open_recipe(ViewSpec(callable="toy_models:half_up", seed=1))
        with pytest.raises(SpecError, match="needs native operations") as caught:
            at_size(recipe, 160)
        assert caught.value.field == "size"
        assert "`seeded-global`" in str(caught.value)
        assert "use native operations, or the teacher's size" in str(caught.value)

    @pytest.mark.parametrize("size", [0, -1, (160, 0), (160,), True])
    def test_what_is_no_size(self, size: Any) -> None:
        with pytest.raises((SpecError, ValueError), match="size must be a positive integer"):
            at_size(recipe_of(crop()), size)
