"""A teacher that needs no code: a program of `torch.export`, which holds its weights and has but one mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from teacher_cache.errors import TeacherError


class ExportedModule(nn.Module):
    """A `torch.export` program behind the interface of a module: in the mode in which it was exported for good."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        """Refuses what does something else than evaluation.

        Raises:
            TeacherError: it was exported in training mode.
        """
        super().__init__()
        if _trains(program):
            hint = "Call .eval() on the module, and export it again."
            raise TeacherError("teacher.model", "must be exported in evaluation mode", "training mode", hint)
        self.program = program.module()

    def train(self, mode: bool = True) -> ExportedModule:
        """Changes nothing: the program has but one mode, and torch refuses to be asked for another."""
        return self

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Runs the program."""
        logits: Tensor = self.program(images_BCHW)
        return logits


def _trains(program: torch.export.ExportedProgram) -> bool:
    """Whether one of its operations (batch norm, dropout, …) was told to train."""
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            # Without running figures a norm has no other mode: instance norm, or batch norm that keeps none.
            follows = given.get("training") is True and given.get("running_mean") is not None
            if follows or given.get("train") is True:
                return True
    return False
