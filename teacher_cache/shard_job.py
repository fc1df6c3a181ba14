"""The body of work for the shards of one range of rows: a plain function of an opened job and what is wanted.

It runs alike in a loop, in a Ray actor or by hand, and the same shard gets the same bytes: micro-batches are
cut from the shard, with a fixed size and a padded tail, never from a queue. Several views of the same rows are made
from one decoding; each is a shard of its own, and none depends on which others were made beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teacher_cache.addition import Addition
from teacher_cache.encodings import Encoding, SampledLogits, Sequenced
from teacher_cache.encodings.fidelity import measure_feature, measure_logits
from teacher_cache.errors import BuildError, NonFiniteError, SpecError, TeacherCacheError
from teacher_cache.lease import Hold
from teacher_cache.loader import Decoded, KnownItems, ViewLoader
from teacher_cache.manifest import Manifest
from teacher_cache.plan import Opened, open_parts
from teacher_cache.poison import KILLED, is_current
from teacher_cache.proof import check
from teacher_cache.reader import Cache
from teacher_cache.receipts import Receipt, receipt_path, shard_claim
from teacher_cache.spec import HEAD_INPUT, BuildSpec, is_logits
from teacher_cache.storage import FileRecord, Store, open_store
from teacher_cache.storage.root import Root
from teacher_cache.tables import read_constants
from teacher_cache.teachers import RemoteTeacher, Teacher, ViewNames, begin_whole, resolve_device, with_kept_answers
from teacher_cache.views import How, Views
from teacher_cache.views.philox import view_words

_FIDELITY_ADDRESS = 2**16 - 1
_SAMPLE_ADDRESS = 2**16 - 3


class Work(NamedTuple):
    """One unit of work: the same rows in one or more views."""

    views: tuple[int, ...]
    shard: int
    poison: tuple[int, ...] = ()
    """Rows that are known to kill their worker: left out of their micro-batches, as broken ones are."""

    def __str__(self) -> str:
        views = ", ".join(map(str, self.views))
        return f"view{'s' if len(self.views) > 1 else ''} {views}, shard {self.shard}"


@dataclass(frozen=True)
class Job:
    """Everything that a worker opens once and uses for every shard."""

    root: Root
    opened: Opened
    addition: Addition
    encodings: dict[str, Encoding]
    store: Store
    how: How
    """Where views are rendered."""
    hold: Hold | None = None
    """Where several may build: what is no longer claimed is not committed."""
    known: Cache | None = None
    """What was there before the addition; of a view that was made then, the teacher must see the very pixels."""

    @property
    def micro_batch(self) -> int:
        """Rows in one question to the teacher: the addition's, which planning may have made smaller than the spec's."""
        size: int = self.addition.spec["teacher"]["micro_batch"]
        return size


def open_job(root: Root, manifest: Manifest, opened: Opened, hold: Hold | None = None) -> Job:
    """A job for the addition that is being built, from parts that are already open."""
    addition = manifest.open_addition
    assert addition is not None, "a build has begun it"
    known = Cache(root, sealed=True) if manifest.sealed() is not None else None
    item = opened.source.item if known is None else KnownItems(opened.source, known.samples)
    # The source may have grown since the addition was begun: partners come from the rows of the plan.
    loader = ViewLoader(opened.recipe, opened.digests[: manifest.rows], item, manifest.stops)
    return job_of(root, addition, replace(opened, loader=loader, teacher=_first_kept(opened)), hold, known)


def _first_kept(opened: Opened) -> Teacher:
    """The teacher; one of this process is not asked about what a service has kept for the build."""
    spec, teacher = opened.spec, opened.teacher
    if spec.teacher.journal is None or isinstance(teacher, RemoteTeacher):
        return teacher
    return with_kept_answers(teacher, spec.teacher, resolve_device(spec.compute.device), spec.compute.threads)


def job_of(root: Root, addition: Addition, opened: Opened, hold: Hold | None = None, known: Cache | None = None) -> Job:
    """A job for any addition; `known` must hold the views that it did not make itself."""
    here = opened.teacher.threads is None and opened.teacher.device == "cuda"
    # Views are made where the teacher will read them: a batched recipe needs no copy back.
    how = How(torch.device("cuda")) if here else How()
    encodings = addition.open_encodings(read_constants(root, addition.constants))
    store = open_store(addition.store.kind, addition.grid)
    return Job(root, opened, addition, encodings, store, how, hold, known)


def open_job_from(root: Root, manifest: Manifest, spec: BuildSpec, hold: Hold | None = None) -> Job:
    """A job in another process: opens the parts again."""
    return open_job(root, manifest, open_parts(spec), hold)


def run_work(job: Job, work: Work) -> list[Receipt]:
    """Reads, and for each view renders, asks the teacher, encodes, writes, commits.

    Raises:
        BuildError: the teacher raised, or the folder cannot be written; names the sample or the file.
        NonFiniteError: the teacher answered NaN or inf; names the sample.
    """
    # A worker may have died between two commits: what it did commit is not computed again.
    found = {view: _receipt(job, view, work.shard) for view in work.views}
    done = {view: receipt for view, receipt in found.items() if receipt and is_current(receipt, work.poison)}
    shards = [_Shard(job, view, work.shard) for view in work.views if view not in done]
    _answer(job, shards, work.shard, work.poison)
    for shard in shards:
        done[shard.view] = shard.commit(withdraw=found[shard.view] is not None)
    return [done[view] for view in work.views]


def try_rows(job: Job, work: Work, rows: Collection[int]) -> None:
    """Does with some rows of a shard all that the build does with them, the others left out, and writes nothing."""
    shards = [_Shard(job, view, work.shard) for view in work.views]
    _answer(job, shards, work.shard, {*range(*job.addition.span(work.shard))}.difference(rows))


def _answer(job: Job, shards: list[_Shard], number: int, without: Collection[int]) -> None:
    if not shards:
        return
    teacher = job.opened.teacher
    most = teacher.concurrency if isinstance(teacher, RemoteTeacher) else 1
    # Questions may be under way side by side; what is done with the answers is done in the order of the rows.
    asked: deque[tuple[_Shard, _Question]] = deque()
    try:
        for start, stop in _micro_batches(*job.addition.span(number), job.micro_batch):
            decoded = _decode(job, range(start, stop), without)
            for shard in shards:
                question = shard.ask(decoded)
                if question is not None:
                    asked.append((shard, question))
                if len(asked) == most:
                    _finish_first(asked)
        while asked:
            _finish_first(asked)
    except BaseException:
        # Answers that are on their way may be paid for: they are kept before this worker ends.
        if isinstance(teacher, RemoteTeacher):
            teacher.drain()
        raise


def _finish_first(asked: deque[tuple[_Shard, _Question]]) -> None:
    shard, question = asked.popleft()
    shard.finish(question)


def _decode(job: Job, rows: Iterable[int], without: Collection[int]) -> Decoded:
    """Rows of one micro-batch; those to be left out are not touched, and stand among the broken ones."""
    wanted = list(rows)
    decoded = job.opened.loader.decode([row for row in wanted if row not in without])
    killers = [(row, KILLED) for row in wanted if row in without]
    return replace(decoded, broken=sorted([*decoded.broken, *killers]))


def _receipt(job: Job, view: int, shard: int) -> Receipt | None:
    path = receipt_path(view, shard)
    try:
        return Receipt.from_bytes(job.root.read(path), path)
    except FileNotFoundError:
        return None


@dataclass(frozen=True, eq=False)
class Again:
    """A micro-batch that was computed once more."""

    rows: list[int]
    """Those that could be decoded."""
    broken: set[int]
    """Those that could not."""
    columns: dict[str, dict[str, NDArray[Any]]]
    """For each field, its stored parts for `rows`."""


def answer_again(job: Job, view: int, row: int) -> Again:
    """Computes the micro-batch that holds a row as the build did, and writes nothing.

    The job's loader must know the cache's tombstones, as `Cache.loader` does: one of them may kill this process.
    """
    work = _Shard(job, view, job.addition.shard_of(row))
    size = job.micro_batch
    start = work.start + (row - work.start) // size * size
    stop = min(start + size, work.stop)
    work.answer(job.opened.loader.decode(range(start, stop)))
    broken = {tombstone for tombstone, _ in work.tombstones}
    rows = [number for number in range(start, stop) if number not in broken]
    local = np.array(rows, np.int64) - work.start
    groups = {field: job.addition.field_group(field, view) for field in job.addition.fields}
    columns = {
        field: {name: values[local] for name, values in work.columns[group.path].items()}
        for field, group in groups.items()
    }
    return Again(rows, broken, columns)


def _micro_batches(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


@dataclass(frozen=True, eq=False)
class _Question:
    """A micro-batch of one view that the teacher has been asked about."""

    rows: list[int]
    views: Views
    answer: Callable[[], dict[str, Tensor]]


class _Shard:
    """The columns of one shard as they fill up."""

    def __init__(self, job: Job, view: int, shard: int) -> None:
        self.job, self.view, self.shard = job, view, shard
        self.start, self.stop = job.addition.span(shard)
        rows = self.stop - self.start
        self.columns: dict[str, dict[str, NDArray[Any]]] = {
            group.path: {part.name: np.full((rows, *part.shape), part.fill, part.dtype) for part in group.parts}
            for group in job.addition.groups(view)
        }
        self.content = np.zeros(rows, np.uint64)
        self.tombstones: list[tuple[int, str]] = []
        self.labelled = self.correct = 0
        self.exact: dict[str, list[Tensor]] = {field: [] for field in job.addition.fields}
        self.sampled = self._sample_rows()
        self.measured: list[int] = []

    def _sample_rows(self) -> set[int]:
        """The rows whose exact values are compared: those with the smallest Philox words."""
        opened = self.job.opened
        digests = opened.digests[self.start : self.stop]
        words = view_words(digests, self.view, _FIDELITY_ADDRESS, 1, opened.recipe.seed)[:, 0]
        chosen = np.argsort(words, kind="stable")[: opened.spec.fidelity.rows_per_shard]
        return {self.start + int(row) for row in chosen}

    def answer(self, decoded: Decoded) -> None:
        """One micro-batch, from decoded rows to encoded columns."""
        question = self.ask(decoded)
        if question is not None:
            self.finish(question)

    def ask(self, decoded: Decoded) -> _Question | None:
        """One micro-batch, from decoded rows to a question; None where none of them could be decoded."""
        self.tombstones += decoded.broken
        rows = decoded.rows.tolist()
        if not rows:
            return None
        self.content[decoded.rows - self.start] = decoded.content
        views = self._views(decoded)
        labels = self.job.opened.source.labels
        labels_B = None if labels is None else torch.from_numpy(labels[rows])
        teacher, names = self.job.opened.teacher, None
        if isinstance(teacher, RemoteTeacher):
            keys = self.job.opened.source.keys
            names = ViewNames(tuple(keys[row] for row in rows), self.view, views.digests())
        return _Question(rows, views, begin_whole(teacher, views.pixels_BCHW, self.job.micro_batch, labels_B, names))

    def finish(self, question: _Question) -> None:
        """The same micro-batch, from the answer to encoded columns."""
        rows, views = question.rows, question.views
        outputs = self._answered(question)
        local = np.array(rows) - self.start
        if self.job.addition.extent.proof:
            proof = self.columns[self.job.addition.proof_group(self.view).path]
            proof["digest"][local] = views.digests()
            if "params" in proof:
                proof["params"][local] = views.params_BP
        keep = [place for place, row in enumerate(rows) if row in self.sampled]
        self.measured += [rows[place] for place in keep]
        for field, encoding in self.job.encodings.items():
            read = HEAD_INPUT if encoding.name == "feature_head" else field
            encoded = self._encode(field, encoding, rows, outputs[read])
            columns = self.columns[self.job.addition.field_group(field, self.view).path]
            for name, values in encoded.items():
                columns[name][local] = values
            self.exact[field].append(outputs[field][keep].cpu())
        self._count_correct(rows, outputs)

    def _views(self, decoded: Decoded) -> Views:
        addition, known, loader = self.job.addition, self.job.known, self.job.opened.loader
        rows = decoded.rows.tolist()
        try:
            if addition.extent.proof or known is None:
                views = loader.views(decoded, self.view, self.job.how)
            else:
                views = loader.views_again(decoded, known.params(self.view, decoded.rows))
                check(known, self.view, decoded.rows, views, "exact")
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(self._name(rows), self.job.micro_batch, self.view, error) from error
        except (SpecError, RuntimeError, ValueError) as error:
            hint = "Correct the recipe so that it holds for every sample."
            raise BuildError(self._name(rows), f"cannot be rendered: {error}", self.view, hint) from error
        if tuple(views.pixels_BCHW.shape[1:]) != addition.view_shape:
            hint = "Add `resize` and `center_crop`, so that all views have one size."
            found = tuple(views.pixels_BCHW.shape[1:])
            raise BuildError(self._name(rows), f"must have views of {addition.view_shape}", found, hint)
        return views

    def _answered(self, question: _Question) -> dict[str, Tensor]:
        rows, size = question.rows, self.job.micro_batch
        try:
            outputs = question.answer()
        except TeacherCacheError:
            raise
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(self._name(rows), size, self.view, error) from error
        except Exception as error:
            # Whatever a user's model raises ends the build; it is named and chained, never swallowed.
            hint = "Correct the model, then run the same command again: it goes on."
            raise BuildError(self._name(rows), f"the teacher raised {error!r}", self.view, hint) from error
        for field, shape in self.job.addition.field_shapes.items():
            if tuple(outputs[field].shape) != (size, *shape):
                rule = f"the teacher must answer {field} as {(size, *shape)}"
                raise BuildError(self._name(rows), rule, tuple(outputs[field].shape), "Check the model.")
        return {field: value[: len(rows)] for field, value in outputs.items()}

    def _encode(self, field: str, encoding: Encoding, rows: list[int], values: Tensor) -> dict[str, NDArray[Any]]:
        try:
            if not isinstance(encoding, SampledLogits | Sequenced) or encoding.blocks == 0:
                return encoding.encode(values)
            digests, seed = self.job.opened.digests[rows], self.job.opened.recipe.seed
            words = view_words(digests, self.view, _SAMPLE_ADDRESS, encoding.blocks, seed)
            return encoding.encode_drawn(values, words)
        except NonFiniteError as error:
            row = rows[int(error.field.removeprefix("row "))]
            place = f"{self._name([row])}, view {self.view}, {field}"
            rule = f"must be finite and fit {encoding.name}"
            raise NonFiniteError(place, rule, error.value, error.hint) from error

    def _count_correct(self, rows: list[int], outputs: dict[str, Tensor]) -> None:
        labels = self.job.opened.source.labels
        # A mixed view has two labels: neither is the right answer.
        answers = next((outputs[field] for field in self.job.addition.fields if is_logits(field)), None)
        if labels is None or answers is None or self.job.opened.recipe.mixing is not None:
            return
        # Nor has a sequence one answer for the row's label.
        if answers.ndim != 2:
            return
        self.labelled += len(rows)
        self.correct += int((answers.argmax(1).cpu().numpy() == labels[rows]).sum())

    def _name(self, rows: list[int]) -> str:
        keys = self.job.opened.source.keys
        return keys[rows[0]] if len(rows) == 1 else f"{keys[rows[0]]} … {keys[rows[-1]]}"

    def _fidelity(self) -> dict[str, dict[str, float]]:
        local = np.array(self.measured, np.int64) - self.start
        found = {}
        for field, encoding in self.job.encodings.items():
            if len(local) == 0:
                continue
            columns = self.columns[self.job.addition.field_group(field, self.view).path]
            target = encoding.decode({name: values[local] for name, values in columns.items()})
            measure = measure_logits if is_logits(field) else measure_feature
            found[field] = measure(torch.cat(self.exact[field]), target)
        return found

    def _packed(self, files: list[FileRecord]) -> Iterator[tuple[str, bytes]]:
        """Every file of the shard, one group in memory at a time; notes what is known of each."""
        for group in self.job.addition.groups(self.view):
            for record, data in self.job.store.pack(group, self.shard, self.columns[group.path]):
                files.append(record)
                yield record.path, data

    def commit(self, withdraw: bool = False) -> Receipt:
        """Writes every file of the shard, then its receipt.

        Args:
            withdraw: there is a receipt, of the shard as it was made with a row that kills in another view: it goes
                before the files that it names change.
        """
        job, files = self.job, list[FileRecord]()
        if job.hold is not None:
            job.hold.require(shard_claim(self.view, self.shard))
        if withdraw:
            job.root.remove(receipt_path(self.view, self.shard))
        job.root.write_together(self._packed(files))
        receipt = Receipt(
            identity=job.addition.identity.whole,
            view=self.view,
            shard=self.shard,
            files=tuple(files),
            tombstones=tuple(self.tombstones),
            content=self.content,
            labelled=self.labelled,
            correct=self.correct,
            fidelity=self._fidelity(),
        )
        job.root.write(receipt_path(self.view, self.shard), receipt.to_bytes())
        return receipt


def _out_of_memory(name: str, size: int, view: int, error: Exception) -> BuildError:
    hint = (
        "Free the device or run fewer workers, then run the same command again: it goes on. Or begin a new cache with "
        "a smaller teacher.micro_batch, or with compute.on_oom: halve."
    )
    return BuildError(name, f"ran out of memory on a micro-batch of {size}: {error}", view, hint)
