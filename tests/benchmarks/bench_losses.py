"""The sparse soft-target loss on the CPU: forward and backward against the dense loss and plain cross-entropy.

    python tests/benchmarks/bench_losses.py [--json]

The three are timed in turns within one run, so that a machine that slows down slows all of them; a figure is the
median over the rounds, a ratio the median of the rounds' ratios. The dense loss gets its target ready in float32.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from bench_views import Rows, in_turns, ratio, run
from torch import Tensor
from torch.nn import functional

from student_train.losses import soft_target_loss
from teacher_cache.encodings import DenseTarget, TopKLogits

SHAPES = ((64, 1_000), (32, 32_000), (8, 128_000))
"""Rows and classes: ImageNet, and the vocabularies of two language models."""
K = 32
TEMPERATURE = 2.0


def step(logits_BC: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    """One forward and one backward pass, down to the gradient in the logits."""
    return lambda: torch.autograd.grad(loss_of(logits_BC), logits_BC)


def compare(rows: int, classes: int, logits_type: torch.dtype, rounds: int) -> Rows:
    """One shape: milliseconds of the three, and the sparse loss as a share of the others."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(rows, classes, generator=generator)
    labels_B = torch.randint(0, classes, (rows,), generator=generator)
    student = (3 * torch.randn(rows, classes, generator=generator)).to(logits_type).requires_grad_()
    encoding = TopKLogits(classes, K)
    sparse, dense = encoding.decode(encoding.encode(teacher)), DenseTarget(teacher)
    ours, spread, hard = in_turns(
        rounds,
        step(student, lambda logits: soft_target_loss(logits, sparse, TEMPERATURE)),
        step(student, lambda logits: soft_target_loss(logits, dense, TEMPERATURE)),
        step(student, lambda logits: functional.cross_entropy(logits, labels_B)),
    )
    name = f"{rows} × {classes:,} {str(logits_type).removeprefix('torch.')}"
    times = {"sparse": ours, "dense": spread, "cross-entropy": hard}
    return {
        **{f"{name}: {loss}, ms": f"{statistics.median(each) * 1e3:.2f}" for loss, each in times.items()},
        f"{name}: sparse ÷ dense": f"{ratio(ours, spread):.2f}",
        f"{name}: sparse ÷ cross-entropy": f"{ratio(ours, hard):.2f}",
    }


if __name__ == "__main__":
    types = (torch.float32, torch.bfloat16)
    run((partial(compare, rows, classes, kind) for rows, classes in SHAPES for kind in types), __doc__)
