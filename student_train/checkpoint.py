"""Checkpoints: one file with the plain student and everything needed to go on exactly, written whole."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from teacher_cache.errors import MismatchError
from teacher_cache.storage import write_atomic

CHECKPOINT = "checkpoint.pt"
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped."""

    student: dict[str, Any]
    """A plain state dict: no wrapper, no projection, nothing of the teacher."""
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    stream: dict[str, Any]
    history: list[dict[str, float]]
    run: str
    """Fingerprint of the configuration: a checkpoint of another run is refused."""
    generator: torch.Tensor
    """torch's CPU generator: students with dropout draw from it. Those that draw elsewhere do not go on exactly."""
    scaler: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Any] = field(default_factory=dict)
    """The running average of the weights, where one is kept."""
    cuda_generator: torch.Tensor | None = None
    """The GPU's generator, where one was trained on."""
    objective: dict[str, Any] = field(default_factory=dict)
    """What is trained beside the student."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replaces the run's checkpoint at once."""
    buffer = io.BytesIO()
    torch.save(vars(checkpoint), buffer)
    write_atomic(folder, CHECKPOINT, buffer.getvalue())


def load_checkpoint(folder: Path, run: str) -> Checkpoint | None:
    """The run's checkpoint, or None where there is none.

    Raises:
        MismatchError: it belongs to a run with another configuration.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    found = Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    if found.run != run:
        hint = "Choose another `run` folder, or remove this one to begin again."
        raise MismatchError(str(path), f"must be of this configuration ({run})", found.run, hint)
    return found


def save_model(folder: Path, student: nn.Module) -> Path:
    """Writes the student's plain weights as safetensors: ready to be served, or to be a teacher."""
    # Copies, because weights that two modules share would be refused.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in student.state_dict().items()}
    write_atomic(folder, MODEL, safetensors.torch.save(state))
    return folder / MODEL
