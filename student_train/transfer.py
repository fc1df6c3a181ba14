"""Step 8, transfer: the next batch is copied to the device while the present one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from student_train.batch import Batch


def one_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on a device.

    On a GPU a second stream of commands copies one batch while the first stream computes with another; from
    page-locked memory (`pin_memory`) neither waits. On a CPU there is nothing to overlap: batches pass through.

    Args:
        batches: on the CPU.
        device: where they are used.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch if device.type == "cpu" else batch.to(device)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            coming = batch.to(device)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copying)
        ahead = coming.mapped(_used_here)
    if ahead is not None:
        yield ahead


def _used_here(tensor: Tensor) -> Tensor:
    """Its memory belongs to the copying stream: it must not be given to the next copy while this one computes."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
