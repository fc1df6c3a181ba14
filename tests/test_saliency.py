"""The field `saliency`: a gradient at the pixels, the same each time, that leaves teacher and logits as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toy_builds import RECIPE, numpy_source, toy_spec, tree
from toy_models import SmallNet

import teacher_cache as tc
from teacher_cache.cost import estimate
from teacher_cache.errors import TeacherError
from teacher_cache.spec import BuildSpec, NormalizeSpec, TeacherSpec
from teacher_cache.teachers import Teacher, ask_whole, load_teacher
from teacher_cache.teachers.saliency import at_pixels
from teacher_cache.teachers.weights import state_digest

SMALL = "toy_models:SmallNet"
FIELDS = {"logits": {"encoding": "dense_f32"}, "saliency": {"encoding": "dense_f16"}}
NORMALIZE = NormalizeSpec(mean=(0.4,), std=(0.2,))


def loaded(model: str = SMALL, normalize: NormalizeSpec | None = None, **changes: Any) -> Teacher:
    return load_teacher(TeacherSpec.model_validate({"model": model, "fields": FIELDS, **changes}), normalize)


def views(batch: int = 3, channels: int = 1, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8, generator=generator)


def labels(batch: int = 3) -> Tensor:
    return torch.arange(batch) * 3 % 10


class TestValue:
    def test_it_points_where_the_labels_logit_rises(self) -> None:
        """By differences in float64 at the pixels: of the logit of each row's own label, of length 1."""
        net = SmallNet().eval().double()
        pixels = views().double() / 255

        def own(shown: Tensor) -> Tensor:
            return net((shown - 0.4) / 0.2).gather(1, labels()[:, None])[:, 0]

        gradient = torch.zeros_like(pixels)
        with torch.no_grad():
            for place in range(64):
                step = torch.zeros(1, 1, 64, dtype=torch.float64)
                step[..., place] = 1e-6
                step = step.view(1, 1, 8, 8)
                gradient.view(3, 64)[:, place] = (own(pixels + step) - own(pixels - step)) / 2e-6
        found = loaded(normalize=NORMALIZE)(views(), labels())["saliency"]
        wanted = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert torch.allclose(found.double(), wanted, atol=1e-5)
        assert found.dtype == torch.float32

    def test_normalising_is_part_of_what_is_differentiated(self) -> None:
        """At the pixels and not at the input: channels with another deviation count by it."""
        spec = NormalizeSpec(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
        gradient = torch.rand(2, 3, 4, 4)
        assert torch.equal(at_pixels(gradient, spec)[:, 1], gradient[:, 1] * 4)
        assert at_pixels(gradient, None) is gradient
        own = loaded(normalize=spec, arguments={"channels": 3})(views(channels=3), labels())["saliency"]
        pixels = (views(channels=3) / 255).requires_grad_()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
        logits = SmallNet(channels=3).eval()((pixels - mean) / std)
        (wanted,) = torch.autograd.grad(logits.gather(1, labels()[:, None]).sum(), pixels)
        wanted = wanted / wanted.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert torch.allclose(own, wanted, atol=1e-6)

    def test_a_row_does_not_depend_on_those_beside_it(self) -> None:
        teacher = loaded()
        together = teacher(views(), labels())["saliency"]
        others = torch.cat([views()[:1], torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
        assert torch.equal(teacher(others, torch.tensor([0, 9, 9]))["saliency"][0], together[0])

    def test_no_gradient_points_nowhere(self) -> None:
        assert not loaded()(views(), labels())["saliency"].isnan().any()
        found = loaded("test_saliency:Steps")(views(), labels())["saliency"]
        assert torch.equal(found, torch.zeros(3, 1, 8, 8))

    def test_precision_bf16_answers_nearly_the_same(self) -> None:
        exact, low = (loaded(precision=name)(views(), labels())["saliency"] for name in ("fp32", "bf16"))
        assert low.dtype == torch.float32
        assert torch.allclose(low.flatten(1).norm(dim=1), torch.ones(3), atol=1e-5)
        assert 0.99 < float((low * exact).sum() / 3) < 1


class Steps(SmallNet):
    """Its logits do not move with its input, and yet have a gradient."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return super().forward(images_BCHW * 0)


class Named(SmallNet):
    """One of its modules is called `saliency`."""

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__(classes, channels)
        self.saliency = nn.Identity()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return super().forward(self.saliency(images_BCHW))


class Detached(SmallNet):
    """Nothing flows back through it."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return super().forward(images_BCHW.detach())


class Once(nn.Module):
    """An operation without a derivative."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return NoDerivative.apply(images_BCHW.flatten(1)[:, :10])  # type: ignore[no-any-return, no-untyped-call]


class Unrepeatable(SmallNet):
    """What torch says in a forward pass of an operation that adds up in another order each time."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("does not have a deterministic implementation")
        return super().forward(images_BCHW)


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_ctx: Any, *_slopes: Tensor) -> Tensor:
        raise RuntimeError("it has none")


class TestFrozen:
    def test_the_teacher_is_left_as_it_was(self) -> None:
        """Weights, buffers, their gradients, the generator, torch's own settings, and what its hooks keep."""
        from teacher_cache.teachers import TorchTeacher

        net = SmallNet().eval()
        fields = TeacherSpec.model_validate({"model": SMALL, "fields": [*FIELDS, "feature:relu"]}).fields
        teacher = TorchTeacher(net, {"model": "x"}, fields)
        digest, state = state_digest(net), torch.get_rng_state()
        first = teacher(views(), labels())
        again = teacher(views(), labels())
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(value.requires_grad for value in first.values())
        assert all(weight.grad is None and not weight.requires_grad for weight in net.parameters())
        assert state_digest(net) == digest
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_deterministic_debug_mode() == 0

    def test_what_is_asked_for_beside_changes_no_bit_of_the_others(self) -> None:
        rest = ["logits", "feature:norm"]
        alone, beside = loaded(fields=rest)(views()), loaded(fields=[*rest, "saliency"])(views(), labels())
        assert all(torch.equal(alone[name], beside[name]) for name in rest)
        assert list(beside) == [*rest, "saliency"]
        assert loaded(fields=rest).fingerprint == loaded(fields=[*rest, "saliency"]).fingerprint

    def test_a_node_of_that_name_is_another_field(self) -> None:
        found = loaded("test_saliency:Named", fields=["feature:saliency", "saliency"])(views(), labels())
        assert torch.equal(found["feature:saliency"], views() / 255)
        assert torch.equal(found["saliency"], loaded(fields=["saliency"])(views(), labels())["saliency"])

    def test_torchs_own_setting_comes_back_after_an_error(self) -> None:
        torch.set_deterministic_debug_mode("warn")
        try:
            with pytest.raises(TeacherError):
                loaded("test_saliency:Once")(views(), labels())
            assert torch.get_deterministic_debug_mode() == 1
        finally:
            torch.set_deterministic_debug_mode("default")

    def test_a_program_without_code_gives_it_too(self, tmp_path: Path) -> None:
        with torch.no_grad():
            program = torch.export.export(SmallNet().eval(), (torch.zeros(3, 1, 8, 8),))
        torch.export.save(program, tmp_path / "teacher.pt2")
        exported = loaded(str(tmp_path / "teacher.pt2"), micro_batch=3)(views(), labels())["saliency"]
        assert torch.allclose(exported, loaded()(views(), labels())["saliency"], atol=1e-6)


class Asked:
    """A teacher that notes what it was given."""

    fingerprint, device, threads = "x", "cpu", None

    def __init__(self, *fields: str) -> None:
        self.fields, self.given = fields, list[tuple[Tensor, ...]]()

    def __call__(self, *given: Tensor) -> dict[str, Tensor]:
        self.given.append(given)
        return {}


def test_labels_are_given_where_a_field_is_made_with_them() -> None:
    """Teachers of other packages need not take any; fillings have class 0, and so has what nobody knows."""
    plain, labelled = Asked("logits", "feature:a"), Asked("logits", "saliency@b")
    for known in (torch.tensor([4, 5, 6]), None):
        ask_whole(plain, views(), 5, known)
        ask_whole(labelled, views(), 5, known)
    assert [len(given) for given in plain.given] == [1, 1]
    assert all(given[0].shape == (5, 1, 8, 8) for given in (*plain.given, *labelled.given))
    assert [given[1].tolist() for given in labelled.given] == [[4, 5, 6, 0, 0], [0, 0, 0, 0, 0]]


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "given", "message"),
        [
            (SMALL, None, r"needs labels \(found: None\)"),
            (SMALL, torch.tensor([0, 10, 3]), r"needs labels in 0..9 \(found: 10\)"),
            (SMALL, torch.tensor([0, -1, 3]), r"needs labels in 0..9 \(found: -1\)"),
            ("toy_models:Positions", labels(), r"needs one row of logits for each view \(found: \(8, 10\)\)"),
            ("test_saliency:Detached", labels(), "needs a model through which gradients flow"),
            ("test_saliency:Once", labels(), "cannot be computed: it has none"),
            ("test_saliency:Unrepeatable", labels(), "cannot be computed: does not have a deterministic"),
        ],
    )
    def test_what_has_no_gradient(self, model: str, given: Tensor | None, message: str) -> None:
        with pytest.raises(TeacherError, match=rf"teacher\.fields\.saliency: {message}"):
            loaded(model)(views(), given)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fields": {"saliency": {"encoding": "u8_channel"}}}, "use dense_f16"),
            ({"fields": {"saliency": {"encoding": {"kind": "top_k", "k": 3}}}}, "keeps logits only"),
            ({"fields": ["logits", "saliency@small"], "precision": "fp16"}, "small gradients vanish in fp16"),
        ],
    )
    def test_wrong_configurations(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            TeacherSpec.model_validate({"model": SMALL, **changes})

    @pytest.mark.parametrize("what", ["labels", "mixing"])
    def test_rows_without_a_label_of_their_own(self, what: str, arrays: Path, tmp_path: Path) -> None:
        """Said by `plan` and before a build begins; nothing is written."""
        source = {**numpy_source(arrays), "labels": None} if what == "labels" else numpy_source(arrays)
        recipe = RECIPE if what == "labels" else [*RECIPE, {"mixup": {}}]
        spec = toy_spec(tmp_path / "cache", arrays, source=source, teacher__fields=FIELDS, views__recipe=recipe)
        for work in (lambda: estimate(spec), lambda: tc.build(spec, "serial")):
            with pytest.raises(TeacherError, match=r"saliency: needs (labels|one label a row)"):
                work()
        assert not (tmp_path / "cache").exists()


class TestCached:
    def spec(self, path: Path, arrays: Path, **changes: Any) -> BuildSpec:
        return toy_spec(path, arrays, **{"teacher__model": SMALL, "teacher__fields": FIELDS, **changes})

    def test_rows_are_those_of_their_own_labels(self, arrays: Path, tmp_path: Path) -> None:
        """With a padded tail, and shards that micro-batches of four do not divide evenly."""
        tc.build(self.spec(tmp_path / "cache", arrays), "serial")
        cache = tc.open(tmp_path / "cache")
        assert cache.shape_of("saliency") == (1, 8, 8)
        for view in range(2):
            shown = cache.render(view, range(27))
            wanted = loaded(micro_batch=27)(shown, torch.from_numpy(np.arange(27) % 8))["saliency"]
            found = cache.read("saliency", view, range(27)).dense().values
            assert torch.allclose(found.float(), wanted, atol=1e-3)
        assert tc.verify(tmp_path / "cache", recompute=27).ok

    def test_bytes_are_a_function_of_the_spec(self, arrays: Path, tmp_path: Path) -> None:
        for name in ("one", "other"):
            tc.build(self.spec(tmp_path / name, arrays), "serial")
        assert tree(tmp_path / "one") == tree(tmp_path / "other")

    def test_it_is_added_to_a_cache_of_logits(self, arrays: Path, tmp_path: Path) -> None:
        """And ends with the field's bytes of a build that asked for both at once."""
        both = tmp_path / "both"
        tc.build(self.spec(both, arrays), "serial")
        grown = tmp_path / "grown"
        tc.build(self.spec(grown, arrays, teacher__fields={"logits": {"encoding": "dense_f32"}}), "serial")
        tc.build(self.spec(grown, arrays), "serial")
        for view in range(2):
            for field in FIELDS:
                one, other = (tc.open(path).read(field, view, range(27)).dense().values for path in (both, grown))
                assert torch.equal(one, other)
        shutil.rmtree(grown)

    def test_logits_may_be_chosen_by_measuring_beside_it(self, arrays: Path, tmp_path: Path) -> None:
        """Planning asks for all fields, and knows no labels."""
        fields = {"logits": {"encoding": {"max_kl": 1e-3}}, "saliency": None}
        tc.build(self.spec(tmp_path / "cache", arrays, teacher__fields=fields), "serial")
        assert tc.verify(tmp_path / "cache", recompute=27).ok
