"""A teacher of this process that is not asked about what a service has computed: its journal is looked into first.

The answers there were computed by the same teacher, in the same micro-batches, with the same threads on the same kind
of device: the journal's key says so. So the cache has the bytes that it would have had.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from services import wire
from services.answer_table import AnswerTable, Fields
from services.journal_file import NAME, JournalFile
from services.same_teacher import key_of
from services.schemas import NumericsCard
from teacher_cache.errors import TeacherError
from teacher_cache.spec import TeacherSpec, base_of
from teacher_cache.teachers import Teacher


class AdoptingTeacher:
    """Implements `teacher_cache.teachers.Teacher`: all that is said of it is said of the teacher behind it."""

    def __init__(self, teacher: Teacher, spec: TeacherSpec, device: str, threads: int) -> None:
        """Opens the journal; the entry point of `teacher.journal`.

        Args:
            teacher: who answers what is not in it.
            spec: of that teacher; `journal` names the folder.
            device: where the teacher runs.
            threads: that it runs on.

        Raises:
            TeacherError: there is no journal in that folder.
            BuildError: the file cannot be read.
        """
        folder = Path(spec.journal or "")
        if not (folder / NAME).is_file():
            hint = "It is the folder that the service was given: teacher-serve CONFIG --set service.journal=FOLDER."
            raise TeacherError("teacher.journal", f"must hold {NAME}, as a service writes it", spec.journal, hint)
        numerics = NumericsCard(
            precision=spec.precision, channels_last=spec.channels_last, threads=threads, device=device
        )
        self._teacher, self._device = teacher, device
        self._answers = AnswerTable(JournalFile(folder), key_of(teacher.fingerprint, numerics))
        self.fingerprint, self.fields = teacher.fingerprint, teacher.fields
        self.device, self.threads = teacher.device, teacher.threads

    def __call__(self, views_BCHW: Tensor, labels_B: Tensor | None = None) -> Fields:
        """uint8 [B, C, H, W] to float32 fields: all of them from the journal, or all from the teacher."""
        if labels_B is not None:
            return self._teacher(views_BCHW, labels_B)
        names = {name: base_of(name) for name in self.fields}
        found = self._answers.find(wire.identity_of(views_BCHW), tuple(set(names.values())))
        if not found.keys() >= set(names.values()):
            return self._teacher(views_BCHW)
        return {name: found[base].to(self._device) for name, base in names.items()}
