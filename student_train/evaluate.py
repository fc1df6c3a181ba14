"""Evaluation: accuracy of a model on labelled data, always on view 0 and always in evaluation mode."""

from __future__ import annotations

import torch
from torch import nn

from student_train.data import Rows
from student_train.stream import ViewStream
from teacher_cache.errors import SpecError
from teacher_cache.spec import NormalizeSpec
from teacher_cache.views import normalize


@torch.inference_mode()
def accuracy(
    model: nn.Module, data: Rows, normalization: NormalizeSpec | None, device: str = "cpu", batch_size: int = 512
) -> float:
    """Share of rows whose largest logit is the label.

    Args:
        model: images to logits; its mode (training or evaluation) is put back afterwards.
        data: labelled rows; view 0 is used.
        normalization: what the model expects.
        device: where the model is.
        batch_size: has no effect on the result beyond rounding.

    Raises:
        SpecError: the data has no labels, or its recipe is random.
    """
    if data.labels is None:
        raise SpecError("evaluate.source", "must have labels", None, "Give a labelled source.")
    if data.views != 1:
        hint = "Use resize, center_crop and normalize only."
        raise SpecError("evaluate.views", "must have nothing random in it", data.views, hint)
    training = model.training
    model.eval()
    correct = 0
    for batch in ViewStream(data, batch_size=batch_size, fields=(), shuffle=False):
        logits_BC = model(normalize(batch.views_BCHW.to(device), normalization))
        assert batch.labels_B is not None
        correct += int((logits_BC.argmax(1).cpu() == batch.labels_B).sum())
    model.train(training)
    return correct / len(data.alive)
