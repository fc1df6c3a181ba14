"""Verify, answers: a sample of rows asked of the teacher again, in the micro-batch in which each was computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.addition import Addition
from teacher_cache.agreement import NOISE, disagreement
from teacher_cache.errors import MismatchError, TeacherCacheError
from teacher_cache.plan import Opened
from teacher_cache.problem import Problem, problem_of
from teacher_cache.reader import Cache
from teacher_cache.shard_job import Again, Job, answer_again, job_of
from teacher_cache.spec import is_logits
from teacher_cache.teachers import load_teacher, resolve_device


@dataclass
class Recomputed:
    """What asking again has shown."""

    rows: int = 0
    """Rows that were compared."""
    exact: int = 0
    """Rows of which every stored byte came out again."""
    problems: list[Problem] = field(default_factory=list)

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs and does no harm."""
        if self.problems or self.exact == self.rows:
            return ()
        other = self.rows - self.exact
        return (
            f"{other} of {self.rows} rows come out with other bytes here, as near as rounding on another processor or "
            "another library brings them. `repair` needs the machine that built the cache, or one like it.",
        )


def open_again(cache: Cache, addition: Addition) -> Opened:
    """The parts of an addition's build, opened again, each of them the cache's own.

    What the loader reads is compared with what the teacher saw, and the cache's tombstones stay tombstones.

    Raises:
        MismatchError: source, recipe or teacher is another one now.
        RequestError: one of them cannot be opened.
    """
    spec = cache.spec_of(addition)
    teacher = load_teacher(spec.teacher, cache.recipe.normalize, resolve_device(spec.compute.device))
    if teacher.fingerprint != addition.identity.teacher:
        rule = "must be the one that made this cache"
        raise MismatchError("teacher", rule, teacher.fingerprint, "Point it at the same weights.")
    return Opened(spec, cache.source, cache.key_digests, cache.recipe, teacher, cache.loader)


def recompute(cache: Cache, sample: dict[int, dict[int, list[int]]]) -> Recomputed:
    """Asks the teachers again.

    Args:
        cache: an open cache.
        sample: by the place of an addition, for each view row numbers that are alive.
    """
    done = Recomputed()
    threads = torch.get_num_threads()
    try:
        for place, views in sample.items():
            job = job_again(cache, cache.manifest.additions[place])
            for view, rows in views.items():
                _recompute_view(cache, job, view, rows, done)
    except TeacherCacheError as error:
        done.problems.append(problem_of(error))
    finally:
        torch.set_num_threads(threads)
    return done


def job_again(cache: Cache, addition: Addition) -> Job:
    """A job that computes what an addition holds; sets this process's threads, which can change a logit's last bit."""
    torch.set_num_threads(cache.spec_of(addition).compute.threads)
    return job_of(cache.root, addition, open_again(cache, addition), known=cache)


def _recompute_view(cache: Cache, job: Job, view: int, sampled: list[int], done: Recomputed) -> None:
    left = set(sampled)
    while left:
        row = min(left)
        try:
            again = answer_again(job, view, row)
        except TeacherCacheError as error:
            # The rows beside it meet the same error.
            if (problem := problem_of(error)) not in done.problems:
                done.problems.append(problem)
            left.discard(row)
            continue
        wanted = [place for place, number in enumerate(again.rows) if number in left]
        left -= {*again.rows, *again.broken}
        if wanted:
            _compare(cache, job, view, again, wanted, done)


def _compare(cache: Cache, job: Job, view: int, again: Again, wanted: list[int], done: Recomputed) -> None:
    rows = [again.rows[place] for place in wanted]
    same = np.ones(len(rows), np.bool_)
    for name, columns in again.columns.items():
        stored, fresh = (
            cache.columns(f"{job.addition.teacher}/{name}", view, rows),
            {part: values[wanted] for part, values in columns.items()},
        )
        equal = _equal_rows(stored, fresh)
        same &= equal
        if not equal.all():
            done.problems += _differences(cache, job, view, name, rows, stored, fresh)
    done.rows += len(rows)
    done.exact += int(same.sum())


def _equal_rows(stored: dict[str, NDArray[Any]], fresh: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Which rows are the same bytes, [rows]: of what nobody wrote NaN is NaN."""
    pairs = [(np.ascontiguousarray(values), np.ascontiguousarray(fresh[part])) for part, values in stored.items()]
    as_bytes = [(a.reshape(len(a), -1).view(np.uint8), b.reshape(len(b), -1).view(np.uint8)) for a, b in pairs]
    same: NDArray[np.bool_] = np.logical_and.reduce([(a == b).all(axis=1) for a, b in as_bytes])
    return same


def _differences(
    cache: Cache,
    job: Job,
    view: int,
    name: str,
    rows: list[int],
    stored: dict[str, NDArray[Any]],
    fresh: dict[str, NDArray[Any]],
) -> Iterator[Problem]:
    encoding, noise = job.encodings[name], NOISE[cache.spec_of(job.addition).teacher.precision]
    found = disagreement(encoding.decode(stored), encoding.decode(fresh), encoding, noise, is_logits(name))
    worst_B = found.reshape(len(rows), -1).amax(1)
    # NaN is no agreement.
    wrong = (~(worst_B <= 1)).nonzero().flatten().tolist()
    if wrong:
        most = max(wrong, key=lambda place: float(worst_B[place].nan_to_num(nan=torch.inf)))
        keys = cache.samples.key(rows[most]) + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        what = (
            f"the teacher answers otherwise now: {float(worst_B[most]):.3g} times as far from what is stored as "
            f"{encoding.name} and rounding account for"
        )
        todo = "Check the teacher's code and weights, and the libraries' versions."
        yield Problem(f"view {view}, {name}, {keys}", what, todo)
