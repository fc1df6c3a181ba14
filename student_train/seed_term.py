"""Step 9, SEED: which rows seen before a row is like, as a teacher without classes has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from student_train.answer import Answer
from student_train.feature_terms import OfFeatures, as_field
from student_train.losses import FeatureQueue, seed_loss
from student_train.losses.teacher import dense_values
from student_train.objective import Shapes, joined
from student_train.stream import Batch
from student_train.terms import require_positive
from student_train.together import world
from teacher_cache.encodings import DenseTarget
from teacher_cache.errors import SpecError


class Queued(nn.Module):
    """A projection to the teacher's width, and the teacher's features of the rows before: both are a run's state."""

    def __init__(self, student: int, teacher: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Identity() if student == teacher else nn.Linear(student, teacher)
        self.queue = FeatureQueue(size, teacher)

    def get_extra_state(self) -> dict[str, Any]:
        """The queue, for a checkpoint."""
        return self.queue.state_dict()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """The queue as a checkpoint has it."""
        self.queue.load_state_dict(state)


@dataclass(frozen=True)
class SEED(OfFeatures):
    """Similarities to the rows seen before, as a self-supervised teacher has them (Fang et al. 2021).

    It needs neither logits nor labels. The queue is the stream itself: after each batch that was trained on, its
    cached features go in. Through a linear layer that is trained where widths differ; a student's map is averaged
    over space.
    """

    student_temperature: float = 0.2
    teacher_temperature: float = 0.01
    queue: int = 65_536
    """Rows that are compared with; they are in every checkpoint, 4 bytes a number."""

    name: ClassVar[str] = "seed"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("seed.student_temperature", self.student_temperature)
        require_positive("seed.teacher_temperature", self.teacher_temperature)
        if self.queue < 1:
            raise SpecError("seed.queue", "must be at least 1", self.queue, "Choose another number of rows.")

    def joint(self, shapes: Shapes) -> nn.Module:
        """The projection and an empty queue.

        Raises:
            SpecError: the cached field is no vector, or the node neither a vector nor a map.
        """
        student, teacher = shapes.nodes[self.node], shapes.fields[self.field]
        if len(teacher) != 1:
            hint = "Cache it with `pool: mean`."
            raise SpecError("seed.field", f"{self.field} must be one vector a row", list(teacher), hint)
        if len(student) not in (1, 3):
            hint = "Choose another module of the student."
            raise SpecError(f"seed.{self.node}", "must put out a vector or a map", list(student), hint)
        return Queued(student[0], teacher[0], self.queue)

    def __call__(self, answer: Answer, batch: Batch, joint: nn.Module | None, *_: object) -> Tensor:
        target, beside = batch.targets[self.field], joined(joint, Queued, self.name)
        projected = beside.projection(as_field(answer.nodes[self.node], target))
        return seed_loss(projected, target, beside.queue, self.student_temperature, self.teacher_temperature)

    def remember(self, batch: Batch, joint: nn.Module | None) -> None:
        """Takes the batch's cached features into the queue, those of all processes: each has the same one."""
        features_BD = dense_values(batch.targets[self.field], "seed_loss")
        joined(joint, Queued, self.name).queue.push(DenseTarget(world().gathered(features_BD)))
