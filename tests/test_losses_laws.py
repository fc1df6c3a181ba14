"""What holds for every loss: types, constants, degenerate batches, refusals. A new loss in `LOSSES` inherits it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loss_laws import LOSSES, Loss, dense, drawn, pair, slope, student_of

from teacher_cache.encodings import DenseTarget, TopKLogits
from teacher_cache.errors import MismatchError

EVERY = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
ROWS = 5
STEEPEST = 1e3
"""No gradient of inputs of size 1 is beyond: where a formula divides by nothing, 10⁷ to 10¹² come out."""


@EVERY
def test_gradients_are_those_of_the_value(loss: Loss) -> None:
    student, teacher = pair(1, ROWS, *loss.shape)
    target = dense(teacher)
    logits = student_of(student, torch.float64)
    assert torch.autograd.gradcheck(lambda values: loss.value(values, target), (logits,), atol=1e-4, rtol=1e-3)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_small_types_are_worked_on_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    """The value is that of the same numbers in float32, and the gradient comes back in their own type."""
    student, teacher = pair(2, ROWS, *loss.shape)
    small = student_of(student, dtype)
    value = loss.value(small, DenseTarget(torch.tensor(teacher, dtype=torch.float32)))
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = student_of(small, torch.float32)
    expected = loss.value(wide, DenseTarget(torch.tensor(teacher, dtype=torch.float32)))
    torch.testing.assert_close(value.float(), expected, rtol=1e-5, atol=1e-6)
    gradient = slope(value, small)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, slope(expected, wide).to(dtype), rtol=1e-2, atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = pair(3, ROWS, *loss.shape)
    target = DenseTarget(torch.tensor(teacher, dtype=torch.float32))
    inside, outside = student_of(student, dtype), student_of(student, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss.value(inside, target)
    expected = loss.value(outside, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.equal(slope(value, inside), slope(expected, outside))


@EVERY
def test_the_teacher_is_a_constant(loss: Loss) -> None:
    """Also where its numbers have a graph, as those of a live source may."""
    student, teacher = pair(4, ROWS, *loss.shape)
    values = student_of(teacher)
    loss.value(student_of(student), DenseTarget(values)).backward()
    assert values.grad is None


@EVERY
def test_half_precision_targets_are_read_in_float32(loss: Loss) -> None:
    student, teacher = pair(5, ROWS, *loss.shape)
    half = torch.tensor(teacher, dtype=torch.float16)
    value = loss.value(torch.tensor(student).float(), DenseTarget(half))
    assert torch.equal(value, loss.value(torch.tensor(student).float(), DenseTarget(half.float())))


@EVERY
def test_a_student_that_equals_the_teacher_has_the_least_loss(loss: Loss) -> None:
    """None of the losses turns away from the teacher: a step against the gradient comes nearer."""
    student, teacher = pair(6, ROWS, *loss.shape)
    if loss.least is not None:
        same = student_of(teacher)
        value = loss.value(same, dense(teacher))
        assert float(value.detach()) == pytest.approx(loss.least, abs=1e-5)
        assert slope(value, same).abs().max() < 1
    here = student_of(student, torch.float64)
    value = loss.value(here, dense(teacher))
    moved = here.detach() - 1e-3 * slope(value, here)
    assert float(loss.value(moved, dense(teacher))) < float(value.detach())


ZEROS, ONES = np.zeros, np.ones
DEGENERATE: dict[str, tuple[Any, Any]] = {
    "zeros of the student": (lambda n, *s: ZEROS((n, *s)), lambda n, *s: drawn(1, n, *s)),
    "zeros of the teacher": (lambda n, *s: drawn(1, n, *s), lambda n, *s: ZEROS((n, *s))),
    "zeros of both": (lambda n, *s: ZEROS((n, *s)), lambda n, *s: ZEROS((n, *s))),
    "constants": (lambda n, *s: 0.1 * ONES((n, *s)), lambda n, *s: -3.3 * ONES((n, *s))),
    "constants up to rounding": (lambda n, *s: 3 + 1e-7 * drawn(4, n, *s), lambda n, *s: drawn(5, n, *s)),
    "one row many times": (lambda n, *s: np.tile(drawn(1, 1, *s), (n, *len(s) * [1])), lambda n, *s: drawn(2, n, *s)),
    "one teacher's row": (lambda n, *s: drawn(2, n, *s), lambda n, *s: np.tile(drawn(1, 1, *s), (n, *len(s) * [1]))),
    "equal": (lambda n, *s: drawn(1, n, *s), lambda n, *s: drawn(1, n, *s)),
    "large": (lambda n, *s: drawn(1, n, *s, spread=1e3), lambda n, *s: drawn(2, n, *s, spread=1e3)),
    "opposite": (lambda n, *s: drawn(1, n, *s, spread=100), lambda n, *s: -drawn(1, n, *s, spread=100)),
}


@EVERY
@pytest.mark.parametrize("rows", [1, 2, ROWS])
@pytest.mark.parametrize("case", DEGENERATE.values(), ids=list(DEGENERATE))
def test_degenerate_batches_have_finite_losses_and_gradients(loss: Loss, rows: int, case: tuple[Any, Any]) -> None:
    if loss.widths_differ and case is DEGENERATE["constants up to rounding"]:
        pytest.skip("free of scale by definition, so steep where all rows nearly coincide")
    make_student, make_teacher = case
    student = student_of(make_student(rows, *loss.shape))
    value = loss.value(student, DenseTarget(torch.tensor(make_teacher(rows, *loss.shape)).float()))
    gradient = slope(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()
    # A gradient of differences grows with them; what is forbidden is one that comes of a division by nothing.
    assert gradient.abs().max() < STEEPEST * max(1.0, float(student.detach().abs().max()))


@EVERY
@pytest.mark.parametrize("place", ["student", "teacher"])
def test_nan_is_not_swallowed(loss: Loss, place: str) -> None:
    student, teacher = pair(7, ROWS, *loss.shape)
    (student if place == "student" else teacher).flat[-1] = np.nan
    assert loss.value(torch.tensor(student), dense(teacher)).isnan()


@EVERY
def test_other_shapes_are_refused(loss: Loss) -> None:
    """One row would be spread over all of the target's without a word."""
    target = dense(drawn(8, ROWS, *loss.shape))
    wrong = [(1, *loss.shape), (ROWS + 1, *loss.shape)]
    if not loss.widths_differ:
        wrong += [(ROWS, *loss.shape[:-1], loss.shape[-1] + 1), (ROWS, *loss.shape[:-1], 1)]
    for shape in wrong:
        with pytest.raises(MismatchError, match=str(ROWS)):
            loss.value(torch.zeros(shape), target)


@EVERY
def test_sparse_targets_are_followed_or_refused(loss: Loss) -> None:
    """Each says what to do; none reads the numbers that stand in the place of the classes left out."""
    if len(loss.shape) != 1:
        pytest.skip("not a row of classes")
    encoding = TopKLogits(6, 3)
    target = encoding.decode(encoding.encode(torch.tensor(drawn(9, ROWS, 6)).float()))
    follow = {name for name in ("soft_target", "dkd", "nkd") if LOSSES[name] is loss}
    if follow:
        value = loss.value(torch.zeros(ROWS, 6), target)
        assert float(value) == pytest.approx(float(loss.value(torch.zeros(ROWS, 6), target.dense())), rel=1e-4)
        return
    with pytest.raises(MismatchError, match="dense"):
        loss.value(torch.zeros(ROWS, 6), target)
