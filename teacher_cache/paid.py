"""Where the answers of a teacher that is behind a URL are kept until a cache holds them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from teacher_cache.errors import SpecError
from teacher_cache.spec import BuildSpec
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.storage.root import open_root
from teacher_cache.teachers import RemoteTeacher, Teacher
from teacher_cache.teachers.base import Bill


def with_journal(spec: BuildSpec) -> BuildSpec:
    """The same build with its journal's folder spelled out, for workers that run elsewhere: beside the cache, unless
    one is named.

    Raises:
        SpecError: the cache is in an object store, which has no place beside it, and no folder is named.
    """
    teacher = spec.teacher
    if "://" not in teacher.model and teacher.journal is None:
        return spec
    if teacher.journal is not None:
        folder = Path(teacher.journal)
    else:
        root = open_root(spec.cache)
        if not isinstance(root, LocalRoot):
            hint = "For example teacher.journal: runs/answers."
            raise SpecError("teacher.journal", "must name a folder where the cache is not in one", "none", hint)
        folder = root.path.absolute().with_name(f"{root.path.absolute().name}.journal")
    named = teacher.model_copy(update={"journal": str(folder.absolute())})
    return spec.model_copy(update={"teacher": named})


def settle(spec: BuildSpec, teacher: Teacher) -> Bill | None:
    """The cache holds all answers now; a journal that the configuration names is the user's, and stays as it is.

    Args:
        spec: as the user gave it, without `with_journal`.
        teacher: that was asked.

    Returns:
        What whoever pays should know; None for a teacher of this process.
    """
    return teacher.settle(spec.teacher.journal is None) if isinstance(teacher, RemoteTeacher) else None


@contextlib.contextmanager
def closed_after(teacher: Teacher) -> Iterator[None]:
    """Whatever happens, no request and no journal of a remote teacher is left open."""
    try:
        yield
    finally:
        if isinstance(teacher, RemoteTeacher):
            teacher.close()
