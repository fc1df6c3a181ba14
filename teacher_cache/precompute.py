"""Shards on Ray: one long-lived actor for each device, one call for each shard, nothing held but receipts.

The only file that imports ray. The actor writes and commits inside the call, so the driver may die at any
moment; a shard whose worker died is tried again by a new one, with our own count of attempts, because a poison
shard must not be retried for ever. When they are used up, the samples that kill are found by bisection and left out.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from teacher_cache.claims import Claims
from teacher_cache.errors import BuildError, SpecError, TeacherCacheError
from teacher_cache.lease import Hold
from teacher_cache.manifest import Manifest
from teacher_cache.plan import worker_count
from teacher_cache.poison import find_poison, note_poison
from teacher_cache.receipts import Receipt, receipt_path
from teacher_cache.shard_job import Job, Work, open_job_from, run_work, try_rows
from teacher_cache.spec import BuildSpec, ComputeSpec
from teacher_cache.storage import absolute
from teacher_cache.storage.root import Root
from teacher_cache.teachers import resolve_device

_IN_FLIGHT = 2
_ADDRESS = "RAY_ADDRESS"
_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError)


class ShardWorker:
    """Runs shards in a process of its own. Opens source, recipe and teacher once."""

    def __init__(self, root: Root, manifest: str, spec: BuildSpec, search_path: list[str], hold: Hold) -> None:
        sys.path[:] = search_path
        torch.set_num_threads(spec.compute.threads)
        self._job: Job = open_job_from(root, Manifest.model_validate_json(manifest), spec, hold)

    def run(self, work: Work) -> list[bytes]:
        """Shards, written and committed; returns their receipts."""
        return [receipt.to_bytes() for receipt in run_work(self._job, work)]

    def probe(self, work: Work, rows: Sequence[int]) -> None:
        """Does with some rows of a shard what `run` does, and writes nothing: they may be the ones that kill."""
        try_rows(self._job, work, rows)


def run_on_ray(root: Root, manifest: Manifest, spec: BuildSpec, works: list[Work], claims: Claims) -> Iterator[Receipt]:
    """Yields the receipt of each shard as it is committed, in whatever order the workers finish.

    Work is claimed before it is submitted; what another builder has claimed is left out. A cluster that this process
    is connected to is used, else the one that RAY_ADDRESS names, else a Ray of its own.

    Raises:
        SpecError: no cluster answers at RAY_ADDRESS, or none of its nodes has room for a worker.
        BuildError: a shard killed its worker as often as `compute.attempts` allows, and no sample is to blame.
        TeacherCacheError: whatever the shard job raised, as it raised it.
    """
    on_gpu = resolve_device(spec.compute.device) == "cuda"
    ours = not ray.is_initialized()
    if ours:
        _connect(os.environ.get(_ADDRESS), spec.compute, len(works))
    try:
        room = min(_room(spec.compute, on_gpu), len(works))
        pool = _Pool(root, manifest, spec, min(room, spec.compute.workers or room), on_gpu, claims)
        try:
            yield from pool.run(works)
        finally:
            pool.stop()
    finally:
        if ours:
            ray.shutdown()


def _connect(address: str | None, compute: ComputeSpec, works: int) -> None:
    """Joins a cluster, or starts a Ray for this build; the handler of SIGTERM stays the one that it was."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    if address:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            hint = "Join it (`ray start --address`), with RAY_AUTH_MODE and RAY_AUTH_TOKEN as there; or unset this."
            raise SpecError(_ADDRESS, "must be a Ray cluster that this machine is a node of", address, hint) from error
    else:
        # `local`: without it Ray joins whatever somebody has started on this machine, where num_cpus is an error.
        cpus = min(worker_count(compute), works) * compute.threads
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        # Ray puts its own handler in the place of the command line's.
        signal.signal(signal.SIGTERM, on_sigterm)


