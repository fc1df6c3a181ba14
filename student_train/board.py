"""Step 10, board: the metrics of a run as TensorBoard reads them, beside the JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teacher_cache.errors import SpecError

FOLDER = "tensorboard"


def write_board(folder: Path, entry: Mapping[str, float]) -> None:
    """Adds one epoch's entry; an epoch that is written again, because a run was stopped there, replaces the first.

    Args:
        folder: of the run.
        entry: as in `metrics.jsonl`; `epoch` is the step.

    Raises:
        SpecError: the package tensorboard is not installed.
    """
    epoch = int(entry["epoch"])
    # A file for each epoch, closed at once: a run that is killed leaves no half-written line behind.
    with _writer()(str(folder / FOLDER), purge_step=epoch, filename_suffix=f".epoch-{epoch}") as writer:
        for name, value in entry.items():
            if name != "epoch":
                writer.add_scalar(name, value, epoch)


def require_board() -> None:
    """Says before an epoch is trained that it could not be written.

    Raises:
        SpecError: the package tensorboard is not installed.
    """
    _writer()


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        rule = "needs the package tensorboard"
        raise SpecError("tensorboard", rule, str(error), "pip install 'teacher-cache[tensorboard]'") from error
    return SummaryWriter
