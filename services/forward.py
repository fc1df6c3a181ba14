"""A batch through the model; one that fails is split until the piece that breaks it is alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor

from services.batch import Batch, Placed
from services.request_log import log_failure
from services.teachers import ServedTeacher
from services.work import Fields, TeacherFailed


def forward(served: ServedTeacher, views_BCHW: Tensor, wanted: Collection[str]) -> Fields:
    """One call of the teacher; of its fields those that are wanted, on the CPU.

    Raises:
        ValueError: a field has another shape than the probe found. A user's model may raise anything else.
    """
    outputs = served.teacher(views_BCHW)
    for name, shape in served.field_shapes.items():
        if tuple(outputs[name].shape) != (len(views_BCHW), *shape):
            raise ValueError(f"{name} must be {(len(views_BCHW), *shape)}, found {tuple(outputs[name].shape)}")
    return {name: outputs[name].cpu() for name in wanted}


def answers(served: ServedTeacher, batch: Batch) -> Iterator[tuple[Placed, Fields | TeacherFailed]]:
    """What the teacher says to each piece: its own rows, or that it failed on it.

    A failing batch is halved until the piece that breaks it is alone. The rows of the other half become zeros, so
    that every piece stays where it was.
    """
    yield from _answers(served, batch, batch.views_BCHW, batch.placed)


def _answers(
    served: ServedTeacher, batch: Batch, views_BCHW: Tensor, among: list[Placed]
) -> Iterator[tuple[Placed, Fields | TeacherFailed]]:
    try:
        outputs = forward(served, views_BCHW, {name for placed in among for name in placed.request.fields})
    except Exception as error:
        # Whatever a user's model raises belongs to somebody's request; the thread goes on.
        if len(among) == 1:
            log_failure(f"teacher {served.name} failed on one request", error)
            yield among[0], TeacherFailed()
            return
        half = len(among) // 2
        for part in (among[:half], among[half:]):
            yield from _answers(served, batch, batch.only(part), part)
        return
    for placed in among:
        yield placed, {name: outputs[name][placed.rows] for name in placed.request.fields}
