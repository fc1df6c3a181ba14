"""A head for each teacher: who follows whom, and what the heads answer together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_builds import toy_spec
from toy_students import assert_resumes, images, seeded, trained

import teacher_cache as tc
from student_train import Heads, HeadsKD, Objective, ViewStream, losses
from student_train.objective import Shapes
from student_train.stream import Batch
from teacher_cache.encodings import DenseTarget
from teacher_cache.errors import SpecError

FIELDS = ("logits", "other/logits")
TERM = HeadsKD("head.each", FIELDS)


class TwoHeads(nn.Module):
    """One body, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 12)
        self.head = Heads(12, 2, 10)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.body(images_BCHW.flatten(1)).relu())


@pytest.fixture(scope="module")
def cache(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, one dense and one sparse."""
    path = tmp_path_factory.mktemp("heads") / "cache"
    for name, scale, encoding in (("teacher", 1.0, "dense_f32"), ("other", -1.0, {"kind": "top_k", "k": 4})):
        fields = {"logits": {"encoding": encoding}}
        teacher = {"name": name, "model": "toy_models:PixelSums", "arguments": {"scale": scale}, "micro_batch": 4}
        tc.build(toy_spec(path, arrays, teacher={**teacher, "fields": fields}), "serial")
    return path


@pytest.fixture
def batch(cache: Path) -> Batch:
    """All rows of one view."""
    return next(iter(ViewStream(tc.open(cache), batch_size=27, fields=FIELDS)))


@pytest.mark.parametrize("stacked", [False, True])
def test_each_head_follows_its_own_teacher(stacked: bool, batch: Batch) -> None:
    """The mean over heads; a head's gradient is its teacher's alone."""
    student, objective = seeded(TwoHeads), Objective([TERM])
    objective.join(Shapes({"head.each": (2, 10) if stacked else (20,)}, dict.fromkeys(FIELDS, (10,))))
    with objective.taps(student) as answer:
        said = answer(images(batch))
    each = said.nodes["head.each"]
    if stacked:
        said.nodes["head.each"] = each.view(27, 2, 10)  # type: ignore[index]
    loss, values = objective(said, batch)
    first = losses.soft_target_loss(each[:, :10], batch.targets[FIELDS[0]], 4)
    second = losses.soft_target_loss(each[:, 10:], batch.targets[FIELDS[1]], 4)
    assert float(values["heads_kd"]) == pytest.approx(float((first + second).detach()) / 2, rel=1e-6)
    (slope,) = torch.autograd.grad(loss, student.head.each.weight, retain_graph=True)
    (own,) = torch.autograd.grad(first, student.head.each.weight, retain_graph=True)
    assert torch.allclose(slope[:10], own[:10] / 2, atol=1e-7)
    assert slope[10:].abs().sum() > 0
    assert torch.autograd.grad(loss, student.body.weight)[0].abs().sum() > 0


@pytest.mark.parametrize("mean_of", ["probabilities", "logits"])
def test_heads_answer_as_an_ensemble_does(mean_of: str) -> None:
    heads = seeded(Heads, 5, 3, 4, mean_of)
    features = torch.randn(6, 5)
    targets = [DenseTarget(part) for part in heads.each(features).detach().view(6, 3, 4).unbind(1)]
    ensemble = losses.mean_of_probabilities if mean_of == "probabilities" else losses.geometric_mean
    found = heads(features)
    assert torch.allclose(found.log_softmax(-1), ensemble(targets, 1), atol=1e-6)
    if mean_of == "probabilities":
        assert torch.allclose(found, found.log_softmax(-1), atol=1e-6)
    found.sum().backward()
    with pytest.raises(SpecError, match="must be probabilities or logits"):
        Heads(5, 3, 4, "votes")  # type: ignore[arg-type]


def test_a_student_learns_from_both_and_goes_on_exactly(cache: Path, tmp_path: Path) -> None:
    history, _, _ = trained([TERM], cache, TwoHeads, epochs=10)
    assert history[-1]["loss"] < history[0]["loss"]
    assert_resumes([TERM], cache, tmp_path, TwoHeads)


@pytest.mark.parametrize(
    ("node", "fields", "message"),
    [
        ((30,), ((10,), (10,)), r"head\.each: must put out 2 heads of 10 classes, \[20\] or \[2, 10\].*\[30\]"),
        ((10, 2), ((10,), (10,)), r"2 heads of 10 classes"),
        ((20,), ((10,), (9,)), "must be logits of the same classes"),
        ((20,), ((5, 10), (5, 10)), "must be logits of the same classes"),
    ],
)
def test_what_does_not_fit_is_refused(node: tuple[int, ...], fields: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Objective([TERM]).join(Shapes({"head.each": node}, dict(zip(FIELDS, fields, strict=True))))
    for one in (("logits",), ("logits", "logits")):
        with pytest.raises(SpecError, match=r"heads_kd\.fields: must be two or more"):
            HeadsKD("head.each", one)
