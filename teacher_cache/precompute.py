"""Shards on Ray: one long-lived actor for each device, one call for each shard, nothing held but receipts.

The only file that imports ray. The actor writes and commits inside the call, so the driver may die at any
moment; a shard whose worker died is tried again by a new one, with our own count of attempts, because a poison
shard must not be retried for ever.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from teacher_cache.errors import BuildError, SpecError, TeacherCacheError
from teacher_cache.manifest import Manifest
from teacher_cache.plan import worker_count
from teacher_cache.receipts import Receipt, receipt_path
from teacher_cache.shard_job import Job, Work, open_job_from, run_work
from teacher_cache.spec import BuildSpec, ComputeSpec
from teacher_cache.teachers import resolve_device

_IN_FLIGHT = 2
_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError)


class ShardWorker:
    """Runs shards in a process of its own. Opens source, recipe and teacher once."""

    def __init__(self, root: str, manifest: str, spec: BuildSpec, search_path: list[str]) -> None:
        sys.path[:] = search_path
        torch.set_num_threads(spec.compute.threads)
        self._job: Job = open_job_from(Path(root), Manifest.model_validate_json(manifest), spec)

    def run(self, work: Work) -> list[bytes]:
        """Shards, written and committed; returns their receipts."""
        return [receipt.to_bytes() for receipt in run_work(self._job, work)]


def run_on_ray(root: Path, manifest: Manifest, spec: BuildSpec, works: list[Work]) -> Iterator[Receipt]:
    """Yields the receipt of each shard as it is committed, in whatever order the workers finish.

    Raises:
        BuildError: a shard killed its worker as often as `compute.attempts` allows.
        TeacherCacheError: whatever the shard job raised, as it raised it.
    """
    count = min(worker_count(spec.compute), len(works))
    on_gpu = resolve_device(spec.compute.device) == "cuda"
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            num_cpus=count * spec.compute.threads,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            configure_logging=False,
        )
    try:
        pool = _Pool(root, manifest, spec, min(count, _room(spec.compute, on_gpu)), on_gpu)
        try:
            yield from pool.run(works)
        finally:
            pool.stop()
    finally:
        if ours:
            ray.shutdown()


def _room(compute: ComputeSpec, on_gpu: bool) -> int:
    """How many workers the cluster has room for; an actor without room would wait for ever."""
    there = ray.cluster_resources()
    room = int(there.get("GPU", 0)) if on_gpu else int(there.get("CPU", 0)) // compute.threads
    if room < 1:
        hint = "Lower compute.threads, or give Ray more resources."
        raise SpecError("compute", "needs more than the running Ray cluster has", there, hint)
    return room


class _Call(NamedTuple):
    """One unit of work in flight; calls sort in the order in which they were submitted."""

    number: int
    worker: int
    work: Work


class _Pool:
    """Workers with at most two calls in flight each, and the shards that still wait."""

    def __init__(self, root: Path, manifest: Manifest, spec: BuildSpec, count: int, on_gpu: bool) -> None:
        resources: dict[str, Any] = {"num_cpus": spec.compute.threads, "num_gpus": 1 if on_gpu else 0}
        self._actor = ray.remote(**resources, max_restarts=0, max_task_retries=0)(ShardWorker)
        # The API key is excluded from every dump on purpose; pickling the model carries it to the workers.
        self._arguments = (str(root.absolute()), manifest.model_dump_json(), spec, list(sys.path))
        self._attempts_allowed = spec.compute.attempts
        self._attempts: dict[Work, int] = {}
        self._workers = [self._start() for _ in range(count)]
        self._submitted = 0
        self._calls: dict[Any, _Call] = {}

    def _start(self) -> Any:
        return self._actor.remote(*self._arguments)

    def run(self, works: list[Work]) -> Iterator[Receipt]:
        """The receipts of all these shards."""
        waiting = deque(works)
        for _ in range(_IN_FLIGHT):
            for worker in range(len(self._workers)):
                self._submit(worker, waiting)
        while self._calls:
            (ready,), _ = ray.wait(list(self._calls), num_returns=1)
            call = self._calls.pop(ready)
            try:
                data = ray.get(ready)
            except _DEATHS as error:
                self._bury(call, waiting, error)
                continue
            except RayTaskError as error:
                cause = error.cause
                raise (cause if isinstance(cause, TeacherCacheError) else error) from None
            self._submit(call.worker, waiting)
            for view, receipt in zip(call.work.views, data, strict=True):
                yield Receipt.from_bytes(receipt, receipt_path(view, call.work.shard))

    def _submit(self, worker: int, waiting: deque[Work]) -> None:
        if waiting:
            work = waiting.popleft()
            self._submitted += 1
            reference = self._workers[worker].run.remote(work)
            self._calls[reference] = _Call(self._submitted, worker, work)

    def _bury(self, dead: _Call, waiting: deque[Work], error: RayError) -> None:
        """Replaces a dead worker; the shard it was given first is suspected, the one behind it goes back unharmed."""
        behind = {reference: call for reference, call in self._calls.items() if call.worker == dead.worker}
        for reference in behind:
            del self._calls[reference]
        lost = [call.work for call in sorted([dead, *behind.values()])]
        oldest = lost[0]
        self._attempts[oldest] = self._attempts.get(oldest, 0) + 1
        if self._attempts[oldest] >= self._attempts_allowed:
            name = str(oldest)
            hint = "Run with --executor serial to see why; memory is the usual reason."
            raise BuildError(name, f"killed its worker {self._attempts[oldest]} times", error, hint) from error
        waiting.extendleft(reversed(lost))
        self._workers[dead.worker] = self._start()
        for _ in range(_IN_FLIGHT):
            self._submit(dead.worker, waiting)

    def stop(self) -> None:
        """Kills the workers; a shard that is half written has a temporary name only."""
        for worker in self._workers:
            ray.kill(worker)