def _room(compute: ComputeSpec, on_gpu: bool) -> int:
    """How many workers the cluster has room for; an actor without room would wait for ever."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Node by node: an actor is never spread over two.
    room = sum(int(found.get("GPU" if on_gpu else "CPU", 0)) // (1 if on_gpu else compute.threads) for found in there)
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

    def __init__(
        self, root: Root, manifest: Manifest, spec: BuildSpec, count: int, on_gpu: bool, claims: Claims
    ) -> None:
        resources: dict[str, Any] = {"num_cpus": spec.compute.threads, "num_gpus": 1 if on_gpu else 0}
        self._actor = ray.remote(**resources, max_restarts=0, max_task_retries=0)(ShardWorker)
        # The API key is excluded from every dump on purpose; pickling the model carries it to the workers.
        self._arguments = (absolute(root), manifest.model_dump_json(), spec, list(sys.path), claims.hold)
        self._claims = claims
        self._attempts_allowed = spec.compute.attempts
        self._root, self._addition = root, manifest.additions[-1]
        self._attempts: dict[tuple[int, tuple[int, ...]], int] = {}
        """By shard and views, how many workers have died of it."""
        self._poison: dict[int, tuple[int, ...]] = {}
        """By shard, the rows that kill in any view, as far as this run has found out."""
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
                data = _answer_to(ready)
            except _DEATHS as error:
                self._bury(call, waiting, error)
                continue
            self._submit(call.worker, waiting)
            for view, receipt in zip(call.work.views, data, strict=True):
                yield Receipt.from_bytes(receipt, receipt_path(view, call.work.shard))

    def _submit(self, worker: int, waiting: deque[Work]) -> None:
        while waiting:
            next_one = waiting.popleft()
            known = self._poison.get(next_one.shard, next_one.poison)
            work = self._claims.take(next_one._replace(poison=known))
            if work is not None:
                self._submitted += 1
                reference = self._workers[worker].run.remote(work)
                self._calls[reference] = _Call(self._submitted, worker, work)
                return

    def _bury(self, dead: _Call, waiting: deque[Work], error: RayError) -> None:
        """Replaces a dead worker; the first shard that it had not made is suspected, others go back unharmed."""
        behind = {reference: call for reference, call in self._calls.items() if call.worker == dead.worker}
        for reference in behind:
            del self._calls[reference]
        lost = [call.work for call in sorted([dead, *behind.values()])]
        waiting.extendleft(reversed(lost))
        self._workers[dead.worker] = self._start()
        # A worker that dies soon after a commit takes its answer with it: that shard is not to blame.
        suspect = next((work for work in lost if not self._is_done(work)), lost[0])
        key = suspect.shard, suspect.views
        self._attempts[key] = self._attempts.get(key, 0) + 1
        if self._attempts[key] >= self._attempts_allowed:
            self._attempts[key] = 0
            self._bisect(dead.worker, suspect, error)
        for _ in range(_IN_FLIGHT):
            self._submit(dead.worker, waiting)

    def _is_done(self, work: Work) -> bool:
        return all(self._claims.is_done(view, work) for view in work.views)

    def _bisect(self, worker: int, work: Work, error: RayError) -> None:
        """Finds the rows that killed a worker; from now on the shards of their range are made without them."""
        known = self._poison.get(work.shard, work.poison)
        if known != work.poison:
            # Found in another view while this one was under way.
            return
        place = str(work)
        if any(name.endswith("partner_low") for name in self._addition.param_names):
            rule = (
                f"killed its worker {self._attempts_allowed} times, in a recipe that mixes: a partner may be to blame"
            )
            hint = "Run with --executor serial to see why, then leave the sample out of the source, in a new cache."
            raise BuildError(place, rule, error, hint) from error
        rows = [row for row in range(*self._addition.span(work.shard)) if row not in known]
        try:
            found = find_poison(place, rows, partial(self._kills, worker, work), self._attempts_allowed)
        except BuildError as none:
            raise none from error
        self._poison[work.shard] = tuple(sorted({*known, *found}))
        # Before any shard is made without them: a build that is killed now goes on without them too.
        note_poison(self._root, self._addition, work.views[0], work.shard, self._poison[work.shard])

    def _kills(self, worker: int, work: Work, rows: Sequence[int]) -> bool:
        """Whether a worker dies of these rows; it is replaced then."""
        try:
            _answer_to(self._workers[worker].probe.remote(work, rows))
        except _DEATHS:
            self._workers[worker] = self._start()
            return True
        return False

    def stop(self) -> None:
        """Kills the workers; a shard that is half written has a temporary name only."""
        for worker in self._workers:
            ray.kill(worker)


def _answer_to(reference: Any) -> Any:
    """What a worker answered; what it raised on purpose is raised here as it was there."""
    try:
        return ray.get(reference)
    except _DEATHS:
        raise
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, TeacherCacheError) else error) from None
