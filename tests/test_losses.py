"""The soft-target loss against an independent statement of the formula, and against the traps of the field."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from encoding_laws import kept_of, log_softmax, meant, positions
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from student_train.losses import soft_target_loss
from student_train.sparse_kl import sparse_kl
from teacher_cache.encodings import (
    DenseTarget,
    Encoding,
    NucleusLogits,
    Sequenced,
    Shared,
    SparseTarget,
    TopKLogits,
    tails,
)
from teacher_cache.errors import MismatchError, RequestError

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def reference(student: Array, teacher: Array, temperature: float) -> float:
    """T² · mean_B Σ_c p (log p − log q), in float64 NumPy."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float(temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=1).mean())


def draw(seed: int, classes: int = 10, spread: float = 3.0) -> tuple[Array, Array]:
    random = np.random.Generator(np.random.Philox(seed))
    return random.normal(0, spread, (6, classes)), random.normal(0, spread, (6, classes))


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0]))
def test_dense_equals_the_formula(seed: int, temperature: float) -> None:
    student, teacher = draw(seed)
    loss = soft_target_loss(torch.tensor(student), DenseTarget(torch.tensor(teacher)), temperature)
    assert float(loss) == pytest.approx(reference(student, teacher, temperature), rel=2e-5, abs=1e-6)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 10), temperature=st.sampled_from([1.0, 2.0, 4.0]))
def test_sparse_equals_dense_on_the_decoded_distribution(seed: int, k: int, temperature: float) -> None:
    """The closed form over the classes left out is the dense loss on the same distribution: value and gradient."""
    student, teacher = draw(seed)
    encoding = TopKLogits(10, k)
    target = encoding.decode(encoding.encode(torch.tensor(teacher, dtype=torch.float32)))
    decoded = DenseTarget(target.log_probs(1.0))
    losses, gradients = [], []
    for form in (target, decoded):
        logits = torch.tensor(student, requires_grad=True)
        loss = soft_target_loss(logits, form, temperature)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(logits.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_gradient_is_t_times_q_minus_p_over_b() -> None:
    """So it points towards the teacher; the seed study's published code pointed away."""
    student, teacher = draw(1)
    logits = torch.tensor(student, requires_grad=True)
    soft_target_loss(logits, DenseTarget(torch.tensor(teacher)), 3.0).backward()
    expected = 3.0 * (softmax(student / 3) - softmax(teacher / 3)) / len(student)
    np.testing.assert_allclose(logits.grad, expected, rtol=1e-4, atol=1e-7)


def test_it_is_not_averaged_over_classes() -> None:
    """`mean` in place of `batchmean` is ten times too small on ten classes."""
    student, teacher = draw(2)
    p, q = softmax(teacher), softmax(student)
    wrong = (p * (np.log(p) - np.log(q))).mean()
    loss = soft_target_loss(torch.tensor(student), DenseTarget(torch.tensor(teacher)), 1.0)
    assert float(loss) == pytest.approx(10 * float(wrong), rel=1e-4)


def test_high_temperature_is_half_the_centred_logit_mse() -> None:
    """Hinton et al., section 2.1: T² KL → Σ_c (v − z)² / 2C over centred logits as T grows."""
    student, teacher = draw(3)
    centred = [logits - logits.mean(axis=1, keepdims=True) for logits in (student, teacher)]
    limit = 0.5 * ((centred[0] - centred[1]) ** 2).mean(axis=1).mean()
    dense = DenseTarget(torch.tensor(teacher))
    assert reference(student, teacher, 1e4) == pytest.approx(limit, rel=1e-2)
    assert float(soft_target_loss(torch.tensor(student), dense, 200.0)) == pytest.approx(limit, rel=3e-2)


def test_masked_classes_have_no_weight() -> None:
    """A teacher that masks classes with −10⁹ leaves a tail without mass: 0 · −∞ must not become NaN."""
    encoding = TopKLogits(4, 1)
    target = encoding.decode(encoding.encode(torch.tensor([[0.0, -1e9, -1e9, -1e9]])))
    logits = torch.zeros(1, 4, requires_grad=True)
    loss = soft_target_loss(logits, target, 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(4))
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.75, 0.25, 0.25, 0.25]]))


def test_a_student_that_equals_the_teacher_has_no_loss() -> None:
    _, teacher = draw(4)
    dense = DenseTarget(torch.tensor(teacher))
    assert float(soft_target_loss(torch.tensor(teacher), dense, 4.0)) == pytest.approx(0, abs=1e-6)


