"""What a field is made of: the outputs of one node of a model, or of two."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from teacher_cache.errors import TeacherError
from teacher_cache.spec import FieldSpec, nodes_of


def field_value(name: str, field: FieldSpec, outputs: Mapping[str, Tensor]) -> Tensor:
    """One field of a teacher, float32.

    Args:
        name: `feature:<node>`, `attention:<node>` or `flow:<a>,<b>`, without a label.
        field: how it is pooled.
        outputs: of the nodes, by their names.

    Raises:
        TeacherError: a flow between nodes that put out no maps.
    """
    values = [outputs[node] for node in nodes_of(name)]
    if name.startswith("attention:"):
        return attention(values[0])
    if name.startswith("flow:"):
        flat = [tuple(value.shape[1:]) for value in values if value.ndim != 4]
        if flat:
            hint = "Choose nodes that put out maps."
            raise TeacherError(f"teacher.fields.{name}", "needs two maps [C, H, W]", flat[0], hint)
        return flow(*values)
    return pooled(values[0], field)


def attention(value: Tensor) -> Tensor:
    """Where a node looks: the mean over channels of the squares, [B, C, H, W] to [B, H, W], [B, N, D] to [B, N].

    Zagoruyko and Komodakis, "Paying more attention to attention", 2017, equation 2 with p = 2; raw, so that a loss
    normalises it as it likes.
    """
    channels = 1 if value.ndim == 4 else -1
    return value.float().square().mean(channels)


def to_one_size(first_BMHW: Tensor, second_BNHW: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps at the smaller height and the smaller width of both, each max-pooled to it where it is larger.

    Yim et al., "A gift from knowledge distillation", CVPR 2017, pool the larger map by its maxima, too. Where sizes
    do not divide each other, windows overlap (`adaptive_max_pool2d`). Teacher and student both go through here.
    """
    height, width = (min(first_BMHW.shape[axis], second_BNHW.shape[axis]) for axis in (2, 3))
    return _shrunk(first_BMHW, (height, width)), _shrunk(second_BNHW, (height, width))


def _shrunk(map_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(map_BCHW.shape[2:]) == size:
        return map_BCHW
    shrunk: Tensor = functional.adaptive_max_pool2d(map_BCHW, size)
    return shrunk


def flow(first_BMHW: Tensor, second_BNHW: Tensor) -> Tensor:
    """Inner products over space of the channels of two maps, divided by their places: [B, M, N].

    Yim et al., 2017, equation 1.
    """
    first, second = (value.float().flatten(2) for value in to_one_size(first_BMHW, second_BNHW))
    return first @ second.mT / first.shape[2]


def pooled(value: Tensor, field: FieldSpec) -> Tensor:
    """An output as float32, averaged over space where that is asked for."""
    value = value.float()
    return value.flatten(2).mean(2) if field.pool == "mean" and value.ndim > 2 else value
