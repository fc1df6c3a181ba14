"""Builds in processes of their own that SIGKILL ends at seeded moments: the same bytes, nothing computed twice.

`crash_harness` says what is demanded of every case. These are few of them; `make crash` runs the long version.
`TOY_CRASH_SEED` repeats one.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from crash_harness import Case, Place, Reference, campaign, changes, crash_case, run_case
from crash_processes import Watcher

from teacher_cache.build import Executor

SEED = int(os.environ.get("TOY_CRASH_SEED", "1"))


@pytest.fixture(scope="module", params=["zarr", "parquet"])
def reference(request: pytest.FixtureRequest, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What an undisturbed build in each store comes to."""
    return Reference(tmp_path_factory.mktemp(request.param), arrays, request.param)


@pytest.mark.parametrize("reference", [pytest.param("zarr", marks=pytest.mark.slow), "parquet"], indirect=True)
@pytest.mark.parametrize(("executor", "kills"), [("serial", 4), pytest.param("ray", 2, marks=pytest.mark.slow)])
def test_killed_at_random_moments(reference: Reference, executor: Executor, kills: int) -> None:
    """Driver, actor, or all of Ray; the reader that watches sees exact values and holes only."""
    outcome = run_case(reference, executor, SEED, kills)
    print(f"{reference.store} {executor}, seed {SEED}: {dict(outcome.kills)}")
    assert sum(outcome.kills.values()) > 0
    assert outcome.rows > 0
    assert outcome.asked >= len(reference.places)


@pytest.mark.parametrize("reference", ["zarr", pytest.param("parquet", marks=pytest.mark.slow)], indirect=True)
def test_killed_before_changes_of_the_file_system(reference: Reference) -> None:
    """From the first one to those of sealing, in steps; the long version takes every one."""
    total = changes(reference)
    killed = 0
    for number in range(SEED % 4, total, max(1, total // 4)):
        killed += sum(crash_case(reference, number).kills.values())
    assert killed >= 4


def test_the_harness_finds_what_it_looks_for(reference: Reference, tmp_path: Path) -> None:
    """A log with one question too many, and a cache that changed, are failures."""
    case = Case(reference, "serial", -SEED)
    watcher = Watcher(case.root, reference.exact, case.folder)
    assert case.run_once(0, None) == 0
    assert watcher.end()["committed"] == len(reference.committed)
    case.check_log()
    images: dict[Place, str] = {place: image for image, place in reference.places.items()}
    with case.log.open("a") as log:
        log.write(f"1 {images[1, 2]}\n")
    case.asked_before.append((1, 0, {(1, 2)}))
    with pytest.raises(AssertionError, match=r"run 1 computed \[\(1, 2\)\] again"):
        case.check_log()
    other = tmp_path / "notes"
    other.mkdir()
    data = next(
        path
        for path in sorted(case.root.glob("data/teachers/**/*"))
        if path.suffix == ".parquet" or ("c" in path.parts and path.is_file())
    )
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="CorruptionError"):
        Watcher(case.root, reference.exact, other).end()
    case.clean()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_before_every_change(reference: Reference) -> None:
    """Every change of the file system that a serial build makes, one after the other."""
    kills: Counter[str] = Counter()
    for number in range(changes(reference) + 1):
        kills += crash_case(reference, number).kills
    # A lease that is renewed on a slow machine is one change more.
    assert sum(kills.values()) >= changes(reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_campaign(tmp_path: Path) -> None:
    """At least 200 kills, over both executors and stores; every kind of kill has happened."""
    total = campaign(200, SEED, tmp_path)
    wanted = {f"ray {store} {target}" for store in ("zarr", "parquet") for target in ("driver", "actor", "all")}
    wanted |= {f"serial {store} {target}" for store in ("zarr", "parquet") for target in ("driver", "change")}
    assert set(total.kills) == wanted
    print(dict(total.kills))
