"""safetensors bodies, both ways. Lengths, offsets and overlaps are checked; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from services.tensor_body import Buffer, LayoutError, Part, parts_of

MEDIA_TYPE = "application/safetensors"
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
}


class WireError(ValueError):
    """A body is not what was agreed.

    Args:
        field: which part.
        rule: the rule that does not hold.
        value: a dtype, a shape or a name; never content.
    """

    def __init__(self, field: str, rule: str, value: object) -> None:
        self.field, self.rule, self.value = field, rule, value
        super().__init__(field, rule, value)


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors (uint8, int32 or float32) and strings about them to one body."""
    arrays = {name: np.asarray(value.cpu().numpy(), order="C") for name, value in tensors.items()}
    return bytes(safetensors.numpy.save(arrays, dict(metadata) if metadata else None))


def unpack_tensors(data: Buffer) -> dict[str, Tensor]:
    """A body to tensors of their own memory.

    Raises:
        WireError: it is not safetensors, or holds another dtype than uint8, int32 and float32.
    """
    tensors = {}
    for name, part in _parts(data).items():
        dtype = _DTYPES.get(part.dtype)
        if dtype is None:
            raise WireError(name[:80], f"must be one of {', '.join(_DTYPES)}", part.dtype)
        # A copy: the tensor must be writable, and outlive the body.
        tensors[name] = torch.from_numpy(np.array(np.frombuffer(part.data, dtype))).reshape(part.shape)
    return tensors


def unpack_metadata(data: Buffer) -> dict[str, str]:
    """The strings of a body that `unpack_tensors` has accepted."""
    length = int.from_bytes(data[:8], "little")
    found = json.loads(bytes(data[8 : 8 + length])).get("__metadata__") or {}
    return {str(key): str(value) for key, value in found.items()}


def identity_of(images_BCHW: Tensor) -> bytes:
    """Names exact pixels, in their order: 32 bytes, and nobody can make other images that are named alike.

    Args:
        images_BCHW: uint8, in any memory format.
    """
    array = images_BCHW.cpu().contiguous().numpy()
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(array.data)
    return digest.digest()


def pack_images(images_BCHW: Tensor) -> bytes:
    """uint8 [B, C, H, W] to a body with `images` U8 [N, H, W, C]."""
    if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4:
        found = f"{images_BCHW.dtype} {tuple(images_BCHW.shape)}"
        raise WireError("images", "must be uint8 [B, C, H, W]", found)
    return pack_tensors({"images": images_BCHW.permute(0, 2, 3, 1)})


def unpack_images(data: Buffer, view_shape: tuple[int, int, int]) -> Tensor:
    """A body with `images` U8 [N, H, W, C], and nothing else, to uint8 [N, C, H, W].

    Args:
        data: the body.
        view_shape: (C, H, W), which each image must have.

    Raises:
        WireError: it is malformed, of another type or shape, or holds no image.
    """
    parts = _parts(data)
    if list(parts) != ["images"]:
        raise WireError("body", "must hold one tensor, `images`", sorted(name[:20] for name in parts)[:4])
    part, (channels, height, width) = parts["images"], view_shape
    if part.dtype != "U8":
        raise WireError("images", "must be U8", part.dtype)
    shape = part.shape
    if len(shape) != 4 or shape[1:] != (height, width, channels):
        raise WireError("images", f"must be [N, {height}, {width}, {channels}]", list(shape))
    if shape[0] == 0:
        raise WireError("images", "must hold at least one image", list(shape))
    images_NHWC = np.frombuffer(part.data, np.uint8).reshape(shape)
    return torch.from_numpy(np.array(images_NHWC.transpose(0, 3, 1, 2), order="C"))


def _parts(data: Buffer) -> dict[str, Part]:
    try:
        return parts_of(data)
    except LayoutError:
        raise WireError("body", "must be safetensors", f"{len(data)} bytes that are not") from None
