"""What goes wrong in this field in silence, beyond the formulas: each trap is laid, and must be refused or harmless.

The traps of the formulas (`mean` for `batchmean`, T² forgotten, a softmax where its logarithm belongs) are in
`test_losses*`; a tapped output that an in-place ReLU overwrites is in `test_teachers` and `test_terms`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_builds import ROWS, numpy_source, toy_spec
from toy_models import SmallNet

import teacher_cache as tc
from student_train import KD, CrossEntropy, Objective, ViewStream, losses
from student_train import run as running
from student_train.compare import compare
from student_train.evaluate import Measured
from student_train.opening import open_data
from student_train.recipes import CompareSpec, FitSpec
from student_train.run import evaluate_weights, train_one
from teacher_cache.errors import MismatchError, TeacherError
from teacher_cache.spec import HEAD_INPUT, FieldSpec, TeacherSpec, parse
from teacher_cache.teachers import TorchTeacher, load_teacher
from teacher_cache.teachers.weights import state_digest

NET = {"model": "toy_models:SmallNet", "micro_batch": 4, "fields": {"logits": {"encoding": "dense_f32"}}}
TRAIN = {"epochs": 3, "batch_size": 8, "lr": 0.05, "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def cache(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed toy cache."""
    path = tmp_path_factory.mktemp("traps") / "cache"
    tc.build(toy_spec(path, arrays), "serial")
    return path


def run_spec(run: Path, cache: Path, arrays: Path, **changes: Any) -> dict[str, Any]:
    described: dict[str, Any] = {
        "run": str(run),
        "data": {"cache": str(cache)},
        "student": {"model": "small_cnn", "arguments": {"width": 4}},
        "train": TRAIN,
        "evaluate": {"source": numpy_source(arrays), "views": {"recipe": []}},
    }
    return {**described, **changes}


def fit_spec(run: Path, cache: Path, arrays: Path, **changes: Any) -> FitSpec:
    return parse(FitSpec, {**run_spec(run, cache, arrays, **changes), "objective": [{"kind": "kd"}]}, "test")


class TestTeacherInTrainingMode:
    """Dropout would make its answers a lottery, and batch norm would make a row depend on its neighbours."""

    @pytest.mark.parametrize("train_mode", [True, False])
    def test_what_is_cached_is_the_answer_of_evaluation(self, train_mode: bool, arrays: Path, tmp_path: Path) -> None:
        """Row by row, whatever mode the factory left it in."""
        teacher = {**NET, "arguments": {"train_mode": train_mode}}
        tc.build(toy_spec(tmp_path / "cache", arrays, teacher=teacher), "serial")
        cache = tc.open(tmp_path / "cache")
        net, rows = SmallNet().eval(), np.arange(ROWS)
        with torch.no_grad():
            for view in range(cache.views):
                found = cache.read("logits", view, rows).dense().values
                views = cache.render(view, rows) / 255
                torch.testing.assert_close(found, net(views), rtol=0, atol=1e-5)
                assert (found - net.train()(views)).abs().max() > 0.1
                net = SmallNet().eval()

    def test_a_module_in_training_mode_is_put_in_evaluation(self) -> None:
        """Also where no configuration made it; its running figures stay as they were."""
        net = SmallNet(train_mode=True)
        digest = state_digest(net)
        teacher = TorchTeacher(net, {"model": "x"}, {"logits": FieldSpec()})
        views = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        answer = teacher(views)["logits"]
        torch.testing.assert_close(answer, SmallNet().eval()(views / 255).detach(), rtol=0, atol=1e-5)
        assert state_digest(net) == digest
        assert int(net.norm.num_batches_tracked) == 0

    @pytest.mark.parametrize(
        ("net", "trains"),
        [
            (torch.nn.BatchNorm2d(1), True),
            (torch.nn.Dropout(0.5), True),
            (torch.nn.Dropout2d(0.5), True),
            (torch.nn.BatchNorm2d(1, track_running_stats=False), False),
            (torch.nn.InstanceNorm2d(1), False),
        ],
    )
    @pytest.mark.parametrize("mode", [True, False])
    def test_a_program_exported_in_training_mode_is_refused(
        self, net: torch.nn.Module, trains: bool, mode: bool, tmp_path: Path
    ) -> None:
        """It has no other mode; what has but one mode at all is taken as it is."""
        path, model = tmp_path / "net.pt2", torch.nn.Sequential(net, torch.nn.Flatten()).train(mode)
        torch.export.save(torch.export.export(model, (torch.zeros(4, 1, 8, 8),)), path)
        spec = TeacherSpec(model=str(path), micro_batch=4)
        if trains and mode:
            with pytest.raises(TeacherError, match=r"teacher\.model: must be exported in evaluation mode"):
                load_teacher(spec, None)
        else:
            views = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
            assert load_teacher(spec, None)(views)["logits"].shape == (4, 64)


