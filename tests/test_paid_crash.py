"""Builds with a paid teacher that are killed at seeded moments until they end: what was answered is never asked again.

The only images that are ever computed twice are those of requests that were under way at a kill: their answers never
arrived. They are counted by the journal as perhaps paid, and held here against the service's own books.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from crash_processes import await_gone, joined, kill, kill_all, members, workers
from test_paid_build import accounts, data_of
from toy_faults import Faulty
from toy_service_models import colour_spec, running, wait_until

import teacher_cache as tc
from services.app import create_app
from services.journal_file import NAME
from services.settings import Settings
from services.teachers import open_served
from teacher_cache.build import Executor, build
from teacher_cache.errors import BudgetError
from teacher_cache.spec import BuildSpec

VIEWS = 6
QUESTIONS = 5 * VIEWS
CONCURRENCY = 2
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["crash_processes", "ray", "teacher_cache.precompute", "services.http_teacher"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data set, and the cache `local` that the local teacher built."""
    folder = tmp_path_factory.mktemp("killed")
    tc.build(spec_of(folder, folder / "local"), executor="serial")
    return folder


def spec_of(folder: Path, cache: Path, **teacher: object) -> BuildSpec:
    """More views than the toy build has."""
    spec = colour_spec(folder, "unused", **teacher)
    compute = spec.compute.model_copy(update={"workers": 2, "attempts": 9, "views_per_decode": 1})
    views = spec.views.model_copy(update={"count": VIEWS})
    return spec.model_copy(update={"cache": str(cache), "views": views, "compute": compute})


def _build(spec: BuildSpec, executor: Executor, environment: dict[str, str], output: Path) -> None:
    os.setsid()
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    build(spec, executor)


