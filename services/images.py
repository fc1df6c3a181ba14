"""Encoded images to a teacher's input: a size is checked before its pixels are decoded."""

from __future__ import annotations

import io
import math
import re

import numpy as np
from PIL import Image
from torch import Tensor

from services.pixels import PixelBudget, too_many
from services.problems import Problem
from services.tensor_body import Buffer
from teacher_cache.sources.base import to_chw
from teacher_cache.views.operations import CenterCrop, Resize

FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
_BEGINNINGS = {"image/jpeg": rb"\xff\xd8\xff", "image/png": rb"\x89PNG\r\n\x1a\n", "image/webp": rb"RIFF.{4}WEBP"}


def media_type_of_file(data: Buffer) -> str | None:
    """What a file is by its first bytes; None for anything but `FORMATS`."""
    kinds = (kind for kind, beginning in _BEGINNINGS.items() if re.match(beginning, data, re.DOTALL))
    return next(kinds, None)


def decode(data: Buffer, media_type: str, view_shape: tuple[int, int, int], budget: PixelBudget) -> tuple[Tensor, bool]:
    """Decodes, converts to the teacher's channels, and brings to its size where that differs.

    Args:
        data: the file.
        media_type: a key of `FORMATS`; the bytes must be of that format.
        view_shape: (C, H, W) of the teacher's input; C is 1 (greyscale) or 3 (RGB).
        budget: what the request may still have decoded.

    Returns:
        uint8 [1, C, H, W], and whether it was resized and cropped.

    Raises:
        Problem: 413 for too many pixels, 415 where the teacher does not take pictures, 422 for broken bytes.
    """
    if view_shape[0] not in (1, 3):
        hint = "Send safetensors."
        raise Problem(415, "Content-Type", f"this teacher takes {view_shape[0]} channels", media_type, hint)
    image_CHW = _pixels(data, media_type, "L" if view_shape[0] == 1 else "RGB", budget)
    if tuple(image_CHW.shape) == view_shape:
        return image_CHW[None], False
    return _fit(image_CHW, view_shape[1], view_shape[2], budget)[None], True


def _pixels(data: Buffer, media_type: str, mode: str, budget: PixelBudget) -> Tensor:
    kind = FORMATS[media_type]
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            budget.decode(image.width, image.height)
            if image.mode.startswith(("I", "F")):
                raise _broken(kind, "must have at most 8 bits a channel")
            # The other frames would be dropped in silence. (A JPEG's are previews and gain maps.)
            if kind != "JPEG" and getattr(image, "n_frames", 1) > 1:
                raise _broken(kind, "must be a still image")
            palette = image.mode == "P" and "transparency" in image.info
            straight = image.convert("RGBA") if palette else image
            array = np.asarray(straight if straight.mode == mode else straight.convert(mode))
    except Problem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_many("more than the decoder allows", budget.most) from None
    except Exception:
        # Decoders raise whatever they like on hostile bytes: struct.error, IndexError, zlib.error and more.
        raise _broken(kind, f"must be a whole {kind} file") from None
    return to_chw(array)


def _fit(image_CHW: Tensor, height: int, width: int, budget: PixelBudget) -> Tensor:
    """Resizes the shorter edge so that the image just covers (height, width), then cuts the centre."""
    tall, wide = image_CHW.shape[1:]
    short, long = min(tall, wide), max(tall, wide)
    edge = max(math.ceil(height * short / tall), math.ceil(width * short / wide))
    budget.resize(edge, edge * long // short, height * width)
    return CenterCrop((height, width)).apply(Resize(edge).apply(image_CHW, ()), ())


def _broken(kind: str, rule: str) -> Problem:
    return Problem(422, "image", rule, f"{kind} that does not", "Check the file.")
