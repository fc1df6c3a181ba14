"""Terms of an objective: what they read, what they train, how much they count; and the taps that feed them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_builds import toy_spec
from toy_students import Net, images, seeded

import teacher_cache as tc
from student_train import (
    DIST,
    DKD,
    KD,
    NKD,
    SEED,
    Answer,
    AttentionTransfer,
    CrossEntropy,
    EnsembleKD,
    Feature,
    Flow,
    HeadsKD,
    LearnedTemperatureKD,
    LogitMSE,
    Objective,
    Relations,
    Saliency,
    Schedule,
    SimilarityPreserving,
    Taps,
    TrainSpec,
    ViewStream,
    fit,
    losses,
)
from student_train.objective import Shapes, Term
from student_train.stream import Batch, Mixing
from student_train.term_specs import TermSpec, open_objective
from student_train.weight import weight_at
from teacher_cache.encodings import DenseTarget
from teacher_cache.errors import RequestError, SpecError
from teacher_cache.spec import Strict, parse

FIELDS = {
    "logits": {"encoding": "dense_f32"},
    "logits@small": {"encoding": {"kind": "top_k", "k": 3}},
    "feature:stem": {"encoding": "dense_f16"},
    "feature:stem@mean": {"pool": "mean", "encoding": "dense_f16"},
    "attention:stem": {"encoding": "dense_f16"},
}


@pytest.fixture(scope="module")
def cache(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits, maps, means and attention of the toy teacher."""
    path = tmp_path_factory.mktemp("terms") / "cache"
    tc.build(toy_spec(path, arrays, teacher__fields=FIELDS), "serial")
    return path


@pytest.fixture
def batch(cache: Path) -> Batch:
    """All rows of one view."""
    return next(iter(ViewStream(tc.open(cache), batch_size=27, fields=tuple(FIELDS))))


FEATURE_TERMS: dict[str, Term] = {
    "hint": Feature("maps", "feature:stem"),
    "mean": Feature("maps", "feature:stem@mean", distance="mae"),
    "attention": AttentionTransfer("maps", "attention:stem"),
    "plain attention": AttentionTransfer("maps", "attention:stem", squared=False),
    "relations": Relations("maps", "feature:stem"),
    "similarity": SimilarityPreserving("maps", "feature:stem"),
}
LOGIT_TERMS: dict[str, Term] = {
    "cross-entropy": CrossEntropy(),
    "kd": KD(),
    "sparse kd": KD(field="logits@small"),
    "standardised": KD(standardise=True),
    "logit mse": LogitMSE(),
    "dist": DIST(),
    "dkd": DKD(),
    "nkd": NKD(),
    "ensemble": EnsembleKD(("logits", "logits@small")),
    "logits' mean": EnsembleKD(("logits", "logits@small"), mean_of="logits"),
    "votes": EnsembleKD(("logits", "logits@small"), mean_of="votes", temperature=1),
}


def expected(term: str, answer: Answer, batch: Batch, joint: nn.Module | None) -> Tensor:
    """The value, from the pure functions."""
    logits, target, labels = answer.logits_BC, batch.targets["logits"], batch.labels_B
    assert labels is not None
    both = [batch.targets["logits"], batch.targets["logits@small"]]
    if term in LOGIT_TERMS:
        return {
            "cross-entropy": lambda: nn.functional.cross_entropy(logits, labels),
            "kd": lambda: losses.soft_target_loss(logits, target, 4),
            "sparse kd": lambda: losses.soft_target_loss(logits, both[1], 4),
            "standardised": lambda: losses.soft_target_loss(
                losses.standardised(logits), losses.standardised_target(target), 4
            ),
            "logit mse": lambda: losses.logit_mse(logits, target),
            "dist": lambda: losses.dist_loss(logits, target),
            "dkd": lambda: losses.dkd_loss(logits, target, labels, 4.0, 1.0, 8.0),
            "nkd": lambda: losses.nkd_loss(logits, target, labels, 1.0, 1.5),
            "ensemble": lambda: losses.soft_label_loss(logits, losses.mean_of_probabilities(both, 4), 4),
            "logits' mean": lambda: losses.soft_label_loss(logits, losses.geometric_mean(both, 4), 4),
            "votes": lambda: losses.soft_label_loss(logits, losses.majority_vote(both), 1),
        }[term]()
    maps, feature = answer.nodes["maps"], batch.targets["feature:stem"]
    attention = losses.attention_map(maps)
    return {
        "hint": lambda: losses.hint_loss(maps, feature, joint),  # type: ignore[arg-type]
        "mean": lambda: losses.feature_mae(joint(maps.mean((2, 3))), batch.targets["feature:stem@mean"]),  # type: ignore[misc]
        "attention": lambda: losses.attention_transfer_loss(attention, batch.targets["attention:stem"]),
        "plain attention": lambda: losses.normalised_activation_loss(attention, batch.targets["attention:stem"]),
        "relations": lambda: 25 * losses.distance_loss(maps, feature) + 50 * losses.angle_loss(maps, feature),
        "similarity": lambda: losses.similarity_loss(maps, feature),
    }[term]()