@dataclass
class Case:
    """One cache that is built, killed and resumed."""

    folder: Path
    root: Path
    faulty: Faulty
    url: str
    executor: Executor
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    by_name: bool = False
    kept: dict[str, int] = field(default_factory=dict)
    """How often each question had been computed when its answer was seen in the journal of a killed build."""

    def __post_init__(self) -> None:
        self.id = f"paid-{self.executor}-{self.rng.random()}-{os.getpid()}"
        # Paths of Ray's sockets have little room.
        self.ray = Path(tempfile.mkdtemp(prefix="pc"))
        self.output = self.root / "output"

    def start(self) -> BaseProcess:
        """A run of the build."""
        budget = {"max_images": 10**6}
        spec = spec_of(self.folder, self.root / "cache", model=self.url, concurrency=CONCURRENCY, budget=budget)
        environment = {"TOY_CASE": self.id, "RAY_TMPDIR": str(self.ray)}
        process = _processes.Process(target=_build, args=(spec, self.executor, environment, self.output))
        process.start()
        return process

    def run(self, kills: int) -> None:
        """Kills runs after a random number of answers, and lets the last one end."""
        for _ in range(kills):
            process = self.start()
            self._wait(process)
            if process.is_alive():
                self._strike(process)
            code = joined(process)
            assert code in (0, -9), self.output.read_text()
            if code == 0:
                break
            await_gone(self.id)
            # What had left before the kill is still computed by the service.
            wait_until(lambda: self.faulty.inside == 0)
            self._look()
        assert joined(self.start()) == 0, self.output.read_text()
        await_gone(self.id)

    def _wait(self, process: BaseProcess) -> None:
        target = self.faulty.computed.total() + self.rng.randrange(1, QUESTIONS // 3)
        while process.is_alive() and self.faulty.computed.total() < target:
            time.sleep(0.001)
        if self.rng.random() < 0.7:
            # Requests are under way for the shorter part of a build: most kills are to hit some.
            while process.is_alive() and not self.faulty.inside:
                time.sleep(0.001)
            time.sleep(self.rng.uniform(0, 0.8 * self.faulty.delay))
        else:
            time.sleep(self.rng.uniform(0, 2 * self.faulty.delay))

    def _strike(self, process: BaseProcess) -> None:
        target = "driver" if self.executor == "serial" else self.rng.choice(("driver", "actor", "all"))
        self.kills[target] += 1
        if target == "actor":
            for pid in workers(self.id)[:1]:
                kill(pid)
            # It goes on with another one.
        elif target == "all":
            kill_all(self.id, process)
        else:
            process.kill()

    def _look(self) -> None:
        journal = self.root / "cache.journal" / NAME
        if not journal.exists():
            return
        db = sqlite3.connect(journal)
        try:
            found = db.execute("SELECT question FROM answers GROUP BY question HAVING count(*) = 2").fetchall()
        finally:
            db.close()
        for (question,) in found:
            self.kept.setdefault(question.hex(), self.faulty.computed[question.hex()])

    def check(self) -> str:
        """The cache is the local one, and the books agree; what was lost, in words."""
        assert data_of(self.root / "cache") == data_of(self.folder / "local")
        computed, account = self.faulty.computed, accounts(self.root / "cache.journal")
        assert len(computed) == QUESTIONS
        again = {name: computed[name] for name, times in self.kept.items() if computed[name] != times}
        assert not again, f"answers that were kept were asked for again: {again}"
        twice = computed.total() - QUESTIONS
        assert twice <= account.lost_requests
        assert account.requests == QUESTIONS + account.lost_requests
        # By name images cost what they are; sent, micro-batches of 8 cost their fillings, too.
        local = tc.open(self.folder / "local")
        assert account.images == (len(local) * local.views if self.by_name else 8 * QUESTIONS) + account.lost_images
        most = CONCURRENCY * (1 if self.executor == "serial" else 2)
        assert account.lost_requests <= most * self.kills.total()
        assert account.lost_requests <= account.lost_images <= 8 * account.lost_requests
        return (
            f"{self.executor}: {self.kills.total()} kills {dict(self.kills)}, {len(self.kept)} answers seen kept, "
            f"{account.lost_requests} requests under way at a kill, of which {twice} were computed twice"
        )

    def clean(self) -> None:
        """Nothing of this case stays."""
        for pid in members(self.id):
            kill(pid)
        shutil.rmtree(self.ray, ignore_errors=True)


def killed(folder: Path, root: Path, executor: Executor, seed: int, kills: int, *, by_name: bool = False) -> Case:
    """A case from its beginning to its end; the service has the data set, too, or it is sent the images."""
    served = open_served(spec_of(folder, folder / "unused"))
    app = create_app({"colour": served if by_name else replace(served, library=None)}, Settings())
    faulty = Faulty(app, delay=0.08)
    root.mkdir()
    with running(faulty) as base:
        wait_until(lambda: app.state.service.not_ready() == [])
        case = Case(folder, root, faulty, f"{base}/colour", executor, random.Random(f"{executor} {seed}"))
        case.by_name = by_name
        try:
            case.run(kills)
            print(case.check())
        finally:
            case.clean()
    return case


def test_killed_in_a_loop_until_it_ends(folder: Path, tmp_path: Path) -> None:
    case = killed(folder, tmp_path / "case", "serial", 1, 4, by_name=True)
    assert case.kills.total() >= 2
    assert case.kept


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10, 16))
def test_killed_more_often(folder: Path, tmp_path: Path, seed: int) -> None:
    killed(folder, tmp_path / "case", "serial", seed, 12, by_name=seed % 2 == 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_killed_on_ray(folder: Path, tmp_path: Path, seed: int) -> None:
    killed(folder, tmp_path / "case", "ray", seed, 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_budget_is_exact_for_several_workers_and_none_loses_what_it_paid(folder: Path, tmp_path: Path) -> None:
    """Whoever reaches it first waits for the answers of all others, for its error is the end of them."""
    served = replace(open_served(spec_of(folder, folder / "unused")), library=None)
    app = create_app({"colour": served}, Settings())
    faulty = Faulty(app, delay=0.3)
    with running(faulty) as base:
        wait_until(lambda: app.state.service.not_ready() == [])
        for most in (11, QUESTIONS):
            budget = {"max_images": 8 * most}
            spec = spec_of(folder, tmp_path / "cache", model=f"{base}/colour", concurrency=2, budget=budget)
            if most < QUESTIONS:
                with pytest.raises(BudgetError, match="max_images: is used up"):
                    build(spec, "ray")
                assert faulty.most_at_once > 2, "two workers were at it"
            else:
                build(spec, "ray")
            assert sorted(faulty.computed.values()) == [1] * most
            assert accounts(tmp_path / "cache.journal").requests == most
    assert data_of(tmp_path / "cache") == data_of(folder / "local")
