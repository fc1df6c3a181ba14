"""Every error of the product, in one tree.

    TeacherCacheError
    ├── RequestError            the request was wrong                   (exit 2)
    │   ├── SpecError           a configuration names something impossible
    │   ├── SourceError         a data set cannot be opened as described
    │   └── TeacherError        a teacher cannot be loaded or does not fit the data
    ├── WorkError               the work failed; what is committed stays (exit 1)
    │   ├── BuildError          a shard could not be made
    │   │   └── StorageError    the disk or the store refuses, or does not answer
    │   ├── NonFiniteError      a teacher answered NaN or inf, or the encoding would overflow
    │   └── ServiceError        a teacher service refused or could not answer
    │       └── BudgetError     what may be spent on it is spent
    └── CacheError              a cache cannot be trusted or does not fit (exit 1)
        ├── CacheNotFoundError  there is no cache at that place          (exit 2)
        ├── FormatError         written by another version of the format
        ├── HoleError           the rows asked for are not committed
        ├── TombstoneError      the rows asked for could not be decoded when the cache was built
        ├── CorruptionError     stored bytes differ from their checksums
        ├── MismatchError       another source, teacher, recipe or encoding than the cache's
        └── ViewMismatch        the student's view differs from the one that the teacher saw

Each names the field, the rule and the value, and says what to do next. Each survives pickling, because Ray
carries errors between processes.
"""

from __future__ import annotations

from typing import ClassVar


class TeacherCacheError(Exception):
    """Base of all errors raised on purpose.

    Args:
        field: what the error is about, in the user's own words (`teacher.weights`, `views/3`).
        rule: the rule that does not hold, as a sentence without a full stop.
        value: the offending value; kept as text.
        hint: what to do next, as a sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, field: str, rule: str, value: object, hint: str) -> None:
        self.field, self.rule, self.value, self.hint = field, rule, str(value), hint
        super().__init__(field, rule, self.value, hint)

    def __str__(self) -> str:
        return f"{self.field}: {self.rule} (found: {self.value}). {self.hint}"


class RequestError(TeacherCacheError):
    """The request was wrong; nothing was done."""

    exit_code = 2


class SpecError(RequestError):
    """A configuration has an unknown key, a missing one, or a value outside its rule."""


class SourceError(RequestError):
    """A data set cannot be opened as it was described."""


class TeacherError(RequestError):
    """A teacher cannot be loaded, or its outputs do not fit the data set."""


class WorkError(TeacherCacheError):
    """The work failed; what was committed before stays valid."""


class BuildError(WorkError):
    """A shard could not be made."""


class StorageError(BuildError):
    """The disk or the store refuses, or does not answer; that says nothing of what is kept there."""


class NonFiniteError(WorkError):
    """A teacher answered NaN or inf, or a finite answer does not fit the encoding."""


class ServiceError(WorkError):
    """A teacher service refused a request or could not answer it."""


class BudgetError(ServiceError):
    """What may be spent on a teacher service is spent; all that was answered is kept."""


class CacheError(TeacherCacheError):
    """A cache cannot be trusted, or does not fit what it is asked for."""


class CacheNotFoundError(CacheError):
    """There is no cache at that place."""

    exit_code = 2


class FormatError(CacheError):
    """The cache was written by a version of the format that this code does not read."""


class HoleError(CacheError):
    """Rows were asked for that no committed shard holds."""


class TombstoneError(CacheError):
    """Rows were asked for whose sample could not be decoded when the cache was built."""


class CorruptionError(CacheError):
    """Stored bytes are not the bytes that were committed at that place."""


class MismatchError(CacheError):
    """The source, teacher, recipe or encoding is not the one that the cache was made with."""


class ViewMismatch(MismatchError):  # noqa: N818 - a fixed name
    """The student's view is not, pixel for pixel, the view that the teacher saw."""
