"""Builds that are killed at seeded moments and resumed until they end, held against one that nothing disturbed.

    python tests/crash_harness.py --kills 200 --seed 1

Of every case is demanded: the tree of an undisturbed build, byte for byte, so nothing temporary is left; no
image of a committed shard asked of the teacher again; and a reader that was watching all the time saw exact
values or `HoleError`, and no shard that was there went away. A failure names the case; the same seed makes it again
(as far as the machine's timing allows; kills before a numbered change of the file system are exact).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np

TESTS = Path(__file__).parent
if __name__ == "__main__":
    # Workers and the process that all others are forked from must find the toy models.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))

from crash_processes import Watcher, await_gone, joined, kill, kill_all, members, start_build, warm, workers  # noqa: E402
from toy_builds import expected_logits, toy_spec, tree, write_arrays  # noqa: E402
from toy_models import image_name  # noqa: E402

import teacher_cache as tc  # noqa: E402
from teacher_cache.build import Executor  # noqa: E402
from teacher_cache.receipts import receipt_of  # noqa: E402
from teacher_cache.spec import BuildSpec  # noqa: E402

Target = Literal["driver", "actor", "all"]
Place = tuple[int, int]
"""(view, shard)."""
RECIPE = [{"pad_crop": {"size": 8, "padding": 4}}, {"horizontal_flip": {}}]


@dataclass(frozen=True)
class Kill:
    """Who is killed and when."""

    target: Target
    receipts: int | None
    """After so many shards are committed; None: at a time."""
    seconds: float
    """After that, or after the start."""


@dataclass
class Outcome:
    """What happened in some cases."""

    kills: Counter[str] = field(default_factory=Counter)
    """That hit something, by executor, store and target."""
    runs: int = 0
    asked: int = 0
    """Images that the teacher was asked about, repeats of what was never committed included."""
    looks: int = 0
    rows: int = 0
    """That the watcher compared."""

    @property
    def on_ray(self) -> int:
        """Kills of builds on Ray."""
        return sum(count for what, count in self.kills.items() if what.startswith("ray"))

    def add(self, other: Outcome) -> None:
        """Sums up."""
        self.kills += other.kills
        self.runs += other.runs
        self.asked += other.asked
        self.looks += other.looks
        self.rows += other.rows


class Reference:
    """An undisturbed build of each store: its tree, its exact values, and how long a build takes."""

    def __init__(self, folder: Path, arrays: Path, store: str) -> None:
        self.folder, self.arrays, self.store = folder, arrays, store
        self.seconds: dict[str, float] = {}
        self.measure("serial")
        self.tree = tree(folder / "serial")
        cache = tc.open(folder / "serial")
        spans = [range(*cache.manifest.first.grid.span(shard)) for shard in range(cache.manifest.first.grid.shards)]
        self.committed = {(view, shard) for view in range(cache.views) for shard in range(len(spans))}
        pixels = [cache.render(view, range(len(cache))) for view in range(cache.views)]
        self.exact = folder / "exact.npz"
        means = [view.float().mean((2, 3)).half().numpy() for view in pixels]
        truth: dict[str, Any] = {"logits": np.stack([expected_logits(view) for view in pixels])}
        np.savez(self.exact, **truth, **{"feature:stem": np.stack(means)})
        self.places: dict[str, Place] = {
            image_name(pixels[view][row]): (view, shard)
            for view in range(cache.views)
            for shard, rows in enumerate(spans)
            for row in rows
        }
        assert len(self.places) == cache.views * len(cache), "two views are one image: choose another seed"

    def spec(self, root: Path, rng: random.Random | None = None) -> BuildSpec:
        """The spec of every build here; where it runs may differ from run to run."""
        compute = {"device": "cpu", "threads": 1, "workers": 2, "attempts": 5, "views_per_decode": 1}
        if rng is not None:
            compute |= {"workers": rng.choice([1, 2]), "views_per_decode": rng.choice([1, 2])}
        store = {"kind": self.store, "shard_rows": 8, "chunk_rows": 4}
        views = {"recipe": RECIPE, "count": 2, "seed": 1}
        return toy_spec(root, self.arrays, store=store, views=views, compute=compute, teacher__model="toy_models:Told")

    def measure(self, executor: Executor) -> float:
        """How long an undisturbed build takes: the span that random moments are drawn from."""
        if executor not in self.seconds:
            warm()
            began = time.monotonic()
            environment = {"TOY_CASE": f"undisturbed-{os.getpid()}", "TOY_PAUSE": "0.01"}
            process = start_build(self.spec(self.folder / executor), executor, environment, self.folder / "output")
            assert joined(process) == 0, (self.folder / "output").read_text()
            self.seconds[executor] = time.monotonic() - began
        return self.seconds[executor]


class Case:
    """One cache that is built, killed and resumed."""

    def __init__(self, reference: Reference, executor: Executor, seed: int) -> None:
        self.reference, self.executor, self.seed = reference, executor, seed
        self.rng = random.Random(f"{reference.store} {executor} {seed}")
        self.name = f"{reference.store}-{executor}-{seed}"
        self.id = f"{self.name}-{os.getpid()}"
        self.folder = reference.folder / self.name
        self.folder.mkdir()
        self.root, self.log, self.output = self.folder / "cache", self.folder / "log", self.folder / "output"
        # Paths of Ray's sockets have little room.
        self.ray = Path(tempfile.mkdtemp(prefix="cr"))
        self.outcome = Outcome()
        self.asked_before: list[tuple[int, int, set[Place]]] = []
        """(run, length of the log, what was committed then): no later line of that run may be of those."""

    def committed(self) -> set[Place]:
        """What is committed now, by the names of the receipts; everything once the cache is sealed."""
        found = {receipt_of(path.relative_to(self.root).as_posix()) for path in self.root.glob("receipts/*/*.json")}
        manifest = self.root / "manifest.json"
        if manifest.exists() and b'"sealed"' in manifest.read_bytes():
            return self.reference.committed
        return {place for place in found if place is not None}

    def run(self, kills: int, overlap: bool = True) -> Outcome:
        """Kills so many runs, lets the last one end, and checks everything."""
        watcher = Watcher(self.root, self.reference.exact, self.folder)
        for number in range(kills):
            if self.run_once(number, self._plan(number == 0)) == 0:
                # It survived, or ended too soon: it is sealed, and nothing is left to kill.
                kills = number + 1
                break
            if not overlap or self.rng.random() < 0.5:
                await_gone(self.id)
        code = self.run_once(kills, None)
        assert code == 0, self.output.read_text()
        await_gone(self.id)
        seen = watcher.end()
        self.outcome.looks, self.outcome.rows = seen["looks"], seen["rows"]
        assert seen["committed"] == len(self.reference.committed)
        found = tree(self.root)
        assert found == self.reference.tree, sorted(found.items() ^ self.reference.tree.items())
        self.check_log()
        return self.outcome

    def _plan(self, first: bool) -> Kill:
        """Half at a uniform moment of the whole build, half after a shard or while it is sealed.

        The first kill of a case comes in the first half of its shards, so that it does not miss.
        """
        rng, span = self.rng, self.reference.measure(self.executor)
        target: Target = "driver" if self.executor == "serial" else rng.choice(("driver", "actor", "all"))
        shards = len(self.reference.committed)
        if first:
            return Kill(target, rng.randrange(shards // 2), 0.0)
        if rng.random() < 0.5:
            return Kill(target, None, rng.uniform(0, span))
        receipts = rng.choice([rng.randrange(shards), shards])
        # Between the last receipt and the seal Ray is shut down, which takes a while.
        longest = (1.5 if self.executor == "ray" else 0.05) if receipts == shards else span / 20
        return Kill(target, receipts, rng.uniform(0, longest))

    def run_once(self, number: int, plan: Kill | None, die_before: int | None = None) -> int:
        """One run of the build; its exit code."""
        self._snapshot(number)
        environment = {
            "TOY_CASE": self.id,
            "TOY_RUN": str(number),
            "TOY_LOG": str(self.log),
            "TOY_PAUSE": "0.01",
            "RAY_TMPDIR": str(self.ray),
        }
        spec = self.reference.spec(self.root, self.rng)
        process = start_build(spec, self.executor, environment, self.output, die_before)
        self.outcome.runs += 1
        if plan is not None:
            self._wait(process, plan)
            self._snapshot(number)
            if process.is_alive():
                self._strike(process, plan.target)
        code = joined(process)
        assert code in (0, -9), f"{plan}: exit code {code}\n{self.output.read_text()}"
        if die_before is not None and code == -9:
            self.outcome.kills[f"{self.executor} {self.reference.store} change"] += 1
        return code

    def _wait(self, process: BaseProcess, plan: Kill) -> None:
        began = time.monotonic()
        if plan.receipts is not None:
            while process.is_alive() and len(self.committed()) < plan.receipts:
                time.sleep(0.001)
            began = time.monotonic()
        while process.is_alive() and time.monotonic() < began + plan.seconds:
            time.sleep(0.001)

    def _strike(self, process: BaseProcess, target: Target) -> None:
        if target == "actor":
            # Before there are actors there is nothing to kill; a driver at its end has none any more.
            while process.is_alive() and not workers(self.id):
                time.sleep(0.005)
            for pid in workers(self.id)[:1]:
                self.outcome.kills[f"{self.executor} {self.reference.store} actor"] += 1
                kill(pid)
            return
        self.outcome.kills[f"{self.executor} {self.reference.store} {target}"] += 1
        if target == "all":
            kill_all(self.id, process)
        else:
            process.kill()

    def _snapshot(self, number: int) -> None:
        committed = self.committed()
        self.asked_before.append((number, self.log.stat().st_size if self.log.exists() else 0, committed))

    def check_log(self) -> None:
        """Nothing that was committed was asked of the teacher again, and everything was asked of it once."""
        place, asked = 0, []
        for line in self.log.read_text().splitlines(keepends=True):
            run, image = line.split()
            asked.append((place, int(run), self.reference.places[image]))
            place += len(line)
        self.outcome.asked = len(asked)
        assert {of for _, _, of in asked} == self.reference.committed
        for run, length, committed in self.asked_before:
            again = {of for where, by, of in asked if by == run and where >= length} & committed
            assert not again, f"run {run} computed {sorted(again)} again, which were committed before"

    def crash(self, number: int, again: int | None = None) -> None:
        """Killed before change `number` of the file system, perhaps again before `again`, then resumed."""
        watcher = Watcher(self.root, self.reference.exact, self.folder)
        self.run_once(0, None, number)
        if again is not None:
            self.run_once(1, None, again)
        assert self.run_once(2, None) == 0
        seen = watcher.end()
        self.outcome.looks, self.outcome.rows = seen["looks"], seen["rows"]
        assert tree(self.root) == self.reference.tree, f"killed before change {number}, then {again}"
        self.check_log()

    def clean(self) -> None:
        """Everything of this case goes: processes, Ray's files, the cache."""
        for pid in members(self.id):
            kill(pid)
        shutil.rmtree(self.ray, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def run_case(reference: Reference, executor: Executor, seed: int, kills: int) -> Outcome:
    """One case with its name in every failure; what it left stays where it fails, for a look."""
    case = Case(reference, executor, seed)
    try:
        outcome = case.run(kills)
    except BaseException as error:
        error.add_note(f"case {case.name}, {kills} kills; what it left is in {case.folder}")
        raise
    case.clean()
    return outcome


def changes(reference: Reference) -> int:
    """How many changes of the file system a serial build makes: a kill before a later one hits none."""
    case = Case(reference, "serial", 0)
    assert case.run_once(0, None, 10**9) == 0
    made = int(case.output.with_suffix(".changes").read_text())
    case.clean()
    return made


def crash_case(reference: Reference, number: int, again: int | None = None) -> Outcome:
    """A serial build that is killed before one numbered change of the file system, and perhaps before another."""
    case = Case(reference, "serial", 10**6 * (number + 1) + (again or 0))
    try:
        case.crash(number, again)
    except BaseException as error:
        error.add_note(f"{reference.store}, killed before changes {number} and {again}; see {case.folder}")
        raise
    case.clean()
    return case.outcome


def campaign(kills: int, seed: int, folder: Path) -> Outcome:
    """Cases over both executors and stores, until so many kills have hit something."""
    arrays = write_arrays(folder / "arrays")
    references = {}
    for store in ("zarr", "parquet"):
        (folder / store).mkdir()
        references[store] = Reference(folder / store, arrays, store)
    total = Outcome()
    while sum(total.kills.values()) < kills or total.on_ray < kills // 4:
        rng = random.Random(seed)
        for reference in references.values():
            # A serial build is twenty times as quick as one on Ray.
            for number in range(2):
                total.add(run_case(reference, "serial", 1000 * seed + number, rng.randint(2, 5)))
                total.add(crash_case(reference, rng.randrange(250), rng.randrange(250)))
                total.add(run_case(reference, "ray", 1000 * seed + number, rng.randint(2, 4)))
        print(f"seed {seed} done: {sum(total.kills.values())} kills in {total.runs} runs", flush=True)
        seed += 1
    return total


def main() -> None:
    """A campaign, and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        total = campaign(arguments.kills, arguments.seed, Path(name))
    for what, count in sorted(total.kills.items()):
        print(f"{what:24} {count:4} kills")
    print(
        f"runs {total.runs}, images asked {total.asked}, looks of the reader {total.looks}, rows compared {total.rows}"
    )


if __name__ == "__main__":
    main()
