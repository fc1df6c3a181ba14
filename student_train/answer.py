"""Step 9, answer: what a student says of a batch, its logits and whatever of its inside the objective compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from teacher_cache.errors import SpecError


@dataclass(frozen=True, eq=False)
class Answer:
    """A student's outputs for one batch; gradients flow through all of them."""

    logits_BC: Tensor
    nodes: Mapping[str, Tensor] = field(default_factory=dict)
    """What its tapped modules put out, by name."""
    inputs_BCHW: Tensor | None = None
    """What it was shown, where that was asked for: gradients flow to it, also from within `torch.no_grad`."""


class Taps:
    """A student whose modules are listened to; closing it leaves the student as it was.

    The student stays the plain module that it is: its weights and their names are what a checkpoint keeps.
    """

    def __init__(
        self, student: nn.Module, nodes: Sequence[str], inputs: bool = False, *, compiled: bool = False
    ) -> None:
        """Listens to some of its modules.

        Args:
            student: images to logits.
            nodes: names as `named_modules` has them.
            inputs: whether answers keep what was shown, to be differentiated at.
            compiled: whether `torch.compile` makes the forward pass; the student itself is not changed by that.

        Raises:
            SpecError: the student has no such module.
        """
        self._student, self._nodes, self._inputs = student, tuple(nodes), inputs
        self._run: Callable[[Tensor], object] = _compiled(student) if compiled else student
        self._kept: dict[str, Tensor] = {}
        self._listening = False
        self._handles: list[RemovableHandle] = []
        known = dict(student.named_modules())
        for node in self._nodes:
            if not node or node not in known:
                names = ", ".join(name for name in known if name)[:400]
                raise SpecError("node", "must be a module of the student", node, f"Modules: {names}.")
        self._handles = [known[node].register_forward_hook(partial(self._keep, node)) for node in self._nodes]

    def _keep(self, node: str, _module: nn.Module, _inputs: object, output: object) -> None:
        if not self._listening:
            # Whoever else runs the student, or a copy of it, is not listened to.
            return
        if not isinstance(output, Tensor):
            rule = "must be a module that puts out one tensor"
            raise SpecError("node", rule, f"{node}: {type(output).__name__}", "Choose another module.")
        if node in self._kept:
            hint = "Choose the module that holds it, or one that runs once."
            raise SpecError("node", "runs more than once in a forward pass", node, hint)
        # A copy that gradients pass through: an in-place ReLU that follows would overwrite the tapped tensor.
        self._kept[node] = output.clone()

    def __call__(self, images_BCHW: Tensor) -> Answer:
        """One forward pass.

        Raises:
            SpecError: a tapped module did not run, or more than once; or the student answers more than logits.
        """
        self._kept.clear()
        self._listening = True
        if self._inputs:
            images_BCHW = images_BCHW.detach().requires_grad_()
        try:
            with torch.set_grad_enabled(self._inputs or torch.is_grad_enabled()):
                logits_BC: object = self._run(images_BCHW)
        finally:
            self._listening = False
        if not isinstance(logits_BC, Tensor):
            hint = "Switch its other heads off (of some models `arguments: {aux_logits: false}`), or wrap it."
            raise SpecError("student.model", "must answer one tensor", type(logits_BC).__name__, hint)
        silent = [node for node in self._nodes if node not in self._kept]
        if silent:
            hint = "It has no part in a forward pass: choose another."
            raise SpecError("node", "must run in a forward pass", silent[0], hint)
        kept = dict(self._kept)
        self._kept.clear()
        return Answer(logits_BC, kept, images_BCHW if self._inputs else None)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """With the student in evaluation mode, and then as it was: a look at it must not count as training."""
        before, run = self._student.training, self._run
        self._student.eval()
        # A single look is not worth compiling a second mode for.
        self._run = self._student
        try:
            yield
        finally:
            self._student.train(before)
            self._run = run

    def __deepcopy__(self, _memo: object) -> Taps:
        # A copy of the student takes its hooks along. They find this one, who is not listening while the copy runs.
        return self

    def close(self) -> None:
        """Listens no longer."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _compiled(student: nn.Module) -> Callable[[Tensor], object]:
    # Compiled code is kept by class, and does not ask whether a module is listened to: another run's may be deaf.
    torch.compiler.reset()
    return torch.compile(student)
