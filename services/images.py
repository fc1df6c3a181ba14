"""One encoded image to a teacher's input: its size is checked before its pixels are decoded."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image
from torch import Tensor

from services.problems import Problem
from services.tensor_body import Buffer
from teacher_cache.sources.base import to_chw
from teacher_cache.views.operations import CenterCrop, Resize

FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}


def decode(data: Buffer, media_type: str, view_shape: tuple[int, int, int], max_pixels: int) -> tuple[Tensor, bool]:
    """Decodes, converts to the teacher's channels, and brings to its size where that differs.

    Args:
        data: the file.
        media_type: a key of `FORMATS`; the bytes must be of that format.
        view_shape: (C, H, W) of the teacher's input; C is 1 (greyscale) or 3 (RGB).
        max_pixels: the largest width × height, before and after resizing.

    Returns:
        uint8 [1, C, H, W], and whether it was resized and cropped.

    Raises:
        Problem: 413 for too many pixels, 415 where the teacher does not take pictures, 422 for broken bytes.
    """
    if view_shape[0] not in (1, 3):
        hint = "Send safetensors."
        raise Problem(415, "Content-Type", f"this teacher takes {view_shape[0]} channels", media_type, hint)
    image_CHW = _pixels(data, media_type, "L" if view_shape[0] == 1 else "RGB", max_pixels)
    if tuple(image_CHW.shape) == view_shape:
        return image_CHW[None], False
    return _fit(image_CHW, view_shape[1], view_shape[2], max_pixels)[None], True


def _pixels(data: Buffer, media_type: str, mode: str, max_pixels: int) -> Tensor:
    kind = FORMATS[media_type]
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            _require_pixels(image.width * image.height, max_pixels)
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
        raise _too_large("more than the decoder allows", max_pixels) from None
    except Exception:
        # Decoders raise whatever they like on hostile bytes: struct.error, IndexError, zlib.error and more.
        raise _broken(kind, f"must be a whole {kind} file") from None
    return to_chw(array)


def _fit(image_CHW: Tensor, height: int, width: int, max_pixels: int) -> Tensor:
    """Resizes the shorter edge so that the image just covers (height, width), then cuts the centre."""
    tall, wide = image_CHW.shape[1:]
    short, long = min(tall, wide), max(tall, wide)
    edge = max(math.ceil(height * short / tall), math.ceil(width * short / wide))
    # A strip of 1 × 10⁶ pixels is small before it is resized, not after.
    _require_pixels(edge * (edge * long // short), max(max_pixels, height * width))
    return CenterCrop((height, width)).apply(Resize(edge).apply(image_CHW, ()), ())


def _require_pixels(found: int, most: int) -> None:
    if found > most:
        raise _too_large(found, most)


def _too_large(found: object, most: int) -> Problem:
    return Problem(413, "image", f"must have at most {most} pixels", found, "Send a smaller one.")


def _broken(kind: str, rule: str) -> Problem:
    return Problem(422, "image", rule, f"{kind} that does not", "Check the file.")
