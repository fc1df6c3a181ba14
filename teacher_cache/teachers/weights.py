"""State dicts from files, without ever running what is in them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from teacher_cache.errors import TeacherError


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Reads `.safetensors`, or a `.pt`/`.pth` file with `weights_only=True`.

    Raises:
        TeacherError: the file is missing, of another kind, or holds more than tensors.
    """
    hint = "Save a plain state dict: torch.save(model.state_dict(), path)."
    if not Path(path).is_file():
        raise TeacherError("teacher.weights", "must be a file", path, "Check the path.")
    try:
        if path.endswith(".safetensors"):
            return dict(safetensors.torch.load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise TeacherError("teacher.weights", f"cannot be read: {error}", path, hint) from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise TeacherError("teacher.weights", "must hold a state dict of tensors", type(loaded).__name__, hint)
    return dict(loaded)


def load_into(module: nn.Module, path: str) -> None:
    """Loads a state dict strictly: every parameter of the module, and nothing else."""
    try:
        module.load_state_dict(read_state_dict(path), strict=True)
    except RuntimeError as error:
        hint = "Check `teacher.model` and `teacher.arguments` against the file."
        raise TeacherError("teacher.weights", f"do not fit the model: {error}", path, hint) from error


def state_digest(module: nn.Module) -> str:
    """Names every tensor of a module's state: name, type, shape and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
