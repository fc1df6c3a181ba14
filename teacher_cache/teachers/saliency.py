"""Where a model's answer comes from: the gradient of one logit at the pixels of a view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from teacher_cache.errors import TeacherError
from teacher_cache.spec import NormalizeSpec

_FIELD = "teacher.fields.saliency"


def saliency(
    logits_of: Callable[[Tensor], Tensor], inputs_BCHW: Tensor, labels_B: Tensor, normalize: NormalizeSpec | None
) -> Tensor:
    """∂z_y/∂x for the label y and the pixels x, 0..1, of each view, of length 1: float32 [B, C, H, W].

    Simonyan, Vedaldi, Zisserman, "Deep inside convolutional networks", 2014, section 3; there its absolute value. A
    row's gradient depends on its own view alone where the model is in evaluation mode. A gradient of zeros stays
    zeros. Weights must not require gradients: none is accumulated.

    Args:
        logits_of: inputs to logits [B, K].
        inputs_BCHW: normalised views.
        labels_B: int64 class numbers.
        normalize: how views were normalised: the gradient is taken back to their pixels.

    Raises:
        TeacherError: the logits are not [B, K], a label is none of their classes, or they have no gradient that is
            the same each time.
    """
    with torch.inference_mode(False), torch.enable_grad(), _repeatable():
        # A copy that is no inference tensor, and a leaf.
        inputs_BCHW = inputs_BCHW.clone().requires_grad_()
        try:
            logits_BK = logits_of(inputs_BCHW)
            _require(logits_BK, labels_B)
            own_B = logits_BK.gather(1, labels_B.to(logits_BK.device)[:, None])
            (gradient_BCHW,) = torch.autograd.grad(own_B.sum(), inputs_BCHW)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            hint = "Set compute.device to cpu, or leave the field out."
            raise TeacherError(_FIELD, f"cannot be computed: {error}", inputs_BCHW.device, hint) from error
    return _unit(at_pixels(gradient_BCHW.float(), normalize))


def at_pixels(gradient_BCHW: Tensor, normalize: NormalizeSpec | None) -> Tensor:
    """A gradient at normalised inputs, taken back to pixels of 0..1: divided by each channel's deviation.

    Pixels are what teacher and student have in common, however each normalises them.
    """
    if normalize is None:
        return gradient_BCHW
    return gradient_BCHW / torch.tensor(normalize.std, device=gradient_BCHW.device).view(1, -1, 1, 1)


def _require(logits_BK: Tensor, labels_B: Tensor) -> None:
    if logits_BK.ndim != 2:
        rule, hint = "needs one row of logits for each view", "Leave it out: a sequence has no label's logit."
        raise TeacherError(_FIELD, rule, tuple(logits_BK.shape[1:]), hint)
    if not logits_BK.requires_grad:
        hint = "Load its weights into a module that neither detaches nor runs under no_grad."
        raise TeacherError(_FIELD, "needs a model through which gradients flow", "logits without one", hint)
    strange = labels_B[(labels_B < 0) | (labels_B >= logits_BK.shape[1])]
    if len(strange):
        rule, hint = f"needs labels in 0..{logits_BK.shape[1] - 1}", "Use weights for these classes."
        raise TeacherError(_FIELD, rule, int(strange[0]), hint)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Operations that add up in another order each time raise: two builds would end with other bytes."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _unit(gradient_BCHW: Tensor) -> Tensor:
    # In float64: squares of small gradients would vanish in float32.
    length_B111 = torch.linalg.vector_norm(gradient_BCHW.double(), dim=(1, 2, 3), keepdim=True)
    return torch.where(length_B111 == 0, 0.0, gradient_BCHW / length_B111).float()
