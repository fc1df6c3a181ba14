"""Several builders of one cache: who may do what, what is taken over, and that the bytes stay the same."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_builds import addition_of, committed, toy_spec, tree

import teacher_cache as tc
from teacher_cache import cli, lease
from teacher_cache import left as what_is_left
from teacher_cache.begin import prepare
from teacher_cache.build import BuildReport, build
from teacher_cache.builder import Builder
from teacher_cache.claims import Claims
from teacher_cache.errors import BuildError, MismatchError
from teacher_cache.fingerprint import bytes_digest
from teacher_cache.lease import LEAD, Lease, at_work, claims
from teacher_cache.manifest import read_manifest
from teacher_cache.receipts import committed_shards, receipt_path
from teacher_cache.seal import seal
from teacher_cache.shard_job import _Shard
from teacher_cache.signed import signed
from teacher_cache.spec import BuildSpec
from teacher_cache.storage import Group
from teacher_cache.storage.local_root import LocalRoot

Progress = Callable[[int, int, int], None]


def forge(root: Path, *names: str, seconds: float = 60.0, **changes: Any) -> Builder:
    """Another host's builder that holds these claims, for so long."""
    now = time.time()
    ours = Builder.here(changes.pop("joined", True))
    other = replace(ours, host="elsewhere", machine="another", pid=7, since=now, until=now + seconds, **changes)
    for folder in ("builders", "claims"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / f"builders/{other.id}.json").write_bytes(signed(asdict(other)))
    for name in names:
        (root / f"claims/{name}.json").write_bytes(signed(asdict(other)))
    return other


def usurp(root: Path, name: str, seconds: float = 60.0) -> Builder:
    """Another host takes a claim over, as it may when it thinks that its holder is gone."""
    other = forge(root, seconds=seconds)
    place = root / f"claims/{name}.json"
    while place.exists():
        place = root / f"claims/{name}.{bytes_digest(place.read_bytes())}.json"
    place.write_bytes(signed(asdict(other)))
    return other


def serial(spec: BuildSpec, progress: Progress | None = None, join: bool = False) -> BuildReport:
    return build(spec, "serial", progress, join)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["teacher_cache.build"], "_POLL", 0.02)


