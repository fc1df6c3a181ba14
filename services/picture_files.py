"""Pictures on the disk of whoever asks: read, put together in one body, and shared out among requests that fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from services import wire
from services.prediction import SUFFIXES
from services.schemas import LimitsCard
from services.transport import Asked
from services.wish import Wish
from teacher_cache.errors import TeacherError

_HEADER = 4096
"""Bytes of a body that are no file's, without its offsets."""


def read_picture(path: str | Path) -> bytes:
    """One file; `TeacherError` where it cannot be read, or its suffix is none of JPEG's, PNG's and WebP's."""
    if Path(path).suffix.lower() not in SUFFIXES:
        hint = "Convert it, or send its pixels with predict()."
        raise TeacherError("path", f"must end in {', '.join(SUFFIXES)}", path, hint)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TeacherError("path", "must be a readable file", path, f"Check it: {error}.") from error


def ask_file(path: str | Path, wish: Wish) -> Asked:
    """One picture; raises as `read_picture` does."""
    return wish.ask(read_picture(path), SUFFIXES[Path(path).suffix.lower()])


def ask_files(paths: Sequence[str | Path], wish: Wish) -> Asked:
    """Several pictures in one request.

    Raises:
        TeacherError: there is none, or one cannot be read.
    """
    if not paths:
        raise TeacherError("paths", "must name at least one file", "none", "Name one.")
    files = [read_picture(path) for path in paths]
    offsets = torch.tensor([0, *map(len, files)], dtype=torch.int64).cumsum(0)
    blob = torch.frombuffer(bytearray(b"".join(files)) or bytearray(1), dtype=torch.uint8)[: int(offsets[-1])]
    return wish.ask(wire.pack_tensors({"blob": blob, "offsets": offsets}), wire.MEDIA_TYPE)


def grouped(paths: Sequence[str | Path], limits: LimitsCard) -> list[list[str | Path]]:
    """Neighbours that one request may carry together: so many images, bytes and pixels as the card says.

    A file that fits nowhere is alone: the service says why.
    """
    groups: list[list[str | Path]] = []
    images = size = pixels = 0
    for path in paths:
        more, area = Path(path).stat().st_size + 8, _area(path)
        fits = images < limits.images and size + more <= limits.body_bytes and pixels + area <= limits.pixels
        if not groups or not fits:
            groups.append([])
            images, size, pixels = 0, _HEADER, 0
        groups[-1].append(path)
        images, size, pixels = images + 1, size + more, pixels + area
    return groups


def _area(path: str | Path) -> int:
    """Width × height as the file's header has them; 0 where it is no picture, which costs the service nothing."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except (OSError, Image.DecompressionBombError):
        return 0
