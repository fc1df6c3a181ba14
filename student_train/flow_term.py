"""Step 9, flow: how one part of a network answers another, compared with the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from student_train.answer import Answer
from student_train.losses import flow_loss, flow_matrix
from student_train.objective import Shapes
from student_train.stream import Batch
from student_train.terms import OfOneField, Stateless
from student_train.weight import Weight, require_weight
from teacher_cache.errors import SpecError
from teacher_cache.teachers.node_fields import to_one_size


class Bases(nn.Module):
    """A flow matrix G [B, M', N'] in the teacher's channels: A · G · Bᵀ, [B, M, N], with A and B trained.

    It is what 1×1 convolutions without bias, behind both maps and any pooling, make of it, for less work.
    """

    def __init__(self, student: tuple[int, int], teacher: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.columns = (
            nn.Identity() if width == wanted else nn.Linear(width, wanted, bias=False)
            for width, wanted in zip(student, teacher, strict=True)
        )

    def forward(self, flow_BMN: Tensor) -> Tensor:
        """The student's matrix among the teacher's channels."""
        projected: Tensor = self.columns(self.rows(flow_BMN.mT).mT)
        return projected


@dataclass(frozen=True)
class Flow(OfOneField, Stateless):
    """Squared difference of flow matrices, the teacher's cached as `flow:<a>,<b>` (FSP: Yim et al. 2017).

    Heights and widths of student and teacher may differ; so may the student's two maps, of which the larger is
    max-pooled, as the teacher's was. Where numbers of channels differ, the paper has no answer: here the matrix is
    brought to the teacher's channels by two projections that are trained, as hints are.
    """

    nodes: tuple[str, ...]
    """Two modules of the student that put out maps; the first gives the rows, as `<a>` does."""
    field: str
    """The cached flow."""
    weight: Weight = 1.0

    name: ClassVar[str] = "flow"

    def __post_init__(self) -> None:
        require_weight(self.name, self.weight)
        if len(self.nodes) != 2:
            hint = "Name a first and a second."
            raise SpecError("flow.nodes", "must be two modules of the student", self.nodes, hint)

    def joint(self, shapes: Shapes) -> nn.Module | None:
        """Projections to the teacher's channels, or None where they are as many.

        Raises:
            SpecError: the field is no flow, or a node puts out no map.
        """
        if not self.field.rpartition("/")[2].startswith("flow:"):
            hint = "Cache a field `flow:<a>,<b>` of two of the teacher's nodes."
            raise SpecError("flow.field", "must be a flow", self.field, hint)
        for node in self.nodes:
            if len(shapes.nodes[node]) != 3:
                rule, hint = "must put out maps [C, H, W]", "Choose another module of the student."
                raise SpecError(f"flow.{node}", rule, list(shapes.nodes[node]), hint)
        first, second = (shapes.nodes[node][0] for node in self.nodes)
        rows, columns = shapes.fields[self.field]
        return None if (first, second) == (rows, columns) else Bases((first, second), (rows, columns))

    def __call__(self, answer: Answer, batch: Batch, joint: nn.Module | None, *_: object) -> Tensor:
        first, second = (answer.nodes[node] for node in self.nodes)
        flow_BMN = flow_matrix(*to_one_size(first, second))
        return flow_loss(flow_BMN if joint is None else joint(flow_BMN), batch.targets[self.field])