@pytest.fixture(scope="module")
def whole(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tree of an undisturbed build."""
    root = tmp_path_factory.mktemp("whole") / "cache"
    serial(toy_spec(root, arrays))
    return tree(root)


@pytest.fixture
def spec(arrays: Path, tmp_path: Path) -> BuildSpec:
    return toy_spec(tmp_path / "cache", arrays)


def at(rows: int, action: Callable[[], object]) -> Progress:
    """Does something once so many rows are committed."""
    left = [action]

    def progress(done: int, _total: int, _built: int) -> None:
        if done >= rows and left:
            left.pop()()

    return progress


def in_threads(*actions: Callable[[], object]) -> list[object]:
    """Runs all at once; what each gave, or raised."""
    found: list[object] = [None] * len(actions)
    together = threading.Barrier(len(actions))

    def run(number: int) -> None:
        together.wait()
        try:
            found[number] = actions[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


class TestClaims:
    """One name, one holder, whoever comes at the same time and whatever they left behind."""

    @pytest.mark.parametrize("gone", [0, 1, 3])
    def test_one_of_many_wins(self, gone: int, tmp_path: Path) -> None:
        """Free, or held by builders that are gone, each of whom had taken it over from the one before."""
        for _ in range(15):
            for _ in range(gone):
                usurp(tmp_path, LEAD, seconds=-1)
            with contextlib.ExitStack() as stack:
                leases = [stack.enter_context(Lease(LocalRoot(tmp_path))) for _ in range(6)]
                answers = in_threads(*(lambda one=one: one.claim(LEAD) for one in leases))
                winners = [one for one, answer in zip(leases, answers, strict=True) if answer is None]
                assert len(winners) == 1
                assert {a.id for a in answers if isinstance(a, Builder)} == {winners[0].me.id}
                assert claims(LocalRoot(tmp_path))[LEAD].id == winners[0].me.id
                winners[0].require()
            assert not (tmp_path / "claims").exists()
            for path in (tmp_path / "builders").glob("*"):
                path.unlink()

    def test_claims_come_and_go(self, tmp_path: Path) -> None:
        """Many names, taken and given back by several at once: nobody ever has what another has."""
        holders: dict[str, str] = {}

        def work(one: Lease) -> None:
            for turn in range(60):
                name = f"v0000-s{turn % 3:06}"
                if one.claim(name) is None:
                    assert holders.setdefault(name, one.me.id) == one.me.id
                    one.require()
                    del holders[name]
                    one.release(name)

        with contextlib.ExitStack() as stack:
            leases = [stack.enter_context(Lease(LocalRoot(tmp_path))) for _ in range(4)]
            assert in_threads(*(lambda one=one: work(one) for one in leases)) == [None] * 4
        assert list(tmp_path.iterdir()) == []

    def test_who_is_gone(self, tmp_path: Path) -> None:
        """Its time is over; its process is; its number is another process's now; it ended inside this process."""
        here = Builder.here(joined=False)
        later = {"until": time.time() + 60}
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        assert forge(tmp_path).alive
        assert not forge(tmp_path, seconds=-0.001).alive
        assert not replace(here, pid=child.pid, born="1", **later).alive
        assert replace(here, pid=os.getppid(), born=_born_of(os.getppid()), **later).alive
        assert not replace(here, pid=os.getppid(), born=_born_of(os.getppid())).alive
        assert not replace(here, pid=os.getppid(), born="1", **later).alive
        assert not replace(here, **later).alive
        with Lease(LocalRoot(tmp_path)) as ours:
            assert [one.id for one in at_work(LocalRoot(tmp_path)) if one.host != "elsewhere"] == [ours.me.id]
            os.utime(tmp_path / f"builders/{ours.me.id}.json", (0, 0))
            assert ours.me.id in {one.id for one in at_work(LocalRoot(tmp_path))}, "times of files say nothing"

    def test_a_killed_process_that_nobody_has_waited_for(self, tmp_path: Path) -> None:
        """A zombie builds nothing."""
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        builder = replace(Builder.here(False), pid=child.pid, born=_born_of(child.pid), until=time.time() + 60)
        assert builder.alive
        child.kill()
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert not builder.alive
        child.communicate()

    def test_a_lease_is_renewed_until_it_cannot_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then others may take over, and whoever had it finds out, and leaves the new holder's claim alone."""
        monkeypatch.setattr(lease, "TERM", 0.3)
        with Lease(LocalRoot(tmp_path)) as ours:
            assert ours.claim(LEAD) is None
            first = at_work(LocalRoot(tmp_path))[0]
            time.sleep(0.5)
            later = at_work(LocalRoot(tmp_path))[0]
            assert later.since == first.since
            assert later.until > first.until + 0.15
            taken = usurp(tmp_path, LEAD)
            with pytest.raises(BuildError, match=r"has lost its lease.*lead is held by.*elsewhere.*status"):
                ours.require()
            holder = ours.claim(LEAD)
            assert holder is not None
            assert holder.id == taken.id
        assert claims(LocalRoot(tmp_path))[LEAD].id == taken.id

    def test_a_lease_that_ran_out_while_nobody_came_is_still_held(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A laptop that slept goes on."""
        with Lease(LocalRoot(tmp_path)) as ours:
            ours.claim(LEAD)
            monkeypatch.setattr(time, "time", lambda now=time.time: now() + 1e6)
            ours.require()
            ours._renew()
            assert [one.id for one in at_work(LocalRoot(tmp_path))] == [ours.me.id]

    def test_damaged_files_hold_nothing(self, tmp_path: Path) -> None:
        other = forge(tmp_path, "v0000-s000000", "v0000-s000001")
        (tmp_path / "claims/v0000-s000000.json").write_bytes(b"")
        with Lease(LocalRoot(tmp_path)) as ours:
            assert ours.claim("v0000-s000000") is None
            held = ours.claim("v0000-s000001")
            assert held is not None
            assert held.id == other.id
            path = tmp_path / f"builders/{other.id}.json"
            path.write_bytes(path.read_bytes()[:-9])
            assert ours.claim("v0000-s000001") is None

    def test_without_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(place: Path, _existing: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted", str(place))

        monkeypatch.setattr(Path, "hardlink_to", refused)
        with Lease(LocalRoot(tmp_path)) as one, Lease(LocalRoot(tmp_path)) as other:
            assert one.claim(LEAD) is None
            held = other.claim(LEAD)
            assert held is not None
            assert held.id == one.me.id

    def test_folders_that_another_takes_away(self, tmp_path: Path) -> None:
        """The last to leave removes them; whoever is just coming makes them again."""
        with Lease(LocalRoot(tmp_path)) as ours:
            assert ours.claim("another") is None
            ours.release("another")
            for path in (tmp_path / "builders").iterdir():
                path.unlink()
            (tmp_path / "builders").rmdir()
            (tmp_path / "claims").rmdir()
            assert ours.claim(LEAD) is None
            ours.require()


def _born_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class TestOneBuilder:
    """Without `--join` there is one."""

    def test_the_second_is_told_who_builds(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        errors: list[BuildError] = []

        def second() -> None:
            before = tree(Path(spec.cache))
            with pytest.raises(BuildError, match="is being built by another process") as caught:
                serial(spec)
            errors.append(caught.value)
            assert set(tree(Path(spec.cache))) == set(before)

        serial(spec, at(16, second))
        message = str(errors[0])
        assert f"process {os.getpid()} on {os.uname().nodename}, since {time.strftime('%Y-')}" in message
        assert "lease until" in message
        assert "--join" in message
        assert "lease has run out" in message
        assert errors[0].exit_code == 1
        assert tree(Path(spec.cache)) == whole

    def test_nothing_is_repaired_meanwhile(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        """What a repair takes away, a builder may just have counted on."""

        def damage_and_repair() -> None:
            place = Path(spec.cache) / receipt_path(0, 0)
            sound = place.read_bytes()
            place.write_bytes(sound[:-9])
            with pytest.raises(BuildError, match="must not be repaired while another process builds it"):
                tc.repair(spec.cache)
            place.write_bytes(sound)

        serial(spec, at(16, damage_and_repair))
        assert tree(Path(spec.cache)) == whole

    def test_nobody_joins_what_is_given_up(self, spec: BuildSpec) -> None:
        """While one process repairs or abandons, also those that would share the work are refused."""
        with contextlib.suppress(KeyboardInterrupt):
            serial(spec, at(8, _interrupt))
        with lease.alone(LocalRoot(Path(spec.cache)), "is ours"):
            for join in (False, True):
                with pytest.raises(BuildError, match="is being repaired, or given up in part"):
                    serial(spec, join=join)
        assert serial(spec).shards_built == 7

    def test_two_at_once(self, arrays: Path, tmp_path: Path, whole: dict[str, str]) -> None:
        """One builds; the other is refused, or came when all was done."""
        for number in range(3):
            spec = toy_spec(tmp_path / f"{number}", arrays)
            found = in_threads(*[lambda spec=spec: serial(spec)] * 2)
            reports = [one for one in found if isinstance(one, BuildReport)]
            assert sum(one.shards_built for one in reports) == 8
            assert all("being built" in str(one) for one in found if one not in reports)
            assert tree(tmp_path / f"{number}") == whole

    def test_a_builder_that_is_gone_is_succeeded(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        """Its lease ran out: its claims are taken over, its leftovers go, at whatever point it stopped."""
        root = Path(spec.cache)
        forge(root, LEAD, "v0000-s000000", "v0001-s000003", seconds=-1)
        (root / f"manifest.json.{'0' * 32}.tmp").write_bytes(b"torn")
        serial(spec)
        assert tree(root) == whole

    def test_what_a_killed_builder_leaves_in_a_sealed_cache(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        serial(spec)
        forge(Path(spec.cache), LEAD, "v0000-s000000", seconds=-1)
        assert serial(spec).shards_built == 0
        assert tree(Path(spec.cache)) == whole
        assert not (Path(spec.cache) / "builders").exists()

    def test_builders_that_joined_are_not_disturbed(self, spec: BuildSpec) -> None:
        """Whoever led them is gone; a new one does not walk in without `--join`."""
        other = forge(Path(spec.cache), "v0001-s000000")
        with pytest.raises(BuildError, match=r"is being built.*elsewhere"):
            serial(spec)
        assert list(claims(LocalRoot(Path(spec.cache)))) == ["v0001-s000000"]
        assert [one.id for one in at_work(LocalRoot(Path(spec.cache)))] == [other.id]

    def test_two_that_see_each_other_do_not_both_give_way(self, spec: BuildSpec) -> None:
        """One that has come as well, and holds nothing, is the one to be refused."""
        forge(Path(spec.cache), joined=False)
        assert serial(spec).shards_built == 8

    def test_nothing_is_written_for_a_wrong_request(self, arrays: Path, tmp_path: Path, spec: BuildSpec) -> None:
        serial(spec)
        with pytest.raises(MismatchError):
            serial(toy_spec(tmp_path / "cache", arrays, views__seed=5), join=True)
        assert not (tmp_path / "cache/builders").exists()


class TestLost:
    """Whoever has lost its lease commits nothing more."""

    def test_between_shards(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        root = Path(spec.cache)
        mine = root / f"manifest.json.{'1' * 32}.tmp"

        def lose() -> None:
            usurp(root, LEAD, seconds=0.6)
            mine.write_bytes(b"the new leader writes")

        with pytest.raises(BuildError, match=r"has lost its lease.*lead is held by.*elsewhere"):
            serial(spec, at(16, lose))
        assert len(committed(tc.open(root))) == 2
        assert mine.exists(), "what another may be writing is left alone"
        time.sleep(0.7)
        serial(spec)
        assert tree(root) == whole

    def test_inside_a_shard(self, spec: BuildSpec, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        root, real = Path(spec.cache), _Shard.finish

        def finish(shard: _Shard, question: Any) -> None:
            real(shard, question)
            if (shard.view, shard.shard) == (0, 2) and not list(root.glob("claims/v0000-s000002.*.json")):
                usurp(root, "v0000-s000002", seconds=0.4)

        with monkeypatch.context() as patch:
            patch.setattr(_Shard, "finish", finish)
            with pytest.raises(BuildError, match=r"has lost its lease.*v0000-s000002 is held by"):
                serial(spec)
        assert sorted(committed(tc.open(root))) == [(0, 0), (0, 1)]
        time.sleep(0.5)
        serial(spec)
        assert tree(root) == whole

    def test_a_loss_explains_other_errors(self, spec: BuildSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        """The new leader has removed the temporary files of the one that it took for dead."""
        root, real = Path(spec.cache), Path.replace

        def replaced(path: Path, target: Path) -> Path:
            if "s000002" in path.name and path.parent.parent.name == "receipts":
                path.unlink()
                usurp(root, LEAD)
            return real(path, target)

        monkeypatch.setattr(Path, "replace", replaced)
        with pytest.raises(BuildError, match="has lost its lease"):
            serial(spec)

    def test_a_folder_that_is_moved_away(self, spec: BuildSpec, tmp_path: Path, whole: dict[str, str]) -> None:
        root = Path(spec.cache)
        with pytest.raises(BuildError, match=r"gone|no longer has its lease"):
            serial(spec, at(16, lambda: root.rename(tmp_path / "moved")))
        assert not root.exists()
        serial(spec.model_copy(update={"cache": str(tmp_path / "moved")}))
        assert tree(tmp_path / "moved") == whole


class TestBetweenTwoLooks:
    """Another builder begins, or seals, after we have looked and before we act."""

    def test_it_was_begun_and_sealed_before_we_had_the_lease(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        real = prepare

        def late(root: Any, opened: Any) -> Any:
            planned = real(root, opened)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys.modules["teacher_cache.build"], "prepare", real)
                serial(spec)
            return planned if planned.found is None else real(root, opened)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["teacher_cache.build"], "prepare", late)
            assert serial(spec).shards_built == 0
        assert tree(Path(spec.cache)) == whole

    @pytest.mark.parametrize("where", ["list", "claim"])
    def test_it_was_sealed_before_we_listed_or_claimed(
        self, where: str, spec: BuildSpec, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No receipt is there any more: that everything is committed must not read as that nothing is."""
        root = Path(spec.cache)
        with contextlib.suppress(KeyboardInterrupt):
            serial(spec, at(8, _interrupt))
        forge(root, LEAD, seconds=0.3)
        left = [1]

        def others_seal() -> None:
            if left and left.pop():
                assert serial(spec, join=True).shards_built == 7

        def listed(*arguments: Any) -> Any:
            others_seal()
            return committed_shards(*arguments)

        def taken(ours: Claims, work: Any, real: Any = Claims.take) -> Any:
            others_seal()
            return real(ours, work)

        if where == "list":
            monkeypatch.setattr(what_is_left, "committed_shards", listed)
        else:
            monkeypatch.setattr(Claims, "take", taken)
        assert serial(spec, join=True).shards_built == 0
        assert tree(root) == whole

    def test_a_claim_is_given_back_when_its_shard_is_committed(self, spec: BuildSpec) -> None:
        serial(spec, lambda _done, _total, _built: _require_lead_only(Path(spec.cache)))

    def test_nothing_with_a_hole_is_sealed(self, spec: BuildSpec) -> None:
        root = Path(spec.cache)
        with contextlib.suppress(KeyboardInterrupt):
            serial(spec, at(32, _interrupt))
        with pytest.raises(BuildError, match=r"view 1, shard 1: must be committed before the cache is sealed, and 3"):
            seal(LocalRoot(root), spec, read_manifest(LocalRoot(root)))
        assert addition_of(root).state == "building"

    def test_a_manifest_that_reads_back_as_other_types(self, arrays: Path, tmp_path: Path) -> None:
        """Pairs of numbers in a recipe are tuples before they are written and lists after: it is the same build."""
        views = {"recipe": [{"random_resized_crop": {"size": 8}}], "count": 2, "seed": 3}
        report = serial(toy_spec(tmp_path / "cache", arrays, views=views))
        assert report.shards_built == 8
        assert tc.open(tmp_path / "cache").complete


def _require_lead_only(root: Path) -> None:
    assert list(claims(LocalRoot(root))) == [LEAD]


class TestJoin:
    """Several builders share the work; nothing is made twice, and the bytes are those of one."""

    def test_they_share(self, arrays: Path, spec: BuildSpec, whole: dict[str, str]) -> None:
        """The first knew nothing of others; one that joins makes two views together."""
        other = toy_spec(Path(spec.cache), arrays, compute__views_per_decode=2)
        begun = threading.Event()

        def first() -> BuildReport:
            def slowly(_done: int, _total: int, built: int) -> None:
                if built:
                    begun.set()
                    time.sleep(0.1)

            return serial(spec, slowly)

        def second(spec: BuildSpec) -> BuildReport:
            begun.wait(20)
            return serial(spec, join=True)

        found = in_threads(first, lambda: second(other), lambda: second(spec))
        reports = [one for one in found if isinstance(one, BuildReport)]
        assert len(reports) == 3, found
        assert sum(one.shards_built for one in reports) == 8
        assert sum(one.rows_built for one in reports) == 54
        assert reports[0].shards_built < 8
        assert len({json.dumps(one.fidelity, sort_keys=True) for one in reports}) == 1
        assert tree(Path(spec.cache)) == whole
        assert not (Path(spec.cache) / "builders").exists()

    def test_they_all_join(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        """Started at the same moment by a script, all with `--join`: one of them begins and one seals."""
        found = in_threads(*[lambda: serial(spec, join=True)] * 3)
        assert sum(one.shards_built for one in found if isinstance(one, BuildReport)) == 8, found
        assert tree(Path(spec.cache)) == whole

    def test_the_first_stops(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        """The one that joined goes on and seals."""
        begun, stop = threading.Event(), threading.Event()

        def first() -> None:
            def pause(done: int, _total: int, _built: int) -> None:
                if done >= 16:
                    begun.set()
                    stop.wait(20)
                    raise OSError("out of here")

            serial(spec, pause)

        def second() -> BuildReport:
            begun.wait(20)
            return serial(spec, at(54, stop.set), join=True)

        error, report = in_threads(first, second)
        assert "out of here" in str(error)
        assert isinstance(report, BuildReport), report
        assert report.shards_built == 6
        assert tree(Path(spec.cache)) == whole

    def test_another_that_begins_is_waited_for(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        """Until its lease runs out: then whoever waits begins."""
        forge(Path(spec.cache), LEAD, seconds=0.4)
        started = time.monotonic()
        assert serial(spec, join=True).shards_built == 8
        assert time.monotonic() - started > 0.3
        assert tree(Path(spec.cache)) == whole

    def test_what_another_holds_is_left_until_it_is_gone(self, spec: BuildSpec, whole: dict[str, str]) -> None:
        """Its shards and its temporary files; what a builder that is gone had begun goes at once."""
        root = Path(spec.cache)
        with contextlib.suppress(KeyboardInterrupt):
            serial(spec, at(8, _interrupt))
        forge(root, "v0000-s000002", seconds=1.0)
        forge(root, "v0000-s000003", seconds=-1)
        shards = {shard: _files(root, 0, shard) for shard in (2, 3)}
        for files in shards.values():
            for path in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"half")
        seen: list[tuple[int, list[bool], list[bool]]] = []

        def look(done: int, _total: int, _built: int) -> None:
            seen.append((done, *([path.exists() for path in shards[shard]] for shard in (2, 3))))

        report = serial(spec, look, join=True)
        assert report.shards_built == 7
        assert all(all(theirs) and not any(gone) for done, theirs, gone in seen if done <= 54 - 8)
        assert tree(root) == whole

    def test_whoever_does_not_lead_removes_only_its_own(self, spec: BuildSpec) -> None:
        root = Path(spec.cache)
        with contextlib.suppress(KeyboardInterrupt):
            serial(spec, at(8, _interrupt))
        forge(root, LEAD)
        (ours, *_), (theirs, *_) = _files(root, 0, 1), _files(root, 0, 2)
        others = [root / f"manifest.json.{'2' * 32}.tmp", theirs]

        def stop() -> None:
            for path in (ours, *others):
                path.write_bytes(b"half")
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Shard, "commit", lambda *_a, **_k: stop())
            with pytest.raises(KeyboardInterrupt):
                serial(spec, join=True)
        assert [path.exists() for path in (ours, *others)] == [False, True, True]

    def test_another_spec_is_refused(self, arrays: Path, spec: BuildSpec, tmp_path: Path) -> None:
        other = toy_spec(tmp_path / "cache", arrays, views__seed=5)

        def second() -> None:
            with pytest.raises(MismatchError):
                serial(other, join=True)

        serial(spec, at(16, second))

    @pytest.mark.slow
    def test_processes_one_of_which_is_killed(self, arrays: Path, tmp_path: Path) -> None:
        """SIGKILL inside a shard: whoever joined takes its claims over at once, being on the same host."""
        changes = {"teacher__model": "toy_models:KillsItself"}
        spec = toy_spec(tmp_path / "cache", arrays, **changes)
        program = (
            "import sys; from teacher_cache import build, BuildSpec\n"
            "build(BuildSpec.model_validate_json(sys.argv[1]), executor='serial', join=True)"
        )
        command = [sys.executable, "-c", program, spec.model_dump_json()]
        killed = subprocess.Popen(command, env={**os.environ, "TOY_KILL_AFTER": "5"}, stderr=subprocess.PIPE)
        other = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert killed.wait(60) in (-9, 0)
        assert other.wait(60) == 0, other.communicate()
        killed.communicate(), other.communicate()
        serial(toy_spec(tmp_path / "whole", arrays, **changes))
        assert tree(tmp_path / "cache") == tree(tmp_path / "whole")

    @pytest.mark.slow
    def test_ray_and_a_loop(self, spec: BuildSpec, arrays: Path, whole: dict[str, str]) -> None:
        """Workers on Ray claim through their driver; a loop beside them takes what they have not."""
        begun = threading.Event()

        def beside() -> BuildReport:
            begun.wait(60)
            return serial(spec, join=True)

        results: list[object] = []
        thread = threading.Thread(target=lambda: results.append(beside()))
        thread.start()

        def progress(_done: int, _total: int, built: int) -> None:
            if built:
                begun.set()
                time.sleep(0.2)

        report = build(toy_spec(Path(spec.cache), arrays, compute__workers=1), "ray", progress)
        thread.join(60)
        assert isinstance(results[0], BuildReport)
        assert results[0].shards_built > 0
        assert report.shards_built + results[0].shards_built == 8
        assert tree(Path(spec.cache)) == whole


def _interrupt() -> None:
    raise KeyboardInterrupt


def _files(root: Path, view: int, shard: int) -> list[Path]:
    """Temporary names of every file of a shard."""
    from teacher_cache.storage import open_store

    manifest = addition_of(root)
    groups: list[Group] = manifest.groups(view)
    paths = [path for group in groups for path in open_store(manifest.store.kind, manifest.grid).paths(group, shard)]
    return [root / f"{path}.{'3' * 32}.tmp" for path in (*paths, f"receipts/v{view:04}/s{shard:06}.json")]


def test_status_and_verify_while_it_is_built(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`status` names who builds; nothing of a lease is a stray, and readers do not see it."""

    def status(*options: str) -> str:
        monkeypatch.setattr("sys.argv", ["teacher-cache", "status", spec.cache, *options])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    def look() -> None:
        facts = json.loads(status("--json"))
        assert (facts["shards committed"], facts["shards planned"], facts["complete"]) == (2, 8, False)
        (builder,) = facts["builders"]
        assert (builder["pid"], builder["joined"]) == (os.getpid(), False)
        monkeypatch.setenv("COLUMNS", "200")
        assert f"process {os.getpid()} on" in status()
        places = [problem.place for problem in tc.verify(spec.cache).problems]
        assert not [place for place in places if place.startswith(("builders", "claims"))]
        assert len(committed(tc.open(spec.cache))) == 2

    serial(spec, at(16, look))
    assert json.loads(status("--json"))["builders"] == []
    assert "nobody" in status()
    assert tc.verify(spec.cache).ok


def test_counting_while_it_is_sealed(spec: BuildSpec) -> None:
    """Receipts that became a table between two looks are not holes."""
    opened: list[tc.Cache] = []
    serial(spec, at(16, lambda: opened.append(tc.open(spec.cache))))
    assert opened[0].manifest.state == "building"
    assert opened[0].shards() == (8, 8)
    assert opened[0].complete


def test_the_command_line_joins(spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--join` reaches the build; without it the exit code is 1."""
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = ["teacher-cache", "build", f"{tmp_path}/build.yaml", "--executor", "serial"]
    codes = []

    def run(*options: str) -> None:
        monkeypatch.setattr("sys.argv", [*command, *options])
        with pytest.raises(SystemExit) as done:
            cli.main()
        codes.append(done.value.code)

    forge(Path(spec.cache), LEAD, seconds=0.5)
    run()
    run("--join")
    assert codes == [1, 0]