SHAPES = Shapes({"maps": (3, 8, 8)}, {"feature:stem": (1, 8, 8), "feature:stem@mean": (1,), "attention:stem": (8, 8)})


@pytest.mark.parametrize("name", [*LOGIT_TERMS, *FEATURE_TERMS])
def test_a_term_is_its_function_times_its_weight(name: str, batch: Batch) -> None:
    """Also where a second term stands beside it; and its gradient reaches the student."""
    term = (LOGIT_TERMS | FEATURE_TERMS)[name]
    student = seeded(Net)
    objective = Objective([replace(term, weight=0.25), LogitMSE(weight=2)])  # type: ignore[type-var]
    objective.join(SHAPES)
    with Taps(student, objective.nodes) as answer:
        said = answer(images(batch))
    loss, values = objective(said, batch)
    joint = None if objective._joints is None else next(iter(objective._joints.values()))
    wanted = expected(name, said, batch, joint).detach()
    assert float(next(iter(values.values()))) == pytest.approx(float(wanted), rel=1e-6)
    rest = 2 * losses.logit_mse(said.logits_BC.detach(), batch.targets["logits"])
    assert float(loss.detach()) == pytest.approx(float(0.25 * wanted + rest), rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.maps.weight.grad.abs().sum() > 0


def test_labels_of_mixed_views_are_not_taken_for_one(batch: Batch) -> None:
    """Where a formula has one label, two are refused."""
    shares = torch.full((27,), 0.5)
    mixed = replace(batch, mixing=Mixing(np.arange(27), batch.labels_B, shares))
    for term in (DKD(), NKD()):
        with pytest.raises(SpecError, match="mixed views have two"):
            Objective([term])(torch.zeros(27, 10), mixed)


class TestTaps:
    """What is listened to, and what is left behind."""

    def test_an_in_place_operation_does_not_change_what_was_kept(self, batch: Batch) -> None:
        student = seeded(Net)
        with Taps(student, ["maps"]) as answer:
            said = answer(images(batch))
        assert torch.equal(said.nodes["maps"], student.maps(images(batch)))
        assert (said.nodes["maps"] < 0).any()

    def test_the_student_is_as_it_was(self, batch: Batch) -> None:
        student = seeded(Net)
        with Taps(student, ["maps", "head"]) as answer:
            assert set(answer(images(batch)).nodes) == {"maps", "head"}
        assert not any(module._forward_hooks for module in student.modules())

    def test_who_else_runs_the_student_is_not_listened_to(self, batch: Batch) -> None:
        """An evaluation between two steps, and a copy that keeps the running average."""
        student = seeded(Net)
        with Taps(student, ["maps"]) as answer:
            copied = copy.deepcopy(student)
            for _ in range(2):
                answer(images(batch))
                for module in (student, copied):
                    module(images(batch))
                    module(images(batch))

    @pytest.mark.parametrize("node", ["", "nowhere", "maps.weight"])
    def test_what_is_no_module_is_refused(self, node: str) -> None:
        with pytest.raises(SpecError, match="Modules: maps, norm, act, head"):
            Taps(seeded(Net), [node])

    def test_what_does_not_run_is_refused(self, batch: Batch) -> None:
        with (
            Taps(seeded(Net), ["idle"]) as answer,
            pytest.raises(SpecError, match=r"must run in a forward pass \(found: idle\)"),
        ):
            answer(images(batch))

    def test_what_runs_twice_or_answers_no_tensor_is_refused(self, batch: Batch) -> None:
        class Twice(Net):
            def forward(self, images_BCHW: Tensor) -> Tensor:
                return super().forward(images_BCHW) + super().forward(images_BCHW)

        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = seeded(Net)
                self.pair = nn.Identity()

            def forward(self, images_BCHW: Tensor) -> Tensor:
                first, _ = self.pair((self.inner(images_BCHW), 0))
                return first

        with Taps(seeded(Twice), ["maps"]) as answer, pytest.raises(SpecError, match="more than once"):
            answer(images(batch))
        with Taps(seeded(Pair), ["pair"]) as answer, pytest.raises(SpecError, match="puts out one tensor"):
            answer(images(batch))

    def test_a_bare_answer_has_no_nodes(self, batch: Batch) -> None:
        objective = Objective([AttentionTransfer("maps", "attention:stem")])
        with pytest.raises(SpecError, match="needs what a node of the student puts out"):
            objective(torch.zeros(27, 10), batch)
        with pytest.raises(SpecError, match="must be joined to the student first"):
            objective(Answer(torch.zeros(27, 10), {"maps": torch.zeros(27, 3, 8, 8)}), batch)


@pytest.mark.parametrize(
    ("term", "node", "field"),
    [
        (Feature("maps", "f"), (3, 8, 8), (5, 4, 4)),
        (Feature("maps", "f"), (3,), (5, 4, 4)),
        (Feature("maps", "f"), (7, 3), (5,)),
        (AttentionTransfer("maps", "f"), (3, 8, 8), (4, 4)),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(term: Term, node: Any, field: Any) -> None:
    with pytest.raises(SpecError, match="maps"):
        Objective([term]).join(Shapes({"maps": node}, {"f": field}))


class TestThreeByThree:
    """A hint whose projection looks around each place."""

    @pytest.mark.parametrize("channels", [1, 3])
    def test_it_is_there_whatever_the_widths(self, channels: int) -> None:
        objective = Objective([Feature("maps", "f", kernel=3)])
        objective.join(Shapes({"maps": (3, 5, 4)}, {"f": (channels, 5, 4)}))
        (joint,) = objective.joints
        assert joint(torch.zeros(2, 3, 5, 4)).shape == (2, channels, 5, 4)
        assert sorted(tuple(weight.shape) for weight in joint.parameters()) == [(channels,), (channels, 3, 3, 3)]

    def test_it_is_trained(self, cache: Path, batch: Batch) -> None:
        """By `fit`: before a student that stays as it is, what falls is due to the projection."""
        objective = Objective([Feature("maps", "feature:stem", 0.1, kernel=3)])
        student, train = seeded(Net).requires_grad_(False), TrainSpec(epochs=3, batch_size=9, lr=0.05, device="cpu")
        history = fit(student, ViewStream(tc.open(cache), batch_size=9, fields=objective.fields), objective, train)
        assert history.history[-1]["feature"] < 0.9 * history.history[0]["feature"]
        (joint,) = objective.joints
        weight, bias = joint.parameters()
        with Taps(student, objective.nodes) as answer:
            said = answer(images(batch))
        around = nn.functional.conv2d(said.nodes["maps"], weight, bias, padding=1)
        _, values = objective(said, batch)
        wanted = (around - batch.targets["feature:stem"].dense().values).square().mean()
        assert float(values["feature"]) == pytest.approx(float(wanted.detach()), rel=1e-5)

    @pytest.mark.parametrize(("node", "field"), [((3, 8, 8), (1,)), ((3,), (3,)), ((4, 3), (4, 5))])
    def test_vectors_have_no_surroundings(self, node: Any, field: Any) -> None:
        with pytest.raises(SpecError, match=r"feature\.kernel.*is for maps on both sides"):
            Objective([Feature("maps", "f", kernel=3)]).join(Shapes({"maps": node}, {"f": field}))


def test_equal_widths_need_no_projection() -> None:
    for shape in ((3,), (3, 8, 8), (16, 32)):
        objective = Objective([Feature("maps", "f")])
        objective.join(Shapes({"maps": shape}, {"f": shape}))
        assert list(objective.parameters()) == []


class TestSchedule:
    """Weights that follow the run."""

    @given(place=st.floats(0, 1))
    def test_straight_lines(self, place: float) -> None:
        rise = Schedule(((0.2, 1.0), (0.6, 3.0)))
        assert rise.at(place) == pytest.approx(float(np.interp(place, [0.2, 0.6], [1.0, 3.0])))

    def test_given_up_half_way(self) -> None:
        """The second of two points at one place holds from there on."""
        stopped = Schedule(((0, 1), (0.5, 1), (0.5, 0)))
        assert [stopped.at(place) for place in (0.0, 0.25, 0.4999, 0.5, 0.75, 1.0)] == [1, 1, 1, 0, 0, 0]
        assert Schedule(((0.5, 2),)).at(0.1) == Schedule(((0.5, 2),)).at(0.9) == 2
        assert weight_at(0.7, 0.3) == 0.7

    def test_a_term_without_weight_is_not_computed(self) -> None:
        """Its target need not even be there."""
        objective = Objective([KD(weight=Schedule(((0, 1), (0.5, 1), (0.5, 0)))), CrossEntropy()])
        labels, targets = torch.arange(4), {"logits": DenseTarget(torch.randn(4, 10))}
        batch = Batch(0, 0, np.zeros(4, np.int64), np.arange(4), torch.zeros(4, 1, 8, 8), labels, targets)
        _, early = objective(torch.zeros(4, 10), batch, 0.4)
        loss, late = objective(torch.zeros(4, 10), replace(batch, targets={}), 0.5)
        assert (set(early), set(late)) == ({"kd", "cross_entropy"}, {"cross_entropy"})
        assert float(loss) == float(late["cross_entropy"])

    @pytest.mark.parametrize(
        "points", [((0, 1), (0.5, 1), (0.5, 0)), ((0, 0), (0.3, 1)), ((0.2, 1), (0.4, 0), (0.6, 1))]
    )
    def test_steps_that_learn_nothing_are_refused(self, points: Any) -> None:
        """Of all terms together: one that counts makes up for the others."""
        with pytest.raises(SpecError, match=r"must not be 0 of all terms at once \(found: at progress"):
            Objective([KD(weight=Schedule(points))])
        Objective([KD(weight=Schedule(points)), CrossEntropy()])
        Objective([KD(weight=Schedule(((0, 1), (1, 0))))])

    @pytest.mark.parametrize(
        "points", [(), ((0, -1),), ((0, 0), (1, 0)), ((0.5, 1), (0.2, 1)), ((1.5, 1),), ((0, float("nan")),)]
    )
    def test_nonsense_is_refused(self, points: Any) -> None:
        with pytest.raises(SpecError, match="weight"):
            Schedule(points)


class OneTerm(Strict):
    """A configuration of nothing but terms."""

    terms: tuple[TermSpec, ...]


CONFIGURED: list[tuple[dict[str, Any], Term]] = [
    ({"kind": "cross_entropy", "label_smoothing": 0.1}, CrossEntropy(label_smoothing=0.1)),
    (
        {"kind": "kd", "weight": [[0, 1], [0.5, 0]], "standardise": True},
        KD(Schedule(((0, 1), (0.5, 0))), 4.0, "logits", True),
    ),
    ({"kind": "logit_mse", "field": "logits@a"}, LogitMSE(field="logits@a")),
    ({"kind": "dist", "rows_weight": 2}, DIST(rows_weight=2.0)),
    ({"kind": "dkd", "others_weight": 2}, DKD(others_weight=2.0)),
    ({"kind": "nkd", "temperature": 2}, NKD(temperature=2.0)),
    ({"kind": "ctkd", "rise": 0.2, "start": 0}, LearnedTemperatureKD(rise=0.2, start=0.0)),
    ({"kind": "ensemble_kd", "fields": ["logits", "b/logits"]}, EnsembleKD(("logits", "b/logits"))),
    (
        {"kind": "heads_kd", "node": "a", "fields": ["logits", "b/logits"], "temperature": 2},
        HeadsKD("a", ("logits", "b/logits"), temperature=2.0),
    ),
    ({"kind": "feature", "node": "a", "field": "b", "distance": "mae"}, Feature("a", "b", distance="mae")),
    ({"kind": "feature", "node": "a", "field": "b", "kernel": 3}, Feature("a", "b", kernel=3)),
    ({"kind": "attention", "node": "a", "field": "b", "weight": 15.6}, AttentionTransfer("a", "b", 15.6)),
    ({"kind": "relations", "node": "a", "field": "b", "angle_weight": 0}, Relations("a", "b", angle_weight=0.0)),
    ({"kind": "flow", "nodes": ["a", "b"], "field": "c"}, Flow(("a", "b"), "c")),
    ({"kind": "saliency", "field": "b/saliency", "weight": 2}, Saliency(2.0, "b/saliency")),
    ({"kind": "seed", "node": "a", "field": "b", "queue": 9}, SEED("a", "b", queue=9)),
    ({"kind": "similarity", "node": "a", "field": "b", "weight": 3000}, SimilarityPreserving("a", "b", 3000.0)),
]


def test_every_term_can_be_configured() -> None:
    """By the names of its arguments, with its own defaults."""
    described = {"terms": [body for body, _ in CONFIGURED]}
    assert open_objective(parse(OneTerm, described, "test").terms).terms == tuple(term for _, term in CONFIGURED)
    for body, term in CONFIGURED:
        needed = {name: body[name] for name in ("kind", "node", "nodes", "field", "fields") if name in body}
        (bare,) = open_objective(parse(OneTerm, {"terms": [needed]}, "test").terms).terms
        assert bare == type(term)(
            **{name: getattr(term, name) for name in ("node", "nodes", "field", "fields") if name in needed}
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "kd", "weight": 0},
        {"kind": "kd", "weight": [[0, 0]]},
        {"kind": "dkd", "temperature": 0},
        {"kind": "ctkd", "rise": 0},
        {"kind": "flow", "nodes": ["a"], "field": "flow:a,b"},
        {"kind": "saliency", "node": "a"},
        {"kind": "heads_kd", "node": "a", "fields": ["logits", "logits"]},
        {"kind": "heads_kd", "fields": ["logits", "b/logits"]},
        {"kind": "seed", "node": "a", "field": "b", "queue": 0},
        {"kind": "seed", "node": "a", "field": "b", "teacher_temperature": 0},
        {"kind": "ctkd", "start": 11},
        {"kind": "ctkd", "temperature": 4},
        {"kind": "feature", "field": "b"},
        {"kind": "ensemble_kd", "fields": ["logits"]},
        {"kind": "ensemble_kd", "fields": ["a", "b"], "mean_of": "votes"},
        {"kind": "relations", "node": "a", "field": "b", "distance_weight": 0, "angle_weight": 0},
        {"kind": "nothing"},
    ],
)
def test_wrong_terms_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        open_objective(parse(OneTerm, {"terms": [wrong]}, "test").terms)


@pytest.mark.parametrize("name", FEATURE_TERMS)
def test_a_student_learns_what_a_term_asks(name: str, cache: Path) -> None:
    """The projection is trained too, and is no part of the student."""
    student = seeded(Net)
    objective = Objective([FEATURE_TERMS[name]])
    stream = ViewStream(tc.open(cache), batch_size=9, fields=objective.fields)
    before = set(student.state_dict())
    torch.manual_seed(1)
    result = fit(student, stream, objective, TrainSpec(epochs=12, lr=0.05, clip_norm=1, batch_size=9, device="cpu"))
    losses_E = [entry["loss"] for entry in result.history]
    assert losses_E[-1] < losses_E[0]
    assert set(student.state_dict()) == before
    assert not any(module._forward_hooks for module in student.modules())


def test_shapes_come_from_a_look_that_changes_nothing(cache: Path) -> None:
    """Batch norm's running statistics are those of the training alone."""
    statistics = []
    for terms in ([KD()], [KD(), AttentionTransfer("norm", "attention:stem", 1e-30)]):
        student = seeded(Net, True)
        stream = ViewStream(tc.open(cache), batch_size=9, fields=("logits", "attention:stem"))
        fit(student, stream, Objective(terms), TrainSpec(epochs=1, batch_size=9, device="cpu"))
        statistics.append(student.norm.running_mean)
    assert torch.equal(*statistics)


def test_tokens_are_projected_by_their_width() -> None:
    objective = Objective([Feature("maps", "f")])
    objective.join(Shapes({"maps": (16, 32)}, {"f": (16, 64)}))
    assert [tuple(weight.shape) for weight in objective.parameters()] == [(64, 32), (64,)]


def test_a_term_that_ends_within_an_epoch_is_logged_as_it_was(cache: Path) -> None:
    """Its mean is over the rows for which it was computed, and it is gone from the next epoch's entry."""
    terms = [KD(weight=Schedule(((0, 1), (0.5, 1), (0.5, 0)))), CrossEntropy()]
    told = TrainSpec(epochs=3, batch_size=9, lr=1e-12, momentum=0, weight_decay=0, device="cpu")
    first, second, third = fit(seeded(Net), ViewStream(tc.open(cache), batch_size=9), Objective(terms), told).history
    assert second["kd"] == pytest.approx(first["kd"], rel=0.5)
    assert second["kd"] > 0.8 * first["kd"]
    assert "kd" not in third
