"""The same teacher behind LitServe, with its dynamic batching: a process of `bench_service.py`, run with `--others`.

Without `from __future__ import annotations`: LitServe hands the annotation of `decode_request` to FastAPI as it is.
"""

import os
from typing import Annotated

import fastapi
import litserve  # type: ignore[import-not-found,unused-ignore]
import numpy as np
import torch
from contenders import teacher_of
from other_servers import LOST_PATIENCE, WAIT
from torch import Tensor

Body = Annotated[bytes, fastapi.Body(media_type="application/octet-stream")]


class Teacher(litserve.LitAPI):  # type: ignore[misc,unused-ignore]
    """Raw bytes of uint8 [n, C, H, W] to raw bytes of float32 [n, classes]."""

    def setup(self, device: str) -> None:
        self.teacher, self.shape = teacher_of(os.environ["BENCH_CONFIG"])

    def decode_request(self, request: Body) -> Tensor:
        return torch.from_numpy(np.frombuffer(bytearray(request), np.uint8).reshape(-1, *self.shape))

    def batch(self, inputs: list[Tensor]) -> tuple[Tensor, list[int]]:
        return torch.cat(inputs), [len(one) for one in inputs]

    def predict(self, inputs: tuple[Tensor, list[int]] | Tensor) -> list[Tensor] | Tensor:
        # One item at a time is not batched at all, and so comes as it was decoded.
        if isinstance(inputs, Tensor):
            return self.teacher(inputs)["logits"]
        views_BCHW, counts = inputs
        return list(self.teacher(views_BCHW)["logits"].split(counts))

    def unbatch(self, output: list[Tensor]) -> list[Tensor]:
        return output

    def encode_response(self, output: Tensor) -> fastapi.Response:
        return fastapi.Response(output.numpy().tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    batched = Teacher(max_batch_size=int(os.environ["BENCH_ITEMS"]), batch_timeout=WAIT)
    server = litserve.LitServer(batched, accelerator="cpu", workers_per_device=1, timeout=LOST_PATIENCE)
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="error")
