"""Step 10, together: the processes that train one student, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from student_train.steps import Share
from teacher_cache.teachers import resolve_device

T = TypeVar("T")
_LONGEST = timedelta(hours=3)
"""For which the others wait: while the first one evaluates, and while it writes."""


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is; alone, it is the first of one and nothing is exchanged."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """The part of every batch that is this process's."""
        return Share(self.rank, self.size)

    def parallel(self, module: nn.Module, idle: bool) -> nn.Module:
        """The module whose gradients are the mean over all processes.

        Args:
            module: on its device.
            idle: whether some weights may have no gradient in some steps.
        """
        return DistributedDataParallel(module, find_unused_parameters=idle)

    def summed(self, values: Mapping[str, tuple[Tensor, int]], device: torch.device) -> dict[str, tuple[float, float]]:
        """Pairs (sum, rows) by name, added over all processes; one exchange for all of them."""
        names = sorted(values)
        table = torch.tensor([[float(values[name][0]), values[name][1]] for name in names], dtype=torch.float64)
        if self.size > 1:
            table = table.to(device)
            distributed.all_reduce(table)
        return {name: (total, rows) for name, (total, rows) in zip(names, table.tolist(), strict=True)}

    def told(self, found: T) -> T:
        """What the first process found, in all of them; the others wait for it."""
        if self.size == 1:
            return found
        box = [found]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, rows_BD: Tensor) -> Tensor:
        """The rows of all processes, in their order: those of the whole batch. No gradient passes."""
        if self.size == 1:
            return rows_BD
        parts = [torch.empty_like(rows_BD) for _ in range(self.size)]
        distributed.all_gather(parts, rows_BD.contiguous())
        return torch.cat(parts)

    def reseed(self, seed: int, epoch: int) -> None:
        """Other random numbers in each process, for what a student draws: the first one's are those of a run alone."""
        if not self.first:
            words = blake2b(f"{seed}/{epoch}/{self.rank}".encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(words, "little") >> 1)

    def share_buffers(self, student: nn.Module) -> None:
        """The first process's buffers in all of them: each has kept running figures of its own rows."""
        if self.size > 1:
            for buffer in student.buffers():
                distributed.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()


def world() -> World:
    """The world that this process is part of."""
    if not distributed.is_initialized():
        return World()
    return World(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def joining(device: str) -> Iterator[World]:
    """Joins the other processes, where `torchrun` started some; each takes the GPU of its local rank.

    Args:
        device: as a configuration says it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    kind = resolve_device(device)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_LONGEST)
    try:
        yield world()
    finally:
        distributed.destroy_process_group()
