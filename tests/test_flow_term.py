"""Flow as a field and a term: cached, verified, and compared with what a student's two maps make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_builds import toy_spec
from toy_models import Stages
from toy_students import assert_resumes, images, seeded, trained

import teacher_cache as tc
from student_train import Flow, Objective, Taps, ViewStream, losses
from student_train.objective import Shapes
from teacher_cache.errors import SpecError

FIELD = "flow:first,second"
FLOW = Flow(("first", "second"), FIELD)


def narrow() -> Stages:
    """A student with fewer channels."""
    return Stages(widths=(2, 4))


@pytest.fixture(scope="module", params=["dense_f32", "dense_f16", "u8_channel"])
def cache(request: pytest.FixtureRequest, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flow between the two stages of the toy teacher."""
    path = tmp_path_factory.mktemp("flow") / "cache"
    fields = {"logits": {"encoding": "dense_f32"}, FIELD: {"encoding": request.param}}
    tc.build(toy_spec(path, arrays, teacher__model="toy_models:Stages", teacher__fields=fields), "serial")
    return path


def test_it_is_cached_as_the_teacher_answers_and_verified(cache: Path) -> None:
    opened = tc.open(cache)
    assert opened.shape_of(FIELD) == (3, 5)
    with torch.no_grad():
        shown = opened.render(1, [4, 7]).float() / 255
        first = Stages().first(shown)
        wanted = losses.flow_matrix(torch.nn.functional.max_pool2d(first, 2), Stages().second(first.relu()))
    found = opened.read(FIELD, 1, [4, 7]).dense().values
    loose = {"atol": 0.02} if opened.spec.teacher.fields[FIELD].encoding.kind == "u8_channel" else {"atol": 1e-3}
    assert torch.allclose(found.float(), wanted, **loose)
    assert tc.verify(cache, recompute=27).ok


def test_a_student_that_is_the_teacher_has_no_loss(cache: Path) -> None:
    """Up to the encoding's error; and one that is not has what its function says, with its gradient."""
    batch = next(iter(ViewStream(tc.open(cache), batch_size=9, fields=(FIELD,))))
    objective = Objective([FLOW])
    with Taps(Stages(), objective.nodes) as answer:
        said = answer(images(batch))
        objective.join(Shapes({"first": (3, 8, 8), "second": (5, 4, 4)}, {FIELD: (3, 5)}))
        assert list(objective.parameters()) == []
        assert float(objective(said, batch)[0].detach()) < 1e-3
    student, objective = narrow(), Objective([Flow(("first", "second"), FIELD, 0.5)])
    torch.manual_seed(0)
    objective.join(Shapes({"first": (2, 8, 8), "second": (4, 4, 4)}, {FIELD: (3, 5)}))
    left, right = objective.parameters()
    with Taps(student, objective.nodes) as answer:
        said = answer(images(batch))
    flow = losses.flow_matrix(torch.nn.functional.max_pool2d(said.nodes["first"], 2), said.nodes["second"])
    loss, values = objective(said, batch)
    wanted = losses.flow_loss(left @ flow @ right.mT, batch.targets[FIELD])
    assert float(values["flow"]) == pytest.approx(float(wanted.detach()), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    for weight in (student.first.weight, student.second.weight, left, right):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("student", [Stages, narrow])
def test_a_student_learns_it_and_goes_on_exactly(student: Any, cache: Path, tmp_path: Path) -> None:
    history, net, _ = trained([FLOW], cache, lambda: perturbed(student), epochs=10, lr=0.02)
    assert history[-1]["loss"] < history[0]["loss"]
    assert set(net.state_dict()) == set(Stages().state_dict())
    assert_resumes([FLOW], cache, tmp_path, student)


def perturbed(student: Any) -> Stages:
    """The teacher's own weights would have nothing to learn."""
    net = seeded(student)
    with torch.no_grad():
        net.first.weight.mul_(0.5)
    return net


def test_what_does_not_fit_is_refused() -> None:
    flow = (3, 5)
    for nodes, field, message in (
        ({"first": (3, 8, 8), "second": (10,)}, FIELD, r"flow\.second: must put out maps .*found: \[10\]"),
        ({"first": (3, 8, 8), "second": (5, 4, 4)}, "attention:first", r"flow\.field: must be a flow"),
    ):
        with pytest.raises(SpecError, match=message):
            Objective([Flow(("first", "second"), field)]).join(Shapes(nodes, {field: flow}))
    with pytest.raises(SpecError, match=r"flow\.nodes: must be two modules"):
        Flow(("first",), FIELD)
    objective = Objective([Flow(("first", "second"), f"other/{FIELD}")])
    objective.join(Shapes({"first": (3, 8, 8), "second": (5, 4, 4)}, {f"other/{FIELD}": flow}))