@dataclass(frozen=True)
class Case:
    """A student's logits, a sparse target and how they are worked on."""

    rows: int = 3
    classes: int = 23
    k: int = 5
    temperature: float = 4.0
    chunk: int = 7
    spread: float = 3.0
    logits_type: torch.dtype = torch.float32
    index_type: torch.dtype = torch.uint8
    masked: bool = False
    seed: int = 0
    tail: Literal["uniform", "ghost", "renormalise", "prior", "nucleus"] = "uniform"
    values: Literal["f16", "u8"] = "f16"

    def logits(self) -> Tensor:
        drawn = np.random.Generator(np.random.Philox(self.seed)).normal(0, 1, (self.rows, self.classes))
        scaled = torch.tensor(np.clip(drawn, -2, 2) * self.spread, dtype=self.logits_type)
        return scaled.requires_grad_()

    def teacher(self) -> Tensor:
        drawn = np.random.Generator(np.random.Philox(self.seed + 1)).normal(0, 3, (self.rows, self.classes))
        teacher = torch.tensor(drawn, dtype=torch.float32)
        least = teacher.sort(descending=True).values[:, self.k - 1, None]
        return torch.where(teacher < least, -1e9, teacher) if self.masked else teacher

    def encoding(self) -> TopKLogits | NucleusLogits:
        if self.tail == "nucleus":
            return NucleusLogits(self.classes, 0.9, self.k, self.values)
        drawn = np.random.Generator(np.random.Philox(self.seed + 2)).normal(0, 4, self.classes)
        prior = Shared(f"{self}", {"prior": torch.log_softmax(torch.tensor(drawn, dtype=torch.float32), dim=0)})
        return TopKLogits(
            self.classes, self.k, self.values, "whole", self.tail, prior if self.tail == "prior" else None
        )

    def target(self) -> SparseTarget:
        encoding = self.encoding()
        target = encoding.decode(encoding.encode(self.teacher()))
        return replace(target, indices_BK=target.indices_BK.to(self.index_type))


TAILS = pytest.mark.parametrize("tail", ["uniform", "ghost", "renormalise", "prior", "nucleus"])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    classes = draw(st.integers(1, 40))
    return Case(
        rows=draw(st.integers(1, 5)),
        classes=classes,
        k=draw(st.sampled_from([1, classes]) | st.integers(1, classes)),
        temperature=draw(st.sampled_from([0.5, 1.0, 3.0, 20.0])),
        chunk=draw(st.integers(1, classes + 1)),
        spread=draw(st.sampled_from([0.0, 1.0, 30.0, 1e4])),
        logits_type=draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])),
        index_type=draw(st.sampled_from([torch.uint8, torch.uint16, torch.uint32])),
        masked=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
        tail=draw(st.sampled_from(["uniform", "ghost", "renormalise", "prior", "nucleus"])),
        values=draw(st.sampled_from(["f16", "u8"])),
    )


def plain(logits_BC: Tensor, case: Case) -> tuple[float, Tensor]:
    """T² · mean KL and its gradient in float64, by automatic differentiation, of what the stored numbers say.

    The teacher's distribution is worked out of the bytes in NumPy, by none of the code that is tested.
    """
    encoding = case.encoding()
    stored = list(positions(encoding, encoding.encode(case.teacher())))
    p_BC = torch.from_numpy(np.exp(log_softmax(np.stack([meant(*row) for row in stored]) / case.temperature)))
    logits = logits_BC.detach().double().requires_grad_()
    log_q_BC = torch.log_softmax(logits / case.temperature, dim=1)
    if case.tail == "ghost":
        # What is left out becomes one more class, of the teacher and of the student.
        kept_BC = torch.zeros_like(p_BC, dtype=torch.bool)
        for row, position in enumerate(stored):
            kept_BC[row, kept_of(case.encoding(), position[1])[1]] = True
        ghost_B1 = p_BC.masked_fill(kept_BC, 0).sum(1, keepdim=True)
        log_ghost_B1 = log_q_BC.masked_fill(kept_BC, -torch.inf).logsumexp(1, keepdim=True)
        # With k = C there is none: a class of no mass on both sides.
        log_ghost_B1 = torch.where(kept_BC.all(1, keepdim=True), 0.0, log_ghost_B1)
        p_BC = torch.cat([p_BC.masked_fill(~kept_BC, 0), ghost_B1], dim=1)
        log_q_BC = torch.cat([log_q_BC, log_ghost_B1], dim=1)
    loss = case.temperature**2 * (torch.xlogy(p_BC, p_BC) - p_BC * log_q_BC).sum(dim=1).mean()
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient


