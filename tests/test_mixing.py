"""Mixing: partner, its view and the share come from a sample's own address, for any batch and any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from strategies import SEEDS
from torch import Tensor
from torchvision.transforms import v2
from toy_builds import CLASSES, ROWS, expected_logits, numpy_source, toy_spec, tree

import teacher_cache as tc
from student_train import Answer, CrossEntropy, ViewStream
from student_train.data import LabelledRows
from student_train.stream import Batch
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.fingerprint import key_digests
from teacher_cache.spec import NumpySource, ViewSpec
from teacher_cache.views import How, Pool, Recipe, Views, open_recipe, render_again, render_views
from teacher_cache.views.operations import CutMix, Mix, MixUp

COUNT = 11
KEYS = [f"sample {number}" for number in range(COUNT)]
DIGESTS = key_digests(KEYS)
PLAIN: list[dict[str, Any]] = [{"pad_crop": {"size": 24, "padding": 3}}, {"horizontal_flip": {}}]
MIXES: list[dict[str, Any]] = [{"mixup": {"alpha": 0.4}}, {"cutmix": {}}]
MIX = pytest.mark.parametrize("mix", MIXES, ids=["mixup", "cutmix"])


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, 256, (COUNT, 3, 24, 24), dtype=torch.uint8, generator=generator))


IMAGES = images()


def recipe_of(*steps: dict[str, Any]) -> Recipe:
    return open_recipe(ViewSpec.model_validate({"recipe": steps, "seed": 5, "count": 4}))


def pool_of(order: Sequence[int] = range(COUNT), broken: Sequence[int] = ()) -> Pool:
    """The plan, listed in some order; some samples cannot be decoded."""
    return Pool(DIGESTS[list(order)], lambda row: None if order[row] in broken else IMAGES[order[row]])


def views_of(recipe: Recipe, rows: Sequence[int], view: int = 1, pool: Pool | None = None) -> Views:
    return render_views(recipe, [IMAGES[row] for row in rows], DIGESTS[list(rows)], view, pool or pool_of())


def partners(views: Views) -> NDArray[np.uint64]:
    assert views.mixed is not None
    return views.mixed.partners_B


class TestIdentity:
    """Nothing but recipe, sample, view number and the set of keys decides."""

    @MIX
    @given(rows=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=9), view=st.integers(0, 2**32 - 2))
    def test_any_order_any_batch(self, mix: dict[str, Any], rows: list[int], view: int) -> None:
        recipe = recipe_of(*PLAIN, mix, {"horizontal_flip": {}})
        together = views_of(recipe, rows, view)
        assert together.mixed is not None
        for place, row in enumerate(rows):
            alone = views_of(recipe, [row], view)
            assert alone.mixed is not None
            assert torch.equal(alone.pixels_BCHW[0], together.pixels_BCHW[place])
            assert (alone.params_BP[0] == together.params_BP[place]).all()
            assert alone.mixed.partners_B[0] == together.mixed.partners_B[place]
            assert alone.mixed.shares_B[0] == together.mixed.shares_B[place]

    @MIX
    @given(order=st.permutations(range(COUNT)))
    def test_the_order_of_the_source_does_not_matter(self, mix: dict[str, Any], order: list[int]) -> None:
        recipe = recipe_of(*PLAIN, mix)
        ours, theirs = views_of(recipe, range(COUNT)), views_of(recipe, range(COUNT), pool=pool_of(order))
        assert torch.equal(ours.pixels_BCHW, theirs.pixels_BCHW)

    @MIX
    def test_stored_parameters_are_enough(self, mix: dict[str, Any]) -> None:
        """Partner and its own crop are stored too: nothing is drawn again."""
        recipe = recipe_of(*PLAIN, mix, {"horizontal_flip": {}})
        drawn = views_of(recipe, range(COUNT))
        again = render_again(recipe, IMAGES, drawn.params_BP, pool_of())
        assert torch.equal(drawn.pixels_BCHW, again.pixels_BCHW)
        assert (partners(drawn) == partners(again)).all()
        slow = render_views(recipe, IMAGES, DIGESTS, 1, pool_of(), How(batched=False))
        assert torch.equal(drawn.pixels_BCHW, slow.pixels_BCHW)

    def test_partner_and_its_view_are_what_the_names_say(self) -> None:
        """The stored partner view is rendered like any view of that sample, by the operations before."""
        recipe = recipe_of(*PLAIN, {"cutmix": {}})
        views = views_of(recipe, range(COUNT))
        names = list(recipe.param_names)
        assert names[3:6] == ["2.cutmix.partner_low", "2.cutmix.partner_high", "2.cutmix.partner_view"]
        assert names[6:9] == [f"partner.{name}" for name in names[:3]]
        for row in range(COUNT):
            params = dict(zip(names, views.params_BP[row].tolist(), strict=True))
            partner = DIGESTS.tolist().index(partners(views)[row])
            number = params["2.cutmix.partner_view"] & 0xFFFFFFFF
            theirs = views_of(recipe_of(*PLAIN), [partner], number).pixels_BCHW[0]
            own = views_of(recipe_of(*PLAIN), [row]).pixels_BCHW[0]
            x1, y1, x2, y2 = (params[f"2.cutmix.{edge}"] for edge in ("x1", "y1", "x2", "y2"))
            own[:, y1:y2, x1:x2] = theirs[:, y1:y2, x1:x2]
            assert torch.equal(views.pixels_BCHW[row], own)

    def test_no_sample_is_its_own_partner_and_all_others_are_equally_likely(self) -> None:
        pool, count = pool_of(), 4000
        recipe = recipe_of({"mixup": {}})
        tall = np.zeros(COUNT, np.int64)
        for view in range(count // COUNT):
            found = partners(views_of(recipe, range(COUNT), view, pool))
            assert (found != DIGESTS).all()
            tall += np.bincount([DIGESTS.tolist().index(digest) for digest in found], minlength=COUNT)
        expected = tall.sum() / COUNT
        # Chi-square with 10 degrees of freedom: above 60 less often than once in 10⁸ (keys are fixed, too).
        assert ((tall - expected) ** 2 / expected).sum() < 60

    def test_a_plan_of_one_sample_mixes_it_with_itself(self) -> None:
        pool = Pool(DIGESTS[:1], lambda row: IMAGES[row])
        views = render_views(recipe_of({"mixup": {}}), IMAGES[:1], DIGESTS[:1], 0, pool)
        assert torch.equal(views.pixels_BCHW[0], IMAGES[0])

    def test_a_partner_that_cannot_be_decoded_gives_way_to_the_next(self) -> None:
        """By the rank of the digests, and the stored parameters say who it was."""
        recipe = recipe_of({"mixup": {}})
        whole = partners(views_of(recipe, range(COUNT)))
        ranked = np.sort(DIGESTS).tolist()
        broken = DIGESTS.tolist().index(whole[0])
        rest = [row for row in range(COUNT) if row != broken]
        found = partners(views_of(recipe, rest, pool=pool_of(broken=[broken])))
        for row, partner in zip(rest, found, strict=True):
            before = int(whole[row])
            after = ranked[(ranked.index(before) + 1) % COUNT] if before == DIGESTS[broken] else before
            assert partner == after

    def test_a_partner_that_is_gone_is_an_error(self) -> None:
        recipe = recipe_of({"mixup": {}})
        views = views_of(recipe, [0])
        partner = DIGESTS.tolist().index(partners(views)[0])
        with pytest.raises(MismatchError, match="must be decodable"):
            render_again(recipe, IMAGES[:1], views.params_BP, pool_of(broken=[partner]))
        others = [row for row in range(COUNT) if row != partner]
        with pytest.raises(MismatchError, match="must be a sample of the plan"):
            render_again(recipe, IMAGES[:1], views.params_BP, Pool(DIGESTS[others], lambda row: IMAGES[others[row]]))


class TestPixels:
    """torchvision's arithmetic for equal shares."""

    @given(seed=SEEDS, lam=st.integers(0, 2**16))
    def test_mixup(self, seed: int, lam: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pair = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=generator)
        ours = MixUp().mix(pair, pair.roll(1, 0), np.full((2, 1), lam, np.int32))
        exact = v2.MixUp(num_classes=2).transform(pair.double(), {"lam": lam / 2**16, "labels": None, "batch_size": 2})
        assert torch.equal(ours.double(), (exact + 0.5).floor())

    @given(seed=SEEDS, height=st.integers(1, 20), width=st.integers(1, 20), alpha=st.sampled_from([0.3, 1.0, 3.0]))
    def test_cutmix(self, seed: int, height: int, width: int, alpha: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        pair = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
        recipe = recipe_of({"cutmix": {"alpha": alpha}})
        views = render_views(recipe, list(pair), DIGESTS[:2], seed, Pool(DIGESTS[:2], lambda row: pair[row]))
        x1, y1, x2, y2 = views.params_BP[0, -4:].tolist()
        box = {"box": (x1, y1, x2, y2), "labels": None, "batch_size": 2}
        assert torch.equal(views.pixels_BCHW[0], v2.CutMix(num_classes=2).transform(pair, box)[0])
        assert views.mixed is not None
        assert views.mixed.shares_B[0] == 1 - (x2 - x1) * (y2 - y1) / (height * width)
        assert 0 <= x1 <= x2 <= width
        assert 0 <= y1 <= y2 <= height

    def test_boxes_are_spread_as_torchvisions(self) -> None:
        """Two-sample Kolmogorov-Smirnov over 6,000 draws of each edge: a false alarm less than once in 10⁶."""
        from scipy.stats import ks_2samp

        from teacher_cache.views.philox import Words

        count = 6000
        words = Words(key_digests([str(number) for number in range(count)]), 3, 1, 5)
        ours = CutMix(alpha=0.7).draw(words, np.tile([40, 60], (count, 1)))
        transform, image = v2.CutMix(alpha=0.7, num_classes=2), torch.zeros((2, 3, 40, 60))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs = np.array([transform.make_params([image])["box"] for _ in range(count)])
        for column in range(4):
            assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-6
        areas = [(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (ours, theirs)]
        assert ks_2samp(*areas).pvalue > 1e-6


class TestRefusals:
    def test_two_steps_that_mix(self) -> None:
        with pytest.raises(SpecError, match="another step does too"):
            recipe_of({"mixup": {}}, {"cutmix": {}})

    @pytest.mark.parametrize("alpha", [0, -1, float("inf"), True, "1"])
    def test_alpha(self, alpha: Any) -> None:
        with pytest.raises(SpecError, match="alpha"):
            recipe_of({"mixup": {"alpha": alpha}})

    def test_images_of_two_sizes(self) -> None:
        """Mixed before they are brought to one size."""
        pool = Pool(DIGESTS[:2], lambda row: [IMAGES[0], IMAGES[1][:, :9]][row])
        with pytest.raises(SpecError, match=r"one size where they are mixed.*\(24, 24\).*\(9, 24\)"):
            render_views(recipe_of({"mixup": {}}), IMAGES[:1], DIGESTS[:1], 0, pool)

    def test_grey_and_coloured(self) -> None:
        pool = Pool(DIGESTS[:2], lambda row: [IMAGES[0], IMAGES[1][:1]][row])
        with pytest.raises(SpecError, match="one shape where they are mixed"):
            render_views(recipe_of({"mixup": {}}), IMAGES[:1], DIGESTS[:1], 0, pool)

    def test_without_the_plan(self) -> None:
        with pytest.raises(SpecError, match="partners come from"):
            render_views(recipe_of({"mixup": {}}), IMAGES[:1], DIGESTS[:1], 0)

    @pytest.mark.parametrize("operation", [MixUp(), CutMix()])
    def test_alone(self, operation: Mix) -> None:
        with pytest.raises(TypeError, match="partner"):
            operation.apply(IMAGES[0], ())


VIEWS = {"recipe": [{"pad_crop": {"size": 8, "padding": 2}}, {"mixup": {}}], "count": 3, "seed": 11}


class TestThroughTheCache:
    """The teacher sees the mixed view, the student the same one, with both labels."""

    @settings(max_examples=5)
    @given(batch_size=st.integers(1, ROWS), seed=st.integers(0, 3))
    def test_teacher_and_student(self, mixed: Path, batch_size: int, seed: int) -> None:
        cache = tc.open(mixed)
        assert cache.labels is not None
        for batch in ViewStream(cache, batch_size=batch_size, seed=seed, check_views=batch_size):
            np.testing.assert_array_equal(batch.targets["logits"].dense().values, expected_logits(batch.views_BCHW))
            assert batch.mixing is not None
            assert batch.mixing.labels_B is not None
            np.testing.assert_array_equal(batch.mixing.labels_B, cache.labels[batch.mixing.partners_B])
            lam = cache.params(0, batch.rows_B)[:, -1]
            np.testing.assert_array_equal(batch.mixing.shares_B, (lam / 2**16).astype(np.float32))
            assert (batch.mixing.partners_B != batch.rows_B).all()

    def test_two_builds_are_equal_bytes_and_sound(self, mixed: Path, arrays: Path, tmp_path: Path) -> None:
        """One view at a time or three from one decoding: the same cache."""
        spec = toy_spec(tmp_path / "again", arrays, views=VIEWS, compute__views_per_decode=3)
        tc.build(spec, executor="serial")
        assert tree(tmp_path / "again") == tree(mixed)
        totals = tc.open(mixed).totals
        assert (totals.labelled, totals.correct) == (0, 0), "a mixed view has no one right answer"
        assert tc.verify(mixed, views="all", recompute=30).ok

    def test_a_source_of_other_samples_is_refused(self, mixed: Path, arrays: Path, tmp_path: Path) -> None:
        """Partners come from the whole plan, so the whole plan must be there."""
        fewer = {**numpy_source(arrays), "take": {"count": ROWS - 1}}
        with pytest.raises(MismatchError, match="source"):
            tc.open(mixed, NumpySource.model_validate(fewer)).render(0, [0])

    def test_a_tombstone_is_nobodys_partner(self, tmp_path: Path) -> None:
        """Neither when building nor when training, even if somebody mends the file meanwhile."""
        folder = tmp_path / "images/a"
        folder.mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8), 40 * number).save(folder / f"{number}.png")
        sound = (folder / "3.png").read_bytes()
        (folder / "3.png").write_bytes(sound[:40].ljust(len(sound), b"\0"))
        source = {"kind": "folder", "path": str(tmp_path / "images")}
        views = {"recipe": [{"mixup": {}}], "count": 8}
        spec = toy_spec(tmp_path / "cache", tmp_path, source=source, views=views, teacher__arguments={"classes": 1})
        tc.build(spec, executor="serial")
        (folder / "3.png").write_bytes(sound)
        cache = tc.open(tmp_path / "cache")
        assert cache.alive.tolist() == [True, True, True, False, True, True]
        for _ in range(8):
            for batch in ViewStream(cache, batch_size=5, check_views=5):
                assert batch.mixing is not None
                assert 3 not in batch.mixing.partners_B
        for view in range(8):
            np.testing.assert_array_equal(cache.draw(view, [0, 1, 2, 4, 5]), cache.params(view, [0, 1, 2, 4, 5]))

    def test_labelled_rows_mix_too(self, arrays: Path) -> None:
        rows = LabelledRows(NumpySource.model_validate(numpy_source(arrays)), ViewSpec.model_validate(VIEWS))
        batch = next(iter(ViewStream(rows, batch_size=5, fields=())))
        assert batch.mixing is not None
        assert batch.mixing.labels_B is not None
        assert rows.labels is not None
        np.testing.assert_array_equal(batch.mixing.labels_B, rows.labels[batch.mixing.partners_B])


