"""The service against the bare batched loop, LitServe and mosec, and under more load than it can bear.

    python tests/benchmarks/bench_service.py [--others FOLDER] [--seconds 4] [--rounds 3] [--json]

FOLDER holds LitServe and mosec (`pip install --target FOLDER litserve mosec`, versions below); without it they are left
out. Every server is a process of its own with its model on one thread, the load comes from another one. What is
compared runs in turns: a figure is the median over the rounds, a ratio the median of the rounds' ratios. Images are
noise that never repeats, and weights are random: neither changes how long a model takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_views import Rows, ratio, show
from contenders import Ours, bare_loop, serve_ours
from load_generator import Closed, LoadGenerator
from load_requests import Question
from other_servers import OTHERS, serve_other, versions
from overload import latency, overload
from service_cases import CASES, Case, Rate, asked, in_turns, pace

import teacher_cache as tc
from teacher_cache.manifest import library_versions
from teacher_cache.spec import load_spec

GOALS = {64: 0.95, 8: 0.90, 1: 0.50}
"""Images of a request, and the share of the bare loop that the service has to reach with them."""


@dataclass(frozen=True)
class Bench:
    """One case, while everything that serves it runs."""

    case: Case
    config: Path
    load: LoadGenerator
    bare: Rate
    ours: Ours
    others: dict[str, Path]
    """The folder in which each of the other servers lies."""
    seconds: float
    rounds: int

    def throughput(self) -> Iterator[tuple[int, dict[str, list[float]], list[float]]]:
        """For each number of images of a request what all of them reach, in images a second, and how busy we were."""
        for images in GOALS:
            views_BCHW, shares = self.case.images(images), list[float]()
            service = asked(self.load, self.ours.question(views_BCHW), self.case, images)
            rates = {"bare loop": self.bare, "service": self._watched(service, shares)}
            with contextlib.ExitStack() as running:
                for kind, folder in self.others.items():
                    served = serve_other(kind, folder, self.config, views_BCHW, self.case.micro_batch)
                    rates[kind] = asked(self.load, running.enter_context(served), self.case, images)
                # A request of several batches takes so long that a short turn sees too few.
                longer = 2 if images > 4 * self.case.micro_batch else 1
                yield images, in_turns(self.rounds, self.seconds * longer, rates), shares

    def _watched(self, rate: Rate, shares: list[float]) -> Rate:
        def watched(seconds: float) -> float:
            with self.ours.busy(shares):
                return rate(seconds)

        return watched

    def identical(self) -> str:
        """A hundred callers with the same image."""
        question, before = replace(self.ours.question(self.case.images(1)), images=()), self.ours.batches()
        answers = self.load.run(question, Closed(callers=100, most=100))
        return f"{self.ours.batches() - before} ({len([one for one in answers if one.status == 200])} answers of 100)"

    def cached(self) -> Rows:
        """A server that looks into a cache first: what that costs, and what it gives."""
        tc.build(load_spec(self.config, []), executor="serial")
        keys, images = tc.open(load_spec(self.config, []).cache).samples.keys, 8
        views_BCHW = self.case.images(images)
        one, many = ({"keys": list(keys[:count])} for count in (1, 64))
        with serve_ours(self.config, self.case.name, from_cache=True) as first:
            rates = {
                "without": asked(self.load, self.ours.question(views_BCHW), self.case, images),
                "with": asked(self.load, first.question(views_BCHW), self.case, images),
                "one": lambda seconds: pace(self.load.run(_named(first, one), Closed(8, seconds)), 1, seconds),
                "many": lambda seconds: pace(self.load.run(_named(first, many), Closed(8, seconds)), 64, seconds),
            }
            found, before = in_turns(self.rounds, self.seconds, rates), first.batches()
            rates["one"](self.seconds / 2)
            if first.batches() != before:
                raise RuntimeError("what the cache holds was computed")
        shown = {name: statistics.median(values) for name, values in found.items()}
        return {
            "8 images a request that the cache has not: looked for there first / not": (
                f"{ratio(found['with'], found['without']):.3f}"
            ),
            "named samples from the cache, 1 a request": f"{shown['one']:.0f} requests/s",
            "named samples from the cache, 64 a request": f"{shown['many']:.0f} images/s",
        }


def _named(ours: Ours, body: dict[str, list[str]]) -> Question:
    return ours.named(json.dumps(body).encode())


def measured(bench: Bench) -> Rows:
    """All rows of one teacher."""
    found: Rows = {}
    all_bare: list[float] = []
    for images, reached, shares in bench.throughput():
        bare = reached.pop("bare loop")
        all_bare += bare
        for name, ours in reached.items():
            goal = f", goal ≥ {GOALS[images]:.2f}" if name == "service" else ""
            each = f"{statistics.median(ours):.0f} of {statistics.median(bare):.0f} images/s"
            found[f"{images} images a request: {name} / bare loop"] = f"{ratio(ours, bare):.3f} ({each}{goal})"
        found[f"{images} images a request: share of the time in the model"] = f"{statistics.median(shares):.3f}"
    batch, views_BCHW = bench.case.micro_batch / statistics.median(all_bare), bench.case.images(8)
    # Anew: on a machine that others use, what it was minutes ago tells little.
    closed = asked(bench.load, bench.ours.question(views_BCHW), bench.case, 8)
    found |= latency(bench.load, bench.ours, views_BCHW, closed(2 * bench.seconds), batch, 6 * bench.seconds)
    found |= overload(bench.load, bench.ours, views_BCHW, closed, batch, 20 if bench.seconds >= 4 else 5)
    if bench.case is CASES[0]:
        found["100 identical requests at once: forward passes, goal 1"] = bench.identical()
        found |= bench.cached()
    return {f"{bench.case.name}: {label}": value for label, value in found.items()}


def main() -> None:
    """Serves, loads, prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=Path, help="folder with LitServe and mosec")
    parser.add_argument("--seconds", type=float, default=4, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--teacher", choices=[case.name for case in CASES], help="one of them only")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: Rows = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    found |= {"command": " ".join(["python", *sys.argv]), **library_versions(), "threads": "1"}
    there = {} if given.others is None else versions(given.others)
    found |= {kind: there.get(kind, "left out: not in --others") for kind in OTHERS}
    others = dict.fromkeys(there, given.others)
    with tempfile.TemporaryDirectory() as folder, LoadGenerator() as load:
        for case in (one for one in CASES if given.teacher in (None, one.name)):
            config = case.configuration(Path(folder))
            shape = (3, case.size, case.size)
            bare = bare_loop(config, case.micro_batch, shape)
            with bare as rate, serve_ours(config, case.name, from_cache=False) as ours:
                bench = Bench(case, config, load, rate, ours, others, given.seconds * case.turn, given.rounds)
                found |= measured(bench)
    show(found, given.json)


if __name__ == "__main__":
    main()