def assert_right(loss: Tensor, gradient: Tensor | None, logits: Tensor, case: Case) -> None:
    """Value and gradient are those of `plain`, each as exact as its type allows."""
    assert gradient is not None
    assert gradient.dtype == logits.dtype
    expected, slope = plain(logits, case)
    assert float(loss.detach()) == pytest.approx(expected, rel=3e-6, abs=2e-6 * case.temperature**2)
    # A softmax of large logits is as exact as their differences are, in float32 at best.
    rounding = max(torch.finfo(logits.dtype).eps / 2, 1e-5, 1e-8 * case.spread)
    torch.testing.assert_close(gradient.double(), slope, rtol=rounding, atol=1e-6 * case.temperature)


@given(case=cases())
@example(case=Case(classes=1, k=1, chunk=1))
@example(case=Case(rows=1, classes=40, k=1, chunk=39, spread=1e4, logits_type=torch.float16))
@example(case=Case(classes=40, k=40, chunk=16, index_type=torch.uint32, logits_type=torch.bfloat16))
@example(case=Case(masked=True))
@example(case=Case(masked=True, tail="ghost"))
@example(case=Case(masked=True, tail="prior", values="u8"))
@example(case=Case(tail="nucleus", k=23))
@example(case=Case(rows=1, classes=2, k=1, tail="ghost", spread=1e4, logits_type=torch.float16))
@example(
    case=Case(rows=1, classes=2, k=1, temperature=1.0, tail="ghost", spread=1e4, logits_type=torch.float16, seed=216)
)
def test_sparse_equals_the_formula(case: Case) -> None:
    """Value and gradient, chunk by chunk, are those of the plain form in float64."""
    logits = case.logits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tails, "CHUNK", case.chunk)
        loss = soft_target_loss(logits, case.target(), case.temperature)
        loss.backward()
    assert loss.dtype == torch.promote_types(case.logits_type, torch.float32)
    assert_right(loss, logits.grad, logits, case)