@pytest.fixture(scope="session")
def mixed(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed toy cache of mixed views."""
    path = tmp_path_factory.mktemp("mixed") / "cache"
    tc.build(toy_spec(path, arrays, views=VIEWS), executor="serial")
    return path


def test_cross_entropy_takes_both_labels_by_their_shares(mixed: Path) -> None:
    """As torchvision's soft labels: λ · one-hot + (1 − λ) · one-hot of the partner."""
    batch: Batch = next(iter(ViewStream(tc.open(mixed), batch_size=9))).to("cpu")
    assert batch.labels_B is not None
    assert batch.mixing is not None
    assert batch.mixing.labels_B is not None
    logits_BC = torch.randn((9, CLASSES), generator=torch.Generator().manual_seed(1))
    hot = torch.nn.functional.one_hot
    shares_B1 = batch.mixing.shares_B[:, None]
    soft_BC = shares_B1 * hot(batch.labels_B, CLASSES) + (1 - shares_B1) * hot(batch.mixing.labels_B, CLASSES)
    for smoothing in (0.0, 0.1):
        expected = torch.nn.functional.cross_entropy(logits_BC, soft_BC, label_smoothing=smoothing)
        torch.testing.assert_close(CrossEntropy(label_smoothing=smoothing)(Answer(logits_BC), batch), expected)
