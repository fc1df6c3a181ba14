"""The same teacher behind mosec, with its dynamic batching: a process of `bench_service.py`, run with `--others`."""

from __future__ import annotations

import os

import mosec  # type: ignore[import-not-found,unused-ignore]
import numpy as np
import torch
from contenders import teacher_of
from other_servers import WAIT
from torch import Tensor


class Teacher(mosec.Worker):  # type: ignore[misc,unused-ignore]
    """Raw bytes of uint8 [n, C, H, W] to raw bytes of float32 [n, classes]."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.shape = teacher_of(os.environ["BENCH_CONFIG"])

    def deserialize(self, data: bytes) -> Tensor:
        return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8).reshape(-1, *self.shape))

    def forward(self, data: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
        # One item at a time is not batched at all, and so comes as it was decoded.
        if isinstance(data, Tensor):
            return self.teacher(data)["logits"]
        return list(self.teacher(torch.cat(data))["logits"].split([len(one) for one in data]))

    def serialize(self, data: Tensor) -> bytes:
        return data.numpy().tobytes()


if __name__ == "__main__":
    server = mosec.Server()
    server.append_worker(Teacher, max_batch_size=int(os.environ["BENCH_ITEMS"]), max_wait_time=int(WAIT * 1000))
    server.run()
