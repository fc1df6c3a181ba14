"""safetensors bodies, both ways. Lengths, offsets and overlaps are checked; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from services.tensor_body import Buffer, LayoutError, Part, parts_of

MEDIA_TYPE = "application/safetensors"
_DTYPES: dict[str, torch.dtype] = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
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
    """Tensors of the types in `unpack_tensors`, and strings about them, to one body."""
    # Copies: the library refuses tensors that share their memory.
    apart = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    return bytes(safetensors.torch.save(apart, dict(metadata) if metadata else None))


def unpack_tensors(data: Buffer) -> dict[str, Tensor]:
    """A body to tensors of their own memory.

    Raises:
        WireError: it is not safetensors, or holds another dtype than U8, I32, I64, F32, F16 and BF16.
    """
    tensors = {}
    for name, part in _parts(data).items():
        dtype = _DTYPES.get(part.dtype)
        if dtype is None:
            raise WireError(name[:80], f"must be one of {', '.join(_DTYPES)}", part.dtype)
        # A copy, as the tensor must be writable and outlive the body; numpy's lets other threads run meanwhile.
        copied = torch.from_numpy(np.array(np.frombuffer(part.data, np.uint8)))
        flat = copied.view(dtype) if len(copied) else torch.empty(0, dtype=dtype)
        try:
            tensors[name] = flat.reshape(part.shape)
        except (RuntimeError, TypeError, OverflowError):
            # No bytes fit any shape that has a zero in it, also one that no number of 64 bits can count.
            raise WireError(name[:80], "must have a shape that can be", f"{len(part.shape)} dimensions") from None
    return tensors


def header_bytes(data: Buffer) -> int:
    """How long a body says that its header is."""
    return int.from_bytes(data[:8], "little")


def names_in(data: Buffer) -> frozenset[str]:
    """What the tensors of a body are called; of what `unpack_tensors` refuses to read, nothing."""
    try:
        return frozenset(_parts(data))
    except WireError:
        return frozenset()


def unpack_metadata(data: Buffer) -> dict[str, str]:
    """The strings of a body that `unpack_tensors` has accepted."""
    length = header_bytes(data)
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


def pack_images(images_BCHW: Tensor, classes_BK: Tensor | None = None) -> bytes:
    """uint8 [B, C, H, W] to a body with `images` U8 [N, H, W, C], and `classes` I64 [N, K] where there are some."""
    if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4:
        found = f"{images_BCHW.dtype} {tuple(images_BCHW.shape)}"
        raise WireError("images", "must be uint8 [B, C, H, W]", found)
    images = {"images": images_BCHW.permute(0, 2, 3, 1)}
    return pack_tensors(images if classes_BK is None else {**images, "classes": classes_BK.long()})


def as_views(images_NHWC: Tensor, view_shape: tuple[int, int, int]) -> Tensor:
    """What a body calls `images`, uint8 [N, H, W, C], to uint8 [N, C, H, W].

    Args:
        images_NHWC: as they came.
        view_shape: (C, H, W), which each image must have.

    Raises:
        WireError: they are of another type or shape, or there is none.
    """
    channels, height, width = view_shape
    if images_NHWC.dtype != torch.uint8:
        raise WireError("images", "must be U8", str(images_NHWC.dtype).removeprefix("torch."))
    shape = list(images_NHWC.shape)
    if len(shape) != 4 or shape[1:] != [height, width, channels]:
        raise WireError("images", f"must be [N, {height}, {width}, {channels}]", shape)
    if shape[0] == 0:
        raise WireError("images", "must hold at least one image", shape)
    return torch.from_numpy(np.array(images_NHWC.permute(0, 3, 1, 2).numpy(), order="C"))


def _parts(data: Buffer) -> dict[str, Part]:
    try:
        return parts_of(data)
    except LayoutError:
        raise WireError("body", "must be safetensors", f"{len(data)} bytes that are not") from None