class Overwrites(torch.nn.Module):
    """Uses the memory of its head's input for something else, once the head has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(64, 10)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to logits [B, 10]."""
        pixels_BD = images_BCHW.flatten(1).clone()
        logits_BC: torch.Tensor = self.head(pixels_BD)
        pixels_BD.zero_()
        return logits_BC


def test_the_input_of_a_head_is_kept_as_the_head_saw_it() -> None:
    """`feature_head` stores it, and makes the logits of it again."""
    field = FieldSpec.model_validate({"encoding": "feature_head"})
    teacher = TorchTeacher(Overwrites(), {"model": "x"}, {"logits": field})
    views = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher(views)[HEAD_INPUT], views.flatten(1) / 255)


class TestBestOnTest:
    """The evaluation is told, and decides nothing: of several epochs the last one is what a run is."""

    SCRIPTS = ((0.1, 0.9, 0.3), (0.9, 0.1, 0.5))
    """What the evaluation says of each epoch: the best is the second, or the first."""

    @staticmethod
    def _scripted(patch: pytest.MonkeyPatch, script: tuple[float, ...]) -> list[str]:
        """Has the evaluation say so, again and again; the digests of the models that it was asked about."""
        values, asked = itertools.cycle(script), list[str]()

        def told(model: torch.nn.Module, *_: object, **__: object) -> Measured:
            asked.append(state_digest(model))
            return Measured(next(values))

        patch.setattr(running, "measure", told)
        return asked

    def test_a_student_is_what_its_last_epoch_left(
        self, cache: Path, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither the student nor its file is another one because an earlier epoch looked better."""
        ends = set()
        for number, script in enumerate(self.SCRIPTS):
            asked = self._scripted(monkeypatch, script)
            spec = fit_spec(tmp_path / str(number), cache, arrays)
            result = train_one(spec, open_data(spec), spec.objective, 0, Path(spec.run))
            assert [entry["accuracy"] for entry in result.history] == list(script)
            assert len(set(asked)) == 3
            evaluate_weights(spec, Path(spec.run) / "model.safetensors")
            assert asked[-1] == asked[-2], "what was kept is what was evaluated last"
            ends.add(asked[-1])
        assert len(ends) == 1

    def test_a_comparison_is_of_the_last_epochs(
        self, cache: Path, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = self.SCRIPTS[0]
        self._scripted(monkeypatch, script)
        arms = {"ce": [{"kind": "cross_entropy"}], "kd": [{"kind": "kd"}]}
        spec = parse(CompareSpec, {**run_spec(tmp_path, cache, arrays), "arms": arms, "seeds": [0, 1]}, "test")
        compare(spec)
        written = json.loads((tmp_path / "result.json").read_text())["arms"]
        assert {arm: found["accuracy"] for arm, found in written.items()} == {arm: [script[-1]] * 2 for arm in arms}
        assert {arm: found["mean"] for arm, found in written.items()} == dict.fromkeys(arms, script[-1])


class TestMixedTargets:
    """What a teacher says of a mixed image is not the mean of what it says of the two."""

    @pytest.mark.parametrize("mix", ["mixup", "cutmix"])
    def test_the_answer_is_to_the_mixed_pixels(self, mix: str, arrays: Path, tmp_path: Path) -> None:
        views = {"recipe": [{mix: {}}], "count": 2, "seed": 11}
        # Contrast, so that the ReLU does what a linear teacher cannot: for that one both would be the same.
        teacher = {**NET, "normalize": {"mean": [0.2], "std": [0.02]}}
        tc.build(toy_spec(tmp_path / "cache", arrays, teacher=teacher, views=views), "serial")
        images = torch.from_numpy(np.load(arrays / "images.npy"))[:, None]
        net = SmallNet().eval()

        def asked(views_BCHW: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return net((views_BCHW / 255 - 0.2) / 0.02)

        for batch in ViewStream(tc.open(tmp_path / "cache"), batch_size=ROWS):
            assert batch.mixing is not None
            answer, shares_B1 = batch.targets["logits"].dense().values, batch.mixing.shares_B[:, None]
            torch.testing.assert_close(answer, asked(batch.views_BCHW), rtol=0, atol=1e-4)
            alone = asked(images)
            averaged = shares_B1 * alone[batch.rows_B] + (1 - shares_B1) * alone[batch.mixing.partners_B]
            assert (answer - averaged).abs().max() > 0.1
            for nobody in (alone[batch.rows_B], alone[batch.mixing.partners_B]):
                assert (answer - nobody).abs().max() > 0.1

    def test_soft_targets_take_it_as_it_is(self, arrays: Path, tmp_path: Path) -> None:
        """Partners and shares are for labels: the cached answer is not mixed once more."""
        views = {"recipe": [{"mixup": {}}], "count": 2, "seed": 11}
        tc.build(toy_spec(tmp_path / "cache", arrays, teacher=NET, views=views), "serial")
        batch = next(iter(ViewStream(tc.open(tmp_path / "cache"), batch_size=ROWS)))
        logits_BC = torch.randn(ROWS, 10, generator=torch.Generator().manual_seed(0))
        expected = losses.soft_target_loss(logits_BC, batch.targets["logits"], 4)
        mixed, _ = Objective([KD()])(logits_BC, batch)
        plain, _ = Objective([KD()])(logits_BC, replace(batch, mixing=None))
        assert torch.equal(mixed, expected)
        assert torch.equal(plain, expected)
        labelled, _ = Objective([CrossEntropy()])(logits_BC, batch)
        unmixed, _ = Objective([CrossEntropy()])(logits_BC, replace(batch, mixing=None))
        assert not torch.isclose(labelled, unmixed)


class TestClassOrder:
    """Class 3 must be one thing to the teacher, the cache, the student and the evaluation."""

    NAMES = tuple(f"class {number}" for number in range(10))

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ((*NAMES[:2], NAMES[3], NAMES[2], *NAMES[4:]), r"where 2 is class 2 \(found: class 3\)"),
            (NAMES[1:], r"where 0 is class 0 \(found: class 1\)"),
            (NAMES[:-1], r"where 9 is class 9 \(found: None\)"),
            ((*NAMES, "more"), r"where 10 is None \(found: more\)"),
        ],
    )
    @pytest.mark.parametrize("taught", ["by a cache", "by labels"])
    def test_an_evaluation_in_another_order_is_refused(
        self, taught: str, names: tuple[str, ...], message: str, cache: Path, arrays: Path, tmp_path: Path
    ) -> None:
        source = {**numpy_source(arrays), "class_names": names}
        data: dict[str, Any] = {"source": numpy_source(arrays), "views": {"recipe": []}}
        changes = {"data": data} if taught == "by labels" else {}
        spec = fit_spec(
            tmp_path / "run", cache, arrays, evaluate={"source": source, "views": {"recipe": []}}, **changes
        )
        with pytest.raises(MismatchError, match=rf"evaluate: must number .*{message}"):
            open_data(spec)
        assert not (tmp_path / "run").exists()

    def test_a_folder_without_one_class_is_refused(self, arrays: Path, tmp_path: Path) -> None:
        """Folders number the classes that they have: without `bee`, `cat` would be class 1."""
        for split, classes in (("train", "ant bee cat"), ("test", "ant cat")):
            for name in classes.split():
                (tmp_path / split / name).mkdir(parents=True)
                Image.new("L", (8, 8), 9).save(tmp_path / split / name / "0.png")
        sources = [{"kind": "folder", "path": str(tmp_path / split)} for split in ("train", "test")]
        train, test = ({"source": source, "views": {"recipe": []}} for source in sources)
        spec = fit_spec(tmp_path / "run", tmp_path, arrays, data=train, evaluate=test)
        with pytest.raises(MismatchError, match=r"where 1 is bee \(found: cat\)"):
            open_data(spec)
        assert open_data(fit_spec(tmp_path / "run", tmp_path, arrays, data=train, evaluate=train)).test.classes == 3

    def test_without_names_the_labels_must_be_there(self, cache: Path, arrays: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "labels.npy", np.arange(ROWS) % 11)
        nameless = {key: value for key, value in numpy_source(arrays).items() if key != "class_names"}
        for source, fits in ((nameless, True), ({**nameless, "labels": str(tmp_path / "labels.npy")}, False)):
            evaluate = {"source": source, "views": {"recipe": []}}
            spec = fit_spec(tmp_path / "run", cache, arrays, evaluate=evaluate)
            if fits:
                assert open_data(spec).test.class_names is None
            else:
                with pytest.raises(MismatchError, match=r"evaluate: must have labels in 0\.\.9.*\(found: 10\)"):
                    open_data(spec)

    def test_a_data_set_that_moved_keeps_its_order(self, cache: Path, arrays: Path, tmp_path: Path) -> None:
        """What the cache is told of its source's present place must be what it was built from, names included."""
        source = {**numpy_source(arrays), "class_names": self.NAMES[::-1]}
        spec = fit_spec(tmp_path / "run", cache, arrays, data={"cache": str(cache), "source": source})
        with pytest.raises(MismatchError, match="source"):
            train_one(spec, open_data(spec), spec.objective, 0, Path(spec.run))
