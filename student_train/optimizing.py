"""Step 10, optimising: from gradients to the next weights, at the pace of a schedule, and their running average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from student_train.recipes import TrainSpec
from teacher_cache.errors import NonFiniteError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def learning_rate_factor(train: TrainSpec, progress: float) -> float:
    """What the learning rate is multiplied by when so much of the run is done, 0..1.

    `cosine`: to zero over the run (Loshchilov and Hutter 2017). `step`: by `step_factor` at each milestone.
    `one_cycle`: along half a cosine from 1/25 up to 1 over 30 % of the run, then down to 1/250,000 (Smith and Topin
    2018, with the constants of torch; the momentum stays). `warmup` leads there in a straight line first.
    """
    if progress < train.warmup:
        return progress / train.warmup * learning_rate_factor(train.model_copy(update={"warmup": 0.0}), train.warmup)
    match train.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return _half_cosine(1.0, 0.0, progress)
        case "step":
            return train.step_factor ** sum(progress >= milestone for milestone in train.milestones)
        case "one_cycle":
            if progress < 0.3:
                return _half_cosine(1 / 25, 1.0, progress / 0.3)
            return _half_cosine(1.0, 1 / 250_000, (progress - 0.3) / 0.7)


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def open_optimizer(parameters: Iterable[nn.Parameter], train: TrainSpec) -> Optimizer:
    """The optimiser that a configuration describes."""
    if train.optimizer == "adamw":
        return AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
    nesterov = train.momentum > 0
    return SGD(parameters, train.lr, momentum=train.momentum, weight_decay=train.weight_decay, nesterov=nesterov)


class Stepper:
    """Takes losses, and makes a step of every `accumulate` of them."""

    def __init__(
        self, student: nn.Module, joints: Iterable[nn.Parameter], train: TrainSpec, batches: int, device: torch.device
    ) -> None:
        """Begins at step 0.

        Args:
            student: on its device.
            joints: what is trained beside it.
            train: optimiser, schedule, precision.
            batches: in an epoch; an epoch's last step is made of those that are left.
            device: of all of them.
        """
        self._train, self._student, self._device = train, student, device
        self._parameters = [*student.parameters(), *joints]
        self._batches = batches
        self.optimizer = open_optimizer(self._parameters, train)
        # What somebody's interrupted step has left there is no part of the first one.
        self.optimizer.zero_grad(set_to_none=True)
        self.total = train.epochs * -(-batches // train.accumulate)
        """Steps of the whole run."""
        self.schedule = LambdaLR(self.optimizer, lambda step: learning_rate_factor(train, min(step / self.total, 1)))
        self._scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "float16")
        average = get_ema_multi_avg_fn(train.ema) if train.ema is not None else None  # type: ignore[no-untyped-call]
        self._average = AveragedModel(student, multi_avg_fn=average, use_buffers=True) if average else None

    @property
    def progress(self) -> float:
        """The share of all steps that are done."""
        return float(self.schedule.last_epoch) / self.total

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def autocast(self) -> torch.autocast:
        """Where the student and the objective are computed in the precision that was asked for."""
        dtype = _DTYPES.get(self._train.precision)
        return torch.autocast(self._device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def take(self, loss: Tensor, batch: int) -> None:
        """A loss's gradients, and a step where enough losses have been taken.

        Args:
            loss: of one batch.
            batch: its number in the epoch.
        """
        together = self._train.accumulate
        # The last of an epoch may have fewer beside it: each counts as much as in a step of its own size.
        share = min(together, self._batches - batch // together * together)
        self._scaler.scale(loss / share).backward()  # type: ignore[no-untyped-call]
        if (batch + 1) % together and batch + 1 < self._batches:
            return
        if self._train.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._train.clip_norm)
        self._scaler.step(self.optimizer)
        scale = self._scaler.get_scale()
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._scaler.get_scale() < scale:
            # Gradients beyond float16: no weight was changed, so this was no step.
            return
        self.schedule.step()
        if self._average is not None:
            self._average.update_parameters(self._student)

    def require_finite(self) -> None:
        """Looks at all that is trained, before it is kept.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        if not all(bool(weight.isfinite().all()) for weight in self._parameters):
            hint = "Lower train.lr; the last checkpoint is from the epoch before."
            raise NonFiniteError("weights", "must stay finite", "NaN or inf", hint)

    @property
    def averaged(self) -> nn.Module:
        """The student with the running average of its weights, where one is kept; itself where not."""
        return self._student if self._average is None else self._average.module

    def cuda_generator(self) -> Tensor | None:
        """Where the GPU's random numbers are, if one is trained on."""
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next steps, besides the student's weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": {} if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
