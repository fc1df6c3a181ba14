"""Teachers: frozen, deterministic, named by everything that decides their answers, and never unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toy_models import SmallNet

from teacher_cache.errors import SpecError, TeacherError
from teacher_cache.spec import NormalizeSpec, TeacherSpec
from teacher_cache.teachers import Teacher, load_teacher, resolve_device
from teacher_cache.teachers.node_fields import to_one_size
from teacher_cache.teachers.weights import state_digest

SMALL = "toy_models:SmallNet"


def loaded(model: str = SMALL, recipe: NormalizeSpec | None = None, **changes: Any) -> Teacher:
    """A teacher of a configuration; `recipe` is what the recipe normalises with."""
    return load_teacher(TeacherSpec.model_validate({"model": model, **changes}), recipe)


def views(batch: int = 3, channels: int = 1, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8, generator=generator)


class TestLoading:
    def test_torchvision(self) -> None:
        teacher = loaded("torchvision:resnet18", arguments={"num_classes": 7}, fields=["logits"])
        assert teacher(views(2, 3, 32))["logits"].shape == (2, 7)
        with pytest.raises(SpecError, match=r"no classification model.*resnet19.*Did you mean `resnet18`"):
            loaded("torchvision:resnet19")
        with pytest.raises(TeacherError, match=r"teacher\.arguments.*colour"):
            loaded("torchvision:resnet18", arguments={"colour": 1})

    def test_timm(self) -> None:
        pytest.importorskip("timm")
        teacher = loaded("timm:test_vit", arguments={"num_classes": 5})
        assert teacher(views(2, 3, 160))["logits"].shape == (2, 5)
        with pytest.raises(SpecError, match=r"teacher\.model: is not a timm model.*Did you mean `test_vit`"):
            loaded("timm:test_vti")

    def test_module_attribute(self) -> None:
        """Exactly the module, in evaluation mode, on pixels scaled to 0..1 and normalised."""
        spec = NormalizeSpec(mean=(0.4,), std=(0.2,))
        teacher = loaded(recipe=spec)
        expected = SmallNet().eval()((views() / 255 - 0.4) / 0.2)
        assert torch.allclose(teacher(views())["logits"], expected, atol=1e-6)
        own = loaded(recipe=spec, arguments={"classes": 3})
        assert own(views())["logits"].shape == (3, 3)

    def test_its_own_normalisation_comes_first(self) -> None:
        recipes = NormalizeSpec(mean=(0.4,), std=(0.2,))
        own = {"normalize": {"mean": [0.1], "std": [0.3]}}
        teacher = load_teacher(TeacherSpec.model_validate({"model": SMALL, **own}), recipes)
        expected = SmallNet().eval()((views() / 255 - 0.1) / 0.3)
        assert torch.allclose(teacher(views())["logits"], expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("model", "error"),
        [
            ("toy_models:missing", SpecError),
            ("no_such_module:x", SpecError),
            ("just_a_name", SpecError),
            ("toy_models:not_a_module", TeacherError),
            ("gopher://example.com", TeacherError),
            ("missing.pt2", TeacherError),
        ],
    )
    def test_what_is_no_teacher(self, model: str, error: type[Exception]) -> None:
        with pytest.raises(error, match=r"teacher\.model"):
            loaded(model)

    def test_a_device_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert resolve_device("auto") == "cpu"
        with pytest.raises(TeacherError, match=r"compute\.device"):
            resolve_device("cuda")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


class TestWeights:
    def _changed(self) -> SmallNet:
        net = SmallNet()
        net.head.weight.data += 1
        return net

    def test_safetensors_and_pt_are_the_same_weights(self, tmp_path: Path) -> None:
        net = self._changed()
        safetensors.torch.save_file(net.state_dict(), tmp_path / "w.safetensors")
        torch.save(net.state_dict(), tmp_path / "w.pt")
        one, other = (loaded(weights=str(tmp_path / name)) for name in ("w.safetensors", "w.pt"))
        assert one.fingerprint == other.fingerprint != loaded().fingerprint
        expected = net.eval()(views() / 255)
        for teacher in (one, other):
            assert torch.allclose(teacher(views())["logits"], expected, atol=1e-6)

    def test_the_place_of_the_file_is_no_part_of_the_identity(self, tmp_path: Path) -> None:
        for name in ("a.pt", "b.pt"):
            torch.save(self._changed().state_dict(), tmp_path / name)
        names = {loaded(weights=str(tmp_path / name)).fingerprint for name in ("a.pt", "b.pt")}
        assert len(names) == 1

    def test_a_pickled_object_is_refused_and_never_runs(self, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        torch.save({"head.weight": Evil(marker)}, tmp_path / "evil.pt")
        torch.save(SmallNet(), tmp_path / "module.pt")
        for name in ("evil.pt", "module.pt"):
            with pytest.raises(TeacherError, match=r"teacher\.weights.*cannot be read"):
                loaded(weights=str(tmp_path / name))
        assert not marker.exists()

    @pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3)], ids=["list", "number", "tensor"])
    def test_what_is_no_state_dict(self, content: Any, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(TeacherError, match="must hold a state dict"):
            loaded(weights=str(tmp_path / "w.pt"))

    def test_damaged_files(self, tmp_path: Path) -> None:
        torch.save(SmallNet().state_dict(), tmp_path / "w.pt")
        safetensors.torch.save_file(SmallNet().state_dict(), tmp_path / "w.safetensors")
        for name in ("w.pt", "w.safetensors"):
            data = (tmp_path / name).read_bytes()
            for cut in (0, 5, len(data) // 2):
                (tmp_path / name).write_bytes(data[:cut])
                with pytest.raises(TeacherError, match=r"teacher\.weights"):
                    loaded(weights=str(tmp_path / name))
        with pytest.raises(TeacherError, match="must be a file"):
            loaded(weights=str(tmp_path / "none.pt"))

    @pytest.mark.parametrize("change", ["missing", "extra", "shape"])
    def test_weights_that_do_not_fit(self, change: str, tmp_path: Path) -> None:
        """Strictly: a head that stays at its random start would answer noise."""
        state = SmallNet().state_dict()
        if change == "missing":
            del state["head.bias"]
        elif change == "extra":
            state["head.more"] = torch.zeros(1)
        else:
            state["head.bias"] = torch.zeros(11)
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(TeacherError, match=r"(?s)do not fit the model.*head"):
            loaded(weights=str(tmp_path / "w.pt"))


class TestFields:
    def test_logits_and_features(self) -> None:
        """Features are the outputs of the named nodes, pooled where asked for."""
        fields = {"logits": None, "feature:conv": None, "feature:norm": {"pool": "mean"}}
        found = loaded(fields=fields)(views())
        net = SmallNet().eval()
        conv = net.conv(views() / 255)
        assert list(found) == ["logits", "feature:conv", "feature:norm"]
        assert torch.allclose(found["feature:conv"], conv, atol=1e-6)
        assert torch.allclose(found["feature:norm"], net.norm(conv).mean((2, 3)), atol=1e-6)

    def test_a_relu_in_place_does_not_overwrite_what_was_tapped(self) -> None:
        """`norm` is followed by an in-place ReLU: its negative values must survive."""
        found = loaded(fields=["logits", "feature:norm", "feature:relu"])(views())
        assert bool((found["feature:norm"] < 0).any())
        assert torch.equal(found["feature:norm"].clamp(min=0), found["feature:relu"])

    def test_a_feature_without_logits(self) -> None:
        assert list(loaded(fields=["feature:conv"])(views())) == ["feature:conv"]

    def test_attention_maps_are_made_at_the_source(self) -> None:
        """The mean over channels of the squares, beside the feature itself; of tokens over their width."""
        found = loaded(fields=["feature:norm", "attention:norm"])(views())
        assert torch.allclose(found["attention:norm"], found["feature:norm"].square().mean(1), atol=1e-6)
        pytest.importorskip("timm")
        tokens = loaded("timm:test_vit", fields=["feature:blocks.0", "attention:blocks.0"])(views(2, 3, 160))
        assert torch.allclose(tokens["attention:blocks.0"], tokens["feature:blocks.0"].square().mean(-1), atol=1e-5)

    def test_flow_is_the_inner_products_of_two_maps(self) -> None:
        """Against NumPy: the larger map is brought to the smaller's size by the maxima of its windows."""
        model = "toy_models:Stages"
        fields = ["feature:first", "feature:second", "flow:first,second", "flow:second,first@b", "flow:first,first"]
        found = {name: value.numpy() for name, value in loaded(model, fields=fields)(views()).items()}
        first, second = found["feature:first"].astype(np.float64), found["feature:second"].astype(np.float64)
        shrunk = first.reshape(3, 3, 4, 2, 4, 2).max((3, 5))
        flow = np.einsum("bmhw,bnhw->bmn", shrunk, second) / 16
        np.testing.assert_allclose(found["flow:first,second"], flow, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["flow:second,first@b"], flow.transpose(0, 2, 1), rtol=1e-5, atol=1e-6)
        whole = np.einsum("bmhw,bnhw->bmn", first, first) / 64
        np.testing.assert_allclose(found["flow:first,first"], whole, rtol=1e-5, atol=1e-6)

    def test_windows_of_maps_that_do_not_divide(self) -> None:
        """As FORMAT.md says, and each of height and width to the smaller of both."""
        tall, wide = torch.rand(2, 3, 7, 2), torch.rand(2, 4, 3, 5)
        one, other = to_one_size(tall, wide)
        assert (one.shape, other.shape) == ((2, 3, 3, 2), (2, 4, 3, 2))
        for place in range(3):
            window = tall[:, :, place * 7 // 3 : -(-(place + 1) * 7 // 3)]
            assert torch.equal(one[:, :, place], window.amax(2))
        assert torch.equal(other[..., 1], wide[..., 2:5].amax(3))

    def test_a_flow_needs_two_maps(self) -> None:
        with pytest.raises(TeacherError, match=r"flow:conv,head: needs two maps \[C, H, W\] \(found: \(10,\)\)"):
            loaded(fields=["flow:conv,head"])(views())
        with pytest.raises(TeacherError, match=r"flow:conv,layer9: names no node \(found: layer9\)"):
            loaded(fields=["flow:conv,layer9"])

    def test_a_map_is_not_pooled(self) -> None:
        with pytest.raises(ValidationError, match="is a map already"):
            TeacherSpec.model_validate({"model": SMALL, "fields": {"attention:conv": {"pool": "mean"}}})
        with pytest.raises(ValidationError, match="is a matrix already"):
            TeacherSpec.model_validate({"model": SMALL, "fields": {"flow:conv,norm": {"pool": "mean"}}})
        with pytest.raises(ValidationError, match="is a map of the input already"):
            TeacherSpec.model_validate({"model": SMALL, "fields": {"saliency": {"pool": "mean"}}})

    def test_answers_own_their_memory(self) -> None:
        """A second call does not change what the first gave."""
        teacher = loaded(fields=["logits", "feature:conv", "feature:relu"])
        first = teacher(views())
        copies = {name: value.clone() for name, value in first.items()}
        teacher(255 - views())
        assert all(torch.equal(first[name], copies[name]) for name in first)
        assert all(value.dtype == torch.float32 for value in first.values())

    def test_an_unknown_node_names_the_known(self) -> None:
        with pytest.raises(TeacherError, match=r"feature:layer9.*names no node.*conv, norm, relu"):
            loaded(fields=["feature:layer9"])

    def test_nodes_that_cannot_be_tapped(self) -> None:
        with pytest.raises(TeacherError, match="never computed"):
            loaded(fields=["feature:unused"])(views())
        with pytest.raises(TeacherError, match="output is one tensor"):
            loaded("toy_models:Recurrent", fields=["logits", "feature:rnn"])(views())

    def test_a_tuple_instead_of_logits(self) -> None:
        with pytest.raises(TeacherError, match=r"one tensor.*tuple"):
            loaded("toy_models:AnswersTuple")(views())

    @pytest.mark.parametrize(
        "field",
        ["logit", "logits:", "logits:x", "feature:", "attention:", "saliency:x", "flow:a", "flow:a,", "flow:a,b,c"],
    )
    def test_unknown_fields(self, field: str) -> None:
        with pytest.raises(ValueError, match="none of `logits`"):
            TeacherSpec.model_validate({"model": SMALL, "fields": [field]})


class TestFrozen:
    def test_evaluation_mode(self) -> None:
        """Dropout is off and BatchNorm uses its running figures, even if the factory left training on."""
        teacher = loaded(arguments={"train_mode": True}, fields=["logits"])
        first = teacher(views(8))["logits"]
        assert torch.equal(first, teacher(views(8))["logits"])
        alone = torch.cat([teacher(view[None])["logits"] for view in views(8)])
        assert torch.allclose(first, alone, atol=1e-5)

    def test_no_gradients_and_no_state(self) -> None:
        """Calling it changes nothing of it, and the global generator stays as it is."""
        net = SmallNet()
        from teacher_cache.teachers import TorchTeacher

        teacher = TorchTeacher(net.eval(), {"model": "x"}, TeacherSpec(model=SMALL).fields)
        digest, state = state_digest(net), torch.get_rng_state()
        assert not teacher(views())["logits"].requires_grad
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert state_digest(net) == digest
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_autocast_answers_nearly_the_same_in_float32(self, precision: str) -> None:
        exact, low = loaded()(views())["logits"], loaded(precision=precision)(views())["logits"]
        assert low.dtype == torch.float32
        assert not torch.equal(low, exact)
        assert torch.allclose(low, exact, rtol=0.1, atol=0.1)

    def test_channels_last_answers_the_same(self) -> None:
        exact, turned = loaded()(views()), loaded(channels_last=True)(views())
        assert torch.allclose(exact["logits"], turned["logits"], atol=1e-5)


class TestFingerprint:
    def test_whatever_decides_an_answer_changes_it(self, tmp_path: Path) -> None:
        net = SmallNet()
        net.conv.bias.data[2] += 2.0**-20  # type: ignore[union-attr]
        torch.save(net.state_dict(), tmp_path / "one_weight.pt")
        buffers = SmallNet()
        buffers.norm.running_var[1] *= 2  # type: ignore[index]
        torch.save(buffers.state_dict(), tmp_path / "one_buffer.pt")
        normalize = {"mean": [0.5], "std": [0.5]}
        changes: list[dict[str, Any]] = [
            {},
            {"weights": str(tmp_path / "one_weight.pt")},
            {"weights": str(tmp_path / "one_buffer.pt")},
            {"normalize": normalize},
            {"normalize": {**normalize, "std": [0.25]}},
            {"precision": "bf16"},
            {"precision": "fp16"},
            {"channels_last": True},
            {"arguments": {"train_mode": True}},
            {"class_names": [str(number) for number in range(10)]},
            {"model": "toy_models:PixelSums"},
        ]
        names = [loaded(**{"model": SMALL, **change}).fingerprint for change in changes]
        assert len(set(names)) == len(changes)

    def test_what_does_not_decide_an_answer_does_not(self) -> None:
        """How an answer is kept, or how many rows are asked at once, is named elsewhere."""
        plain = loaded().fingerprint
        assert loaded(fields={"logits": {"encoding": "dense_f32"}}).fingerprint == plain
        assert loaded(fields={"logits": None, "feature:conv": {"pool": "mean"}}).fingerprint == plain
        assert loaded(micro_batch=8).fingerprint == plain
        assert loaded(name="other").fingerprint == plain
        assert loaded(api_key="secret").fingerprint == plain

    def test_normalisation_from_the_recipe_counts(self) -> None:
        assert loaded(recipe=NormalizeSpec(mean=(0.5,), std=(0.5,))).fingerprint != loaded().fingerprint

    def test_state_digest_sees_names_types_and_shapes(self) -> None:
        class Holder(nn.Module):
            def __init__(self, name: str, value: Tensor) -> None:
                super().__init__()
                self.register_buffer(name, value)

        zeros = torch.zeros(4)
        found = {
            state_digest(Holder("a", zeros)),
            state_digest(Holder("b", zeros)),
            state_digest(Holder("a", zeros.int())),
            state_digest(Holder("a", zeros.reshape(2, 2))),
            state_digest(Holder("a", torch.tensor(0.0))),
            state_digest(Holder("a", torch.zeros(0))),
        }
        assert len(found) == 6


class TestExported:
    """A `torch.export` program needs no code of the model."""

    @pytest.fixture(scope="class")
    @classmethod
    def program(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("export") / "teacher.pt2"
        example = torch.zeros(4, 1, 8, 8)
        with torch.no_grad():
            torch.export.save(torch.export.export(SmallNet().eval(), (example,)), path)
        return path

    def test_it_answers_as_the_module(self, program: Path) -> None:
        teacher = loaded(str(program), micro_batch=4)
        assert torch.allclose(teacher(views(4))["logits"], loaded()(views(4))["logits"], atol=1e-6)

    def test_a_copy_has_the_same_fingerprint_and_another_program_has_not(self, program: Path, tmp_path: Path) -> None:
        (tmp_path / "copy.pt2").write_bytes(program.read_bytes())
        first = loaded(str(program)).fingerprint
        assert loaded(str(tmp_path / "copy.pt2")).fingerprint == first
        assert loaded(str(program), precision="bf16").fingerprint != first

    def test_what_is_refused(self, program: Path, tmp_path: Path) -> None:
        with pytest.raises(TeacherError, match="complete in itself"):
            loaded(str(program), weights="w.pt")
        (tmp_path / "broken.pt2").write_bytes(program.read_bytes()[:100])
        with pytest.raises(TeacherError, match="cannot be read"):
            loaded(str(tmp_path / "broken.pt2"))
        (tmp_path / "text.pt2").write_bytes(b"no program")
        with pytest.raises(TeacherError, match="cannot be read"):
            loaded(str(tmp_path / "text.pt2"))


def test_a_node_that_runs_twice_is_ambiguous() -> None:
    with pytest.raises(TeacherError, match=r"feature:relu.*more than once"):
        loaded("toy_models:Twice", fields=["logits", "feature:relu"])(views(2, 1, 8))