@TAILS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 5, 23])
def test_the_gradient_is_the_slope_of_the_value(
    k: int, masked: bool, tail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite differences in float64, of rows that weigh differently."""
    case = Case(k=k, masked=masked, tail=tail, logits_type=torch.float64)
    monkeypatch.setattr(tails, "CHUNK", case.chunk)
    target, weights_B = case.target(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: (sparse_kl(logits, target, 2.0) * weights_B).sum(), (case.logits(),))


@TAILS
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_logits_far_from_zero_keep_their_digits(temperature: float, tail: Any) -> None:
    """Of logits around 10⁴ only differences count; a quotient by T, or their plain sum, would lose them."""
    case = Case(classes=200, index_type=torch.uint8, temperature=temperature, tail=tail)
    logits = (case.logits().detach() + 1e4).requires_grad_()
    loss = soft_target_loss(logits, case.target(), temperature)
    loss.backward()
    assert_right(loss, logits.grad, logits, case)


@TAILS
@pytest.mark.parametrize("logits_type", [torch.float32, torch.bfloat16])
def test_only_the_logits_of_that_size_are_kept(logits_type: torch.dtype, tail: Any) -> None:
    """No softmax, and no float32 copy of small logits, lives between the two passes."""
    case, kept = Case(rows=4, classes=200, k=3, logits_type=logits_type, tail=tail), []
    logits = case.logits()

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = soft_target_loss(logits, case.target(), case.temperature)
    large = [saved for saved in kept if saved.numel() > case.rows * case.k]
    assert [saved.data_ptr() for saved in large] == [logits.data_ptr()]
    # What the function holds beside them is of a class or of a row, and not of both.
    held = vars(loss_function(loss))
    held = {**held, **(vars(held["rest"]) if "rest" in held else {})}
    assert all(value.numel() <= case.classes for value in held.values() if isinstance(value, Tensor))
    loss.backward()


def loss_function(loss: Tensor) -> Any:
    """The node of the closed form, below those of the mean and of T²."""
    node: Any = loss.grad_fn
    while not type(node).__name__.endswith("KLBackward"):
        node = node.next_functions[0][0]
    return node


class Sizes(TorchDispatchMode):
    """Notes how many elements each freshly made tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {part.untyped_storage().data_ptr() for part in (*self.alive, *args) if isinstance(part, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            self.made.append(result.numel())
            # Freed memory would be given out again at the same address, and pass for known.
            self.alive.append(result)
        return result


@TAILS
@pytest.mark.parametrize("logits_type", [torch.float16, torch.float32])
def test_the_gradient_is_the_only_large_tensor_made(
    logits_type: torch.dtype, tail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the teacher nor the student is spread out in any step: temporaries are [B, CHUNK] (and one spare)."""
    case = Case(rows=8, classes=200, k=3, chunk=32, logits_type=logits_type, tail=tail)
    monkeypatch.setattr(tails, "CHUNK", case.chunk)
    logits, target = case.logits(), case.target()
    with Sizes() as forward:
        loss = soft_target_loss(logits, target, case.temperature)
    with Sizes() as backward:
        (gradient,) = torch.autograd.grad(loss, logits)
    spare = case.rows if tail in ("prior", "ghost") else 0
    assert max(forward.made) == case.rows * case.chunk + spare
    assert [size for size in backward.made if size > case.rows * case.chunk + spare] == [gradient.numel()]


@given(case=cases())
def test_the_dense_form_has_the_same_loss(case: Case) -> None:
    """Wherever the classes left out have each their own mass, `dense()` says the same: value and gradient."""
    if case.tail == "ghost":
        case = replace(case, tail="uniform")
    case = replace(case, spread=min(case.spread, 30.0), logits_type=torch.float32)
    here, there = case.logits(), case.logits()
    loss = soft_target_loss(here, case.target(), case.temperature)
    expected = soft_target_loss(there, case.target().dense(), case.temperature)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-5 * case.temperature**2)
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-3, atol=1e-5 * case.temperature)


@TAILS
@pytest.mark.parametrize("values", ["f16", "u8"])
def test_sequences_are_their_positions(tail: Any, values: Any) -> None:
    """The loss of [B, T, C] is that of its B · T positions, and so is the gradient, in the shape of the logits."""
    case = Case(rows=6, tail=tail, values=values)
    encoding: Encoding = Sequenced(case.encoding(), 3)
    target = encoding.decode(encoding.encode(case.teacher().reshape(2, 3, case.classes)))
    flat, deep = case.logits(), case.logits().detach().reshape(2, 3, case.classes).requires_grad_()
    loss, expected = soft_target_loss(deep, target, 2.0), soft_target_loss(flat, case.target(), 2.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert deep.grad is not None
    torch.testing.assert_close(deep.grad.flatten(0, 1), flat.grad)
    for shape in ((6, case.classes), (3, 2, case.classes), (2, 3, case.classes + 1), (2, case.classes)):
        for form in (target, target.dense()):
            with pytest.raises(MismatchError, match=r"\[2, 3, 23\]"):
                soft_target_loss(torch.zeros(shape), form, 2.0)


def test_a_ghost_is_compared_as_a_whole() -> None:
    """How a student spreads what the teacher left out does not matter to `ghost`; to `uniform` it does."""
    ghost, even = Case(tail="ghost"), Case()
    logits = ghost.logits().detach()
    ids_BK = ghost.target().indices_BK.long()
    kept_BC = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids_BK, True)
    spread_BC = logits.masked_fill(kept_BC, -torch.inf)
    flat_B1 = spread_BC.div(4).logsumexp(1, keepdim=True).mul(4) - 4 * np.log(ghost.classes - ghost.k)
    other = torch.where(kept_BC, logits, flat_B1)
    here, there = (soft_target_loss(each, ghost.target(), 4.0) for each in (logits, other))
    assert float(here) == pytest.approx(float(there), rel=1e-5)
    here, there = (soft_target_loss(each, even.target(), 4.0) for each in (logits, other))
    assert float(here) > float(there) + 1e-2


@TAILS
def test_autocast_changes_nothing(tail: Any) -> None:
    """Under autocast a student's head answers bfloat16: the loss on it is still float32, its gradient bfloat16."""
    case = Case(logits_type=torch.bfloat16, tail=tail)
    inside, outside, target = case.logits(), case.logits(), case.target()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = soft_target_loss(inside, target, case.temperature)
        loss.backward()
    expected = soft_target_loss(outside, target, case.temperature)
    expected.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert_right(loss, inside.grad, inside, case)
    torch.testing.assert_close(inside.grad, outside.grad, rtol=0, atol=0)


@TAILS
def test_scaled_gradients_survive_float16(tail: Any) -> None:
    """A loss scaled up before the backward pass scales gradients before they are rounded to float16."""
    case, scale = Case(rows=5, temperature=0.5, logits_type=torch.float16, tail=tail), 2.0**14
    logits = case.logits()
    (soft_target_loss(logits, case.target(), case.temperature) * scale).backward()
    assert logits.grad is not None
    _, slope = plain(logits, case)
    torch.testing.assert_close(logits.grad.double() / scale, slope, rtol=6e-4, atol=2e-8)


@TAILS
def test_the_layout_of_the_logits_does_not_matter(tail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed, strided or one row repeated: value and gradient are those of a plain copy."""
    case = Case(tail=tail)
    monkeypatch.setattr(tails, "CHUNK", case.chunk)
    dense = case.logits().detach()
    spaced = torch.stack([dense, dense.flip(1)], dim=2)[..., 0]
    for layout in (dense.T.contiguous().T, spaced, dense[:1].expand(case.rows, -1)):
        assert not layout.is_contiguous()
        logits = layout.requires_grad_()
        loss = soft_target_loss(logits, case.target(), case.temperature)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert_right(loss, gradient, logits, case)


@TAILS
def test_logits_without_gradient_and_logits_are_left_alone(tail: Any) -> None:
    """An evaluation needs no graph; neither pass writes on the logits or on the target."""
    case = Case(tail=tail)
    logits, target = case.logits(), case.target()
    before, values = logits.detach().clone(), target.values_BK.clone()
    loss = soft_target_loss(logits, target, case.temperature)
    loss.backward()
    free = soft_target_loss(logits.detach(), target, case.temperature)
    assert not free.requires_grad
    assert torch.equal(free, loss.detach())
    assert torch.equal(logits.detach(), before)
    torch.testing.assert_close(target.values_BK, values, rtol=0, atol=0, equal_nan=True)


@TAILS
def test_a_second_derivative_is_refused(tail: Any) -> None:
    """The closed form has one derivative; dropping the second from a sum of terms would be worse than an error."""
    case = Case(tail=tail)
    logits, target = case.logits(), case.target()
    with pytest.raises(RequestError, match="no second derivative"):
        torch.autograd.grad(soft_target_loss(logits, target, 2.0), logits, create_graph=True)
    dense = soft_target_loss(logits, target.dense(), 2.0)
    (slope,) = torch.autograd.grad(dense, logits, create_graph=True)
    slope.square().sum().backward()


@pytest.mark.parametrize("form", ["sparse", "dense"])
@TAILS
def test_a_student_that_masks_the_same_classes_has_a_finite_loss(tail: Any, form: str) -> None:
    """Where both have no mass there is nothing to compare: 0 · (−∞ + ∞) is 0, in the gradient too."""
    case = Case(tail=tail)
    target = case.target()
    target = replace(target, tail_logmass_B=torch.full_like(target.tail_logmass_B, -torch.inf))
    masked_BC = target.log_probs().isneginf()
    assert masked_BC.any()
    logits = case.logits().detach().masked_fill(masked_BC, -torch.inf).requires_grad_()
    loss = soft_target_loss(logits, target if form == "sparse" else target.dense(), case.temperature)
    loss.backward()
    assert logits.grad is not None
    assert loss.isfinite()
    assert torch.equal(logits.grad == 0, masked_BC)


@TAILS
@pytest.mark.parametrize("place", ["student", "kept", "tail"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_nan_is_not_swallowed(place: str, tail: Any, form: str) -> None:
    """A NaN of the student or of the target makes the loss NaN, whatever the tail."""
    case = Case(tail=tail)
    logits, target = case.logits().detach(), case.target()
    if place == "student":
        logits[1, 20] = torch.nan
    elif place == "kept":
        target.values_BK[1, 0] = torch.nan
    elif tail == "renormalise":
        return
    else:
        target.tail_logmass_B[1] = torch.nan
    assert soft_target_loss(logits, target if form == "sparse" else target.dense(), case.temperature).isnan()


@pytest.mark.parametrize("shape", [(3, 24), (3, 22), (4, 23), (1, 23)])
def test_a_target_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    """`gather` alone would take a larger student in silence, and a dense target spread itself over one row."""
    for target in (Case().target(), Case().target().dense()):
        with pytest.raises(MismatchError, match=r"\[3, 23\]"):
            soft_target_loss(torch.zeros(shape), target, 1.0)
