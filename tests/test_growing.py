"""Growing: views, rows, fields and teachers are added to what is there, and only what is missing is computed."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from crash_processes import joined, start_build
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from toy_builds import RECIPE, ROWS, expected_logits, numpy_source, toy_spec, tree, write_arrays

import teacher_cache as tc
from student_train import ViewStream
from teacher_cache import cli, extents, reader
from teacher_cache.addition import Addition, Extent
from teacher_cache.build import BuildReport, build
from teacher_cache.errors import (
    CacheNotFoundError,
    CorruptionError,
    HoleError,
    MismatchError,
    SpecError,
    TombstoneError,
    ViewMismatch,
)
from teacher_cache.lease import is_lease
from teacher_cache.manifest import MANIFEST, Manifest, Segment, read_manifest
from teacher_cache.poison import KILLED, note_poison
from teacher_cache.spec import BuildSpec
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.verify_views import verify_views
from teacher_cache.views import Views

STORES = pytest.mark.parametrize("kind", ["zarr", "parquet"])
FIELDS: dict[str, Any] = {
    "logits": {"encoding": "dense_f32"},
    "feature:stem": {"pool": "mean", "encoding": "dense_f16"},
    "logits@k3": {"encoding": {"kind": "top_k", "k": 3}},
    "feature:stem@full": {"encoding": "dense_f16"},
}
SIZES = (9, 11, 14, ROWS)
"""Rows of the source as it grows: by less than a shard, across one, by several with a ragged last one."""
MOST = 3
"""Views."""
STORE = {"kind": "zarr", "shard_rows": 4, "chunk_rows": 2}
TEACHERS: dict[str, dict[str, Any]] = {
    "teacher": {"micro_batch": 4, "arguments": {}},
    "other": {"micro_batch": 3, "arguments": {"scale": 2.0}},
}


@dataclass(frozen=True)
class Wish:
    """What one configuration asks for."""

    rows: int = 9
    views: int = 2
    fields: tuple[str, ...] = ("logits", "feature:stem")
    teacher: str = "teacher"

    def spec(self, cache: Path, data: Data, **changes: Any) -> BuildSpec:
        """As a configuration; `store__kind="parquet"` changes one key."""
        told: dict[str, Any] = {"teacher__name": self.teacher, "teacher__model": "toy_models:Told", "store": STORE}
        told |= {f"teacher__{key}": value for key, value in TEACHERS[self.teacher].items()}
        fields = {name: FIELDS[name] for name in self.fields}
        told |= {"teacher__fields": fields}
        if "views" not in changes:
            told |= {"views__count": self.views}
        return toy_spec(cache, data[self.rows], **(told | changes))

    @property
    def atoms(self) -> set[Atom]:
        """One for each answer."""
        every = range(self.rows)
        return {Atom(self.teacher, f, view, row) for f in self.fields for view in range(self.views) for row in every}


class Atom(NamedTuple):
    """One answer of a teacher to one view of one row."""

    teacher: str
    field: str
    view: int
    row: int


Data = dict[int, Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The toy data set at each of its sizes."""
    root = tmp_path_factory.mktemp("data")
    whole = write_arrays(root / "whole")
    for rows in SIZES:
        (root / str(rows)).mkdir()
        for name in ("images.npy", "labels.npy"):
            np.save(root / str(rows) / name, np.load(whole / name)[:rows])
    return {rows: root / str(rows) for rows in SIZES}


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tc.Cache]:
    """Everything that is ever wished for, each teacher's in one build; by teacher."""
    root = tmp_path_factory.mktemp("whole")
    for name in TEACHERS:
        build(Wish(ROWS, MOST, tuple(FIELDS), name).spec(root / name, data), "serial")
    caches = {name: tc.open(root / name) for name in TEACHERS}
    for (name, cache), scale in zip(caches.items(), (1.0, 2.0), strict=True):
        for view in range(MOST):
            pixels = cache.render(view, range(ROWS))
            assert (cache.columns("logits", view, range(ROWS))["values"] == scale * expected_logits(pixels)).all(), name
    return caches


class Stop(Exception):  # noqa: N818 - no error: a way out
    """Raised by a progress callback to end a build between two shards."""


def grow(spec: BuildSpec, stop: int | None = None) -> tuple[BuildReport | None, int]:
    """Builds, alone; gives the report and how many images the teacher was asked about.

    Args:
        spec: whose teacher is `toy_models:Told`.
        stop: after so many shards, as Ctrl-C would; there is no report then.
    """
    log, told = Path(f"{spec.cache}.log"), 0
    log.write_text("")
    report = None

    def progress(_done: int, _total: int, built: int) -> None:
        nonlocal told
        told += built > 0
        if told == stop:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_LOG", str(log))
        try:
            report = build(spec, "serial", progress)
        except Stop:
            assert stop is not None
    return report, len(log.read_text().splitlines())


def grown(spec: BuildSpec) -> BuildReport:
    """Builds to the end; every image that is asked about is one that the report counts."""
    report, asked = grow(spec)
    assert report is not None
    assert asked == report.rows_built
    return report


def name_of(cache: tc.Cache, atom: Atom) -> str:
    """Under which `read` has it."""
    return atom.field if atom.teacher == cache.teachers[0] else f"{atom.teacher}/{atom.field}"


def require_exactly(cache: tc.Cache, held: set[Atom], whole: dict[str, tc.Cache]) -> None:
    """A cache holds these answers and no others; each of them, and each view's proof, as one build would have it."""
    assert set(cache.fields) == {name_of(cache, atom) for atom in held}
    for teacher, field in {(atom.teacher, atom.field) for atom in held}:
        name = name_of(cache, Atom(teacher, field, 0, 0))
        for view in range(cache.views):
            rows = np.array(sorted(atom.row for atom in held if atom[:3] == (teacher, field, view)), np.int64)
            rows = np.random.Generator(np.random.Philox(view)).permutation(rows)
            theirs = whole[teacher]
            for row in sorted({*range(len(cache))} - {*rows.tolist()}):
                with pytest.raises(HoleError):
                    cache.read(name, view, [row])
            if not len(rows):
                continue
            pairs = [(cache.columns(name, view, rows), theirs.columns(field, view, rows))]
            pairs += [({"": ask(cache)(view, rows)}, {"": ask(theirs)(view, rows)}) for ask in PROOF]
            for ours, wanted in pairs:
                assert all(np.array_equal(ours[part], wanted[part]) for part in wanted), (name, view)
    planned = {(t, f): 0 for t, f, _, _ in held}
    for teacher, field in planned:
        every = range(len(cache))
        while all((teacher, field, planned[teacher, field], row) in held for row in every):
            planned[teacher, field] += 1
        assert cache.views_of(name_of(cache, Atom(teacher, field, 0, 0))) == planned[teacher, field]


PROOF: tuple[Callable[[tc.Cache], Callable[..., NDArray[Any]]], ...] = (lambda c: c.digests, lambda c: c.params)


def require_untouched(before: dict[str, str], after: dict[str, str]) -> None:
    """Of what was there only the manifest may change, and the table of tombstones be replaced."""
    changed = {path for path, digest in before.items() if after.get(path) != digest}
    assert not {path for path in changed if path != MANIFEST and not path.startswith("tombstones-")}


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[Wish, int | None]]:
    """Configurations one after the other, each perhaps stopped after some shards. The source never shrinks."""
    rows = sorted(draw(st.lists(st.sampled_from(SIZES), min_size=2, max_size=4)))
    names = st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3, unique=True).map(tuple)
    wishes = st.builds(Wish, st.just(0), st.integers(1, MOST), names, st.sampled_from(sorted(TEACHERS)))
    stops = st.none() | st.integers(1, 6)
    return [(replace(draw(wishes), rows=count), draw(stops)) for count in rows]


class TestAnyHistory:
    """Whatever the order: the rows of one build, each computed once, and nothing of before is touched."""

    @settings(max_examples=6)
    @given(history=histories(), kind=st.sampled_from(["zarr", "parquet"]), shard=st.sampled_from([4, 8]))
    def test_the_rows_of_one_build(
        self,
        history: list[tuple[Wish, int | None]],
        kind: str,
        shard: int,
        data: Data,
        whole: dict[str, tc.Cache],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        path = tmp_path_factory.mktemp("grown") / "cache"
        held: set[Atom] = set()
        for wish, stop in history:
            spec = wish.spec(path, data, store={"kind": kind, "shard_rows": shard, "chunk_rows": 2})
            before = tree(path) if path.exists() else {}
            missing = {(atom.view, atom.row) for atom in wish.atoms - held}
            report, asked = grow(spec, stop)
            if report is None:
                self.check_open(path, held, wish, whole)
                report, more = grow(spec)
                assert report is not None
                asked += more
            assert asked == len(missing)
            held |= wish.atoms
            require_untouched(before, tree(path))
            cache = tc.open(path)
            require_exactly(cache, held, whole)
            assert (report.rows, report.views) == (len(cache), cache.views)
            assert report.views == max(atom.view for atom in held) + 1
            found = tc.verify(path, views="all", recompute=9)
            assert found.ok, found.problems
            assert found.views_checked == len({(atom.view, atom.row) for atom in held})
            assert (grow(spec)[1], tree(path)) == (0, tree(path)), "nothing is left to do"

    @staticmethod
    def check_open(path: Path, held: set[Atom], wish: Wish, whole: dict[str, tc.Cache]) -> None:
        """In the middle of an addition: whoever wants it sees the cache of before, others what is committed of it."""
        cache = tc.open(path)
        planned = {
            Atom(item.teacher, field, view, row)
            for item in cache.manifest.additions
            for field in item.fields
            for view in item.view_numbers
            for row in range(item.extent.first_row, item.extent.stop_row)
        }
        assert held <= planned <= held | wish.atoms
        there = set()
        for atom in planned:
            name = name_of(cache, atom)
            try:
                read = cache.columns(name, atom.view, [atom.row])
            except HoleError:
                continue
            there.add(atom)
            wanted = whole[atom.teacher].columns(atom.field, atom.view, [atom.row])
            assert all((read[part] == wanted[part]).all() for part in wanted), atom
        assert held <= there
        if cache.manifest.sealed() is None:
            with pytest.raises(CacheNotFoundError, match="its first is being built"):
                tc.open(path, sealed=True)
        else:
            last = cache.manifest.open_addition
            sealed = {a for a in planned if last is None or not _is_of(a, last)}
            require_exactly(tc.open(path, sealed=True), sealed, whole)


def _is_of(atom: Atom, addition: Addition) -> bool:
    extent = addition.extent
    inside = extent.first_row <= atom.row < extent.stop_row and atom.view in extent.view_numbers
    return inside and (atom.teacher, atom.field in extent.fields) == (extent.teacher, True)


@given(
    wishes=st.lists(
        st.builds(
            Wish,
            st.integers(1, 6),
            st.integers(1, 4),
            st.lists(st.sampled_from("abc"), min_size=1, unique=True).map(tuple),
            st.sampled_from(["s", "t"]),
        ),
        max_size=6,
    )
)
@settings(max_examples=100)
def test_what_is_missing(wishes: list[Wish]) -> None:
    """Blocks of one segment each that hold what is asked for and is not there: once, and one proof for each view."""
    segments: list[int] = []
    there: list[Extent] = []
    held: set[Atom] = set()
    proven: set[tuple[int, int]] = set()
    for wish in wishes:
        rows = max([wish.rows, sum(segments)])
        wish = replace(wish, rows=rows)
        manifest = Manifest.model_construct(
            segments=tuple(Segment.model_construct(rows=count) for count in segments),
            additions=tuple(Addition.model_construct(extent=extent, state="sealed") for extent in there),
        )
        blocks = extents.missing(manifest if there else None, rows, wish.views, wish.teacher, wish.fields)
        if rows > sum(segments):
            segments.append(rows - sum(segments))
        starts = np.cumsum([0, *segments]).tolist()
        asked: set[tuple[int, int]] = set()
        for block in blocks:
            assert block.rows == segments[starts.index(block.first_row)]
            places = {(view, row) for view in block.view_numbers for row in range(block.first_row, block.stop_row)}
            assert not places & asked, "a teacher is asked about a view of a row once"
            assert places.isdisjoint(proven) if block.proof else places <= proven
            asked |= places
            proven |= places
            atoms = {Atom(block.teacher, field, view, row) for field in block.fields for view, row in places}
            assert atoms.isdisjoint(held)
            held |= atoms
        assert wish.atoms <= held
        assert {(atom.view, atom.row) for atom in wish.atoms} >= asked
        there += blocks
    assert held == set().union(*(replace(w, rows=0).atoms for w in wishes)) | held


HISTORY = (
    Wish(),
    Wish(views=3),
    Wish(14, 3),
    Wish(14, 2, ("logits", "logits@k3")),
    Wish(14, 3, ("logits",), "other"),
    Wish(ROWS, 2, ("logits", "feature:stem", "logits@k3", "feature:stem@full")),
)
"""Views, rows, another encoding, another teacher, and rows and a field at once."""


class Changes:
    """The names of all changes of the file system, as `crash_processes.kill_before_change` counts them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(Path, name, self._wrapped(name, getattr(Path, name)))
        patch.setattr(os, "fsync", self._wrapped("fsync", os.fsync))
        real_open = Path.open

        def opened(path: Path, mode: str = "r", *more: Any, **keywords: Any) -> Any:
            if set(mode) & set("wxa+") and path.suffix != ".log":
                self.names.append(f"open {path}")
            return real_open(path, mode, *more, **keywords)

        patch.setattr(Path, "open", opened)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.names.append(" ".join([name, *map(str, arguments)]))
            return real(*arguments, **keywords)

        return call

    def at(self, pattern: str) -> list[int]:
        """Which of them match."""
        return [place for place, name in enumerate(self.names) if re.search(pattern, name)]


def moments(changes: Changes) -> list[int]:
    """Before which changes a build that grows is killed."""
    manifests, receipts = changes.at(rf"^replace.*{MANIFEST}$"), changes.at(r"^replace.*/receipts/.*json$")
    tables, gone = changes.at(r"^replace.*/receipts-.*parquet$"), changes.at(r"^unlink.*/receipts/.*json$")
    files = [place for place in changes.at(r"^replace.*/data/.*") if place > receipts[0]]
    return [
        manifests[0],
        manifests[0] + 1,
        files[0] + 1,
        receipts[len(receipts) // 2] + 1,
        tables[-1] + 1,
        manifests[-1],
        manifests[-1] + 1,
        gone[len(gone) // 2] + 1,
    ]


class TestKilled:
    """SIGKILL at any moment of any growth; the same command ends with the bytes of one that nothing disturbed."""

    @pytest.mark.parametrize("kind", [pytest.param("zarr", marks=pytest.mark.slow), "parquet"])
    def test_at_several_moments(self, kind: str, data: Data, whole: dict[str, tc.Cache], tmp_path: Path) -> None:
        """Every growth of a history is killed, with each store at other moments; nothing committed is made again."""
        trees, kills = [], []
        for wish in HISTORY:
            with pytest.MonkeyPatch.context() as patch:
                changes = Changes(patch)
                grown(wish.spec(tmp_path / "undisturbed", data, store__kind=kind))
            trees.append(tree(tmp_path / "undisturbed"))
            kills.append(moments(changes))
        path, held = tmp_path / "killed", set[Atom]()
        grown(HISTORY[0].spec(path, data, store__kind=kind))
        held |= HISTORY[0].atoms
        for step, wish in enumerate(HISTORY[1:], 1):
            spec, additions = wish.spec(path, data, store__kind=kind), len(tc.open(path).manifest.additions)
            point = kills[step][(3 * step + (kind == "zarr")) % len(kills[step])]
            code = joined(start_build(spec, "serial", {}, tmp_path / "output", point))
            assert code == -9, (tmp_path / "output").read_text()
            before = tc.open(path, sealed=True)
            if len(before.manifest.additions) == additions:
                require_exactly(before, held, whole)
            done = _committed_since(tc.open(path), additions)
            missing = len({(atom.view, atom.row) for atom in wish.atoms - held})
            report, asked = grow(spec)
            assert report is not None
            assert (asked, report.rows_built) == (missing - done, missing - done), (step, point)
            assert cache_files(path) == trees[step], (step, point)
            held |= wish.atoms

    @STORES
    def test_before_every_thirteenth_change(self, kind: str, data: Data, tmp_path: Path) -> None:
        """Rows and a field at once, three additions: dies in this process, then goes on."""
        first, then = Wish(views=1, fields=("logits",)), Wish(11, 1, ("logits", "feature:stem"))
        base, expected, point = tmp_path / "base", tmp_path / "expected", 0
        changes = {"store": {"kind": kind, "shard_rows": 8, "chunk_rows": 4}}
        grown(first.spec(base, data, **changes))
        shutil.copytree(base, expected)
        grown(then.spec(expected, data, **changes))
        while True:
            path = tmp_path / f"{point}"
            shutil.copytree(base, path)
            with pytest.MonkeyPatch.context() as patch:
                try:
                    die_before(patch, point)
                    build(then.spec(path, data, **changes), "serial")
                    break
                except Crashed:
                    pass
            assert len(tc.open(path, sealed=True).read("logits", 0, range(9)).dense().values) == 9
            build(then.spec(path, data, **changes), "serial")
            assert cache_files(path) == tree(expected), point
            point += 13
        assert point > 60


@pytest.mark.slow
def test_on_ray(data: Data, tmp_path: Path) -> None:
    """Two workers open what was there before, and write what the serial loop writes."""
    for name in ("serial", "ray"):
        for wish in HISTORY[:2]:
            build(wish.spec(tmp_path / name, data, compute__workers=2), "serial")
    wish = Wish(14, 3, ("logits",), "other")
    build(wish.spec(tmp_path / "serial", data, compute__workers=2), "serial")
    build(wish.spec(tmp_path / "ray", data, compute__workers=2), "ray")
    assert tree(tmp_path / "ray") == tree(tmp_path / "serial")


class Crashed(BaseException):
    """The process is gone: nothing may catch it and go on writing."""


def die_before(patch: pytest.MonkeyPatch, point: int) -> None:
    """Lets so many changes of the file system happen; every later one fails."""
    changes = Changes(patch)

    class Ends(list[str]):
        def append(self, name: str) -> None:
            if len(self) >= point:
                raise Crashed(name)
            super().append(name)

    changes.names = Ends()


def cache_files(path: Path) -> dict[str, str]:
    """The tree without what builders that were killed have left: see `test_no_claim_stays`."""
    return {name: digest for name, digest in tree(path).items() if not is_lease(name)}


def _committed_since(cache: tc.Cache, additions: int) -> int:
    """Views of rows that are committed in additions from this one on."""
    found = 0
    for index in cache.indices[additions:]:
        spans = [index.addition.span(shard) for _, shard in index.places()]
        found += sum(stop - start for start, stop in spans)
    return found


class TestBesideOthers:
    """What else may happen on the same folder while a cache grows, or after a builder died there."""

    def test_no_claim_stays(self, data: Data, tmp_path: Path) -> None:
        """The leader took over from one that was killed; sealing its first addition does not cost it the lead."""
        grown(Wish().spec(tmp_path / "cache", data))
        wish = Wish(14, 3)
        spec = wish.spec(tmp_path / "cache", data)
        code = joined(start_build(spec, "serial", {"TOY_LOG": str(tmp_path / "log")}, tmp_path / "output", 60))
        assert code == -9, (tmp_path / "output").read_text()
        assert [name for name in tree(tmp_path / "cache") if name.startswith("claims/lead")]
        grow(spec)
        assert not [name for name in tree(tmp_path / "cache") if is_lease(name)]

    def test_nothing_to_do_disturbs_nobody(self, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between the look at the manifest and the end of a build that has nothing to do another begins to grow it."""
        path, small, build_module = tmp_path / "cache", Wish(), importlib.import_module("teacher_cache.build")
        grown(small.spec(path, data))
        real = build_module.prepare

        def prepare(*arguments: Any) -> Any:
            found = real(*arguments)
            monkeypatch.setattr(build_module, "prepare", real)
            grow(replace(small, views=3).spec(path, data), stop=2)
            return found

        monkeypatch.setattr(build_module, "prepare", prepare)
        grow(small.spec(path, data))
        assert _committed_since(tc.open(path), 1) == 8

    def test_a_table_of_a_growth_that_was_given_up(self, data: Data, tmp_path: Path) -> None:
        """Killed before its manifest; then the source has grown further, and there is another sample table."""
        path = tmp_path / "cache"
        grown(Wish().spec(path, data))
        with pytest.MonkeyPatch.context() as patch:
            changes = Changes(patch)
            grow(Wish(11).spec(tmp_path / "cache", data), stop=1)
        shutil.rmtree(path)
        grown(Wish().spec(path, data))
        with pytest.MonkeyPatch.context() as patch:
            die_before(patch, changes.at(rf"^replace.*{MANIFEST}$")[0])
            with pytest.raises(Crashed):
                build(Wish(11).spec(path, data), "serial")
        assert len(list(path.glob("samples-*"))) == 2
        grown(Wish(14).spec(path, data))
        assert len(list(path.glob("samples-*"))) == 2
        found = tc.verify(path, views="all")
        assert found.ok, found.problems

    def test_a_reader_of_before_reads_on(self, data: Data, whole: dict[str, tc.Cache], tmp_path: Path) -> None:
        """It was opened before, or while it grew without what was being added; it sees the same when all is sealed."""
        path, first = tmp_path / "cache", Wish()
        grown(first.spec(path, data))
        before = tc.open(path)
        grow(Wish(14, 3).spec(path, data), stop=1)
        during = tc.open(path, sealed=True)
        assert during.manifest == before.manifest
        assert pickle.loads(pickle.dumps(during)).manifest == before.manifest
        grow(Wish(14, 3).spec(path, data))
        for cache in (before, during):
            require_exactly(cache, first.atoms, whole)
        now = pickle.loads(pickle.dumps(during))
        require_exactly(now, Wish(14, 3).atoms, whole)
        require_exactly(before.again(), Wish(14, 3).atoms, whole)

    @pytest.mark.parametrize("sealed", [False, True])
    def test_sealed_between_manifest_and_tables(
        self, sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The table of tombstones that the manifest of before names is gone when it is read."""
        spec = pictures_spec(tmp_path, [Part(0, 9, {3})])
        grow(spec)
        more = pictures_spec(tmp_path, [Part(0, 9, {3}), Part(9, 5, {10})])
        grow(more, stop=1)
        real = read_manifest

        def read(root: Any) -> Manifest:
            found = real(root)
            monkeypatch.setattr(reader, "read_manifest", real)
            grow(more)
            return found

        monkeypatch.setattr(reader, "read_manifest", read)
        assert np.flatnonzero(~tc.open(spec.cache, sealed=sealed).alive).tolist() in ([3], [3, 10])


class Part(NamedTuple):
    """A file of a data set of small pictures."""

    first: int
    rows: int
    broken: set[int]
    """Rows whose bytes are no picture; their number is the same."""


def pictures_spec(folder: Path, parts: Sequence[Part], name: str = "cache", **changes: Any) -> BuildSpec:
    """Writes Parquet files of 8×8 pictures of fixed size, and gives a spec over them."""
    for part in parts:
        images, rows = [], range(part.first, part.first + part.rows)
        for row in rows:
            pixels = np.random.Generator(np.random.Philox(row)).integers(1, 255, 64).astype(np.uint8)
            data = b"P5 8 8 255\n" + pixels.tobytes()
            images.append({"bytes": bytes(len(data)) if row in part.broken else data, "path": f"{row}.pgm"})
        pq.write_table(pa.table({"image": images, "label": [row % 10 for row in rows]}), place_of(folder, part))
    source = {"kind": "parquet", "path": [str(place_of(folder, part)) for part in parts]}
    told = {"teacher__model": "toy_models:Told", "store": STORE, **changes}
    return toy_spec(folder / name, folder, source=source, **told)


def place_of(folder: Path, part: Part) -> Path:
    """Where the file is."""
    return folder / f"part{part.first}.parquet"


NO_PARTNER = pytest.mark.xfail(
    strict=True,
    raises=(AssertionError, MismatchError),
    reason="a row that becomes a tombstone while growing is a partner that older views cannot be rendered without",
)


class TestTombstones:
    """A sample that was broken when its rows came stays a tombstone, whatever is added and whatever is mended."""

    @pytest.mark.parametrize(("mended", "kind"), [(False, "zarr"), (True, "parquet")], ids=["broken", "mended"])
    def test_they_stay(self, mended: bool, kind: str, tmp_path: Path) -> None:
        """One in each segment: no view, field or teacher that is added has them."""
        first, second = Part(0, 9, {3}), Part(9, 5, {10})
        report, asked = grow(pictures_spec(tmp_path, [first], store__kind=kind))
        assert report is not None
        assert (report.tombstones[0][0], report.rows_built, asked) == ("3.pgm", 18, 16)
        grown_by = grow(pictures_spec(tmp_path, [first, second], store__kind=kind))
        assert grown_by[1] == 2 * 4, "the broken one is not asked about"
        now = [part._replace(broken=set()) if mended else part for part in (first, second)]
        for changes in (
            {"views__count": 3},
            {"views__count": 3, "teacher__fields": {"logits@k3": FIELDS["logits@k3"]}},
            {"teacher__name": "other", "teacher__arguments": {"scale": 2.0}},
        ):
            spec = pictures_spec(tmp_path, now, store__kind=kind, **changes)
            report, asked = grow(spec)
            assert report is not None
            assert [key for key, _ in report.tombstones] == ["3.pgm", "10.pgm"]
            assert asked % 12 == 0
            assert asked > 0
            cache = tc.open(spec.cache)
            assert np.flatnonzero(~cache.alive).tolist() == [3, 10]
            found = tc.verify(spec.cache, views="all", recompute=20)
            assert found.ok, found.problems
        cache = tc.open(tmp_path / "cache")
        assert (cache.totals.tombstones, [key for key, _ in cache.samples.tombstones]) == (2, ["3.pgm", "10.pgm"])
        for field in cache.fields:
            with pytest.raises(TombstoneError, match=r"10\.pgm"):
                cache.read(field, 1, [2, 10])
            cache.read(field, 1, np.flatnonzero(cache.alive))

    def test_the_same_bytes_whether_mended_or_not(self, tmp_path: Path) -> None:
        """A tombstone's file decides nothing any more."""
        for name, broken in (("one", {3}), ("two", set[int]())):
            grow(pictures_spec(tmp_path, [Part(0, 9, {3})], name))
            grow(pictures_spec(tmp_path, [Part(0, 9, broken), Part(9, 5, set())], name, views__count=3))
        assert tree(tmp_path / "one") == tree(tmp_path / "two")

    @pytest.mark.parametrize("now", ["changed", "broken"])
    def test_a_sample_whose_bytes_changed(self, now: str, tmp_path: Path) -> None:
        """Of the same size, so that only reading it shows it: no shard with it is committed; restored, it goes on."""
        part = Part(0, 9, set())
        spec = pictures_spec(tmp_path, [part])
        grown(spec)
        before, images = tree(tmp_path / "cache"), place_of(tmp_path, part).read_bytes()
        other = pictures_spec(tmp_path, [part._replace(broken={5})], views__count=3)
        if now == "changed":
            table = pq.read_table(place_of(tmp_path, part)).to_pydict()
            table["image"][5]["bytes"] = table["image"][6]["bytes"]
            pq.write_table(pa.table(table), place_of(tmp_path, part))
        error = {"changed": MismatchError, "broken": CorruptionError}[now]
        with pytest.raises(error, match=r"5\.pgm.*Restore the data set|5\.pgm.*restore the data set"):
            grow(other)
        require_untouched(before, tree(tmp_path / "cache"))
        assert _committed_since(tc.open(other.cache), 1) == 4
        assert tc.open(other.cache, sealed=True).manifest.state == "sealed"
        place_of(tmp_path, part).write_bytes(images)
        assert grow(other)[1] == 5
        assert tc.verify(other.cache, views="all", recompute=20).ok

    @pytest.mark.parametrize("recipe", ["plain", pytest.param("mixes", marks=NO_PARTNER)])
    def test_a_killer_that_is_found_while_growing(self, recipe: str, data: Data, tmp_path: Path) -> None:
        """It has answers of before; from now on it has none, and no shard of the addition was made with it."""
        path = tmp_path / "cache"
        views = {"recipe": [*RECIPE, *([{"mixup": {}}] if recipe == "mixes" else [])], "count": 2, "seed": 11}
        grown(Wish().spec(path, data, views=views))
        before, wish = tree(path), Wish(fields=("logits",), teacher="other")
        spec = wish.spec(path, data, views=views)
        grow(spec, stop=1)
        addition = tc.open(path).manifest.open_addition
        assert addition is not None
        note_poison(LocalRoot(path), addition, 0, 0, [2])
        report, asked = grow(spec)
        assert report is not None
        assert report.tombstones == (("images/2", KILLED),)
        assert asked == 2 * 8, "the shard that was committed with it is made again"
        require_untouched(before, tree(path))
        found = tc.verify(path, views="all", recompute=20)
        assert found.ok, found.problems
        cache = tc.open(path)
        for field in cache.fields:
            with pytest.raises(TombstoneError, match=KILLED):
                cache.read(field, 0, [2])
        grow(Wish(11, 3).spec(path, data, views=views))
        found = tc.verify(path, views="all", recompute=20)
        assert found.ok, found.problems


def partners(cache: tc.Cache, view: int) -> NDArray[np.int64]:
    """The row that each row is mixed with."""
    found = cache.loader.partner_rows(cache.render_views(view, range(len(cache))))
    assert found is not None
    return found


class TestMixing:
    """A row's partners are of the rows that there were when it came; so what was mixed before stays as it is."""

    @pytest.mark.parametrize(
        ("kind", "mix"), [("zarr", {"mixup": {"alpha": 0.4}}), ("parquet", {"cutmix": {}})], ids=["mixup", "cutmix"]
    )
    def test_partners(self, kind: str, mix: dict[str, Any], data: Data, tmp_path: Path) -> None:
        """Rows, then views; and views and rows in one wish."""
        views = {"recipe": [*RECIPE, mix], "count": 2, "seed": 11}
        path, more = tmp_path / "cache", views | {"count": 4}
        changes = {"store__kind": kind}
        grown(Wish().spec(path, data, views=views, **changes))
        before = [tc.open(path).params(view, range(9)) for view in range(2)]
        grown(Wish(14).spec(path, data, views=views, **changes))
        grown(Wish(ROWS).spec(path, data, views=more, **changes))
        grown(Wish(ROWS, fields=("logits@k3",), teacher="other").spec(path, data, views=more, **changes))
        cache = tc.open(path)
        assert [segment.rows for segment in cache.manifest.segments] == [9, 5, 13]
        for view in range(4):
            rows = np.random.Generator(np.random.Philox(view)).permutation(ROWS)
            stored = cache.params(view, rows)
            assert (cache.draw(view, rows) == stored).all(), "in one call, over all segments"
            if view < 2:
                assert (cache.params(view, range(9)) == before[view]).all()
            found = partners(cache, view)
            assert found[:9].max() < 9
            assert found[9:14].max() < 14
            assert found[14:].min() < 14 <= found[14:].max()
        report = verify_views(cache, {view: list(range(ROWS)) for view in range(4)})
        assert (report.checked, report.redrawn, report.problems) == (4 * ROWS, 0, ())
        verified = tc.verify(path, views="all", recompute=40)
        assert verified.ok, verified.problems
        assert verified.notes == ()

    def test_the_order_of_growing_does_not_matter_within_a_segment(self, data: Data, tmp_path: Path) -> None:
        """Views first, rows first, or both at once: the same partners."""
        views = {"recipe": [*RECIPE, {"mixup": {}}], "seed": 11}
        orders = {"views": [(9, 2), (9, 3), (14, 3)], "rows": [(9, 2), (14, 2), (14, 3)], "both": [(9, 2), (14, 3)]}
        for name, steps in orders.items():
            for rows, count in steps:
                grown(Wish(rows, count).spec(tmp_path / name, data, views=views | {"count": count}))
        caches = [tc.open(tmp_path / name) for name in orders]
        for view in range(3):
            ours, *others = [cache.columns("logits", view, range(14))["values"] for cache in caches]
            assert all((ours == theirs).all() for theirs in others), view
            assert all((partners(caches[0], view) == partners(cache, view)).all() for cache in caches)

    @pytest.mark.parametrize("stop", [1, 7])
    def test_the_source_grew_while_an_addition_was_open(self, stop: int, data: Data, tmp_path: Path) -> None:
        """What goes on is the addition as it was begun: its partners are of its own rows."""
        views = {"recipe": [*RECIPE, {"mixup": {}}], "count": 3, "seed": 11}
        for name, then in (("grown", 14), ("same", 9)):
            grow(Wish().spec(tmp_path / name, data, views=views), stop)
            grow(Wish(then).spec(tmp_path / name, data, views=views))
        grow(Wish(14).spec(tmp_path / "same", data, views=views))
        cache = tc.open(tmp_path / "grown")
        assert partners(cache, 2)[:9].max() < 9
        assert tree(tmp_path / "grown") == tree(tmp_path / "same")
        for view in range(3):
            assert (cache.draw(view, range(14)) == cache.params(view, range(14))).all()


def edited(folder: Path, path: Path, **changes: Callable[[NDArray[Any]], NDArray[Any]]) -> Path:
    """A copy of a data set with its arrays changed."""
    path.mkdir()
    for name in ("images", "labels"):
        array = np.load(folder / f"{name}.npy")
        np.save(path / f"{name}.npy", changes[name](array) if name in changes else array)
    return path


class TestRefused:
    """What does not go with a cache is refused by name before anything is written, and told what to do."""

    @pytest.mark.parametrize(
        ("field", "hint", "changes"),
        [
            ("recipe", "`count` may grow", {"views__seed": 12}),
            ("recipe", "`count` may grow", {"views__recipe": [{"horizontal_flip": {}}]}),
            ("store", "Restore `store`", {"store__kind": "parquet"}),
            ("store", "Restore `store`", {"store__shard_rows": 8}),
            ("numerics", "micro_batch", {"teacher__micro_batch": 8}),
            ("numerics", "compute", {"compute__threads": 2}),
            ("numerics", "fidelity", {"fidelity": {"rows_per_shard": 3}}),
            ("teacher.name", "Use that name", {"teacher__name": "another"}),
            ("teacher", "another name", {"teacher__arguments": {"scale": 4.0}}),
            ("teacher", "another name", {"teacher__precision": "bf16"}),
            ("teacher.fields.logits", "a label", {"teacher__fields": {**FIELDS, "logits": {"encoding": "dense_f16"}}}),
            ("teacher.fields.feature:stem", "a label", {"teacher__fields": {**FIELDS, "feature:stem": {}}}),
        ],
    )
    @pytest.mark.parametrize("state", ["sealed", "growing"])
    def test_another_configuration(
        self, state: str, field: str, hint: str, changes: dict[str, Any], data: Data, tmp_path: Path
    ) -> None:
        """Also where it asks for something new beside."""
        path, wish = tmp_path / "cache", Wish(11, 3)
        grown(Wish().spec(path, data))
        if state != "sealed":
            grow(Wish(11, 3).spec(path, data), stop=1)
            wish = Wish(14, 3)
        before = tree(path)
        if state == "growing" and field == "teacher.name":
            hint = "Finish that first"
        with pytest.raises(MismatchError, match=hint) as caught:
            grow(wish.spec(path, data, **changes))
        assert caught.value.field == field
        assert caught.value.exit_code == 1
        assert tree(path) == before

    @pytest.mark.parametrize("state", ["sealed", "grown"])
    def test_another_source(self, state: str, data: Data, tmp_path: Path) -> None:
        """It may only grow at its end."""
        path, rows = tmp_path / "cache", 9 if state == "sealed" else 11
        grown(Wish().spec(path, data))
        if state == "grown":
            grown(Wish(11).spec(path, data))
        before, names = tree(path), [f"class {number}" for number in range(10)]
        shorter = edited(data[rows], tmp_path / "shorter", images=lambda a: a[:-1], labels=lambda a: a[:-1])
        label = edited(data[14], tmp_path / "label", labels=lambda a: np.where(np.arange(len(a)) == 4, 9, a))
        sources = {
            "shorter": numpy_source(shorter),
            "label": numpy_source(label),
            "inserted": numpy_source(
                edited(
                    data[14],
                    tmp_path / "in",
                    images=lambda a: np.insert(a, 2, 7, 0),
                    labels=lambda a: np.insert(a, 2, 7),
                )
            ),
            "without labels": {**numpy_source(data[14]), "labels": None},
            "class names": {**numpy_source(data[14]), "class_names": names[::-1]},
            "keys": {**numpy_source(data[14]), "take": {"count": 12}},
        }
        for name, source in sources.items():
            with pytest.raises(MismatchError, match="it may grow at its end") as caught:
                grow(Wish(14, 3).spec(path, data, source=source))
            assert caught.value.field == "source", name
        assert tree(path) == before

    def test_keys_of_a_folder_of_pictures(self, tmp_path: Path) -> None:
        """The same number of files, one of them under another name."""
        spec = pictures_spec(tmp_path, [Part(0, 9, set())])
        grown(spec)
        table = pq.read_table(place_of(tmp_path, Part(0, 9, set()))).to_pydict()
        table["image"][4]["path"] = "other.pgm"
        pq.write_table(pa.table(table), place_of(tmp_path, Part(0, 9, set())))
        with pytest.raises(MismatchError, match="must begin with the 9 samples") as caught:
            grow(spec)
        assert caught.value.field == "source"

    @pytest.mark.parametrize(
        ("field", "wish"),
        [
            ("views.count", Wish(11, 2)),
            ("teacher.fields", Wish(11, 3, ("feature:stem",))),
            ("teacher.fields", Wish(11, 3, ("logits@k3",))),
            ("teacher.name", Wish(11, 3, ("logits", "feature:stem"), "other")),
        ],
    )
    def test_not_what_is_being_built(self, field: str, wish: Wish, data: Data, tmp_path: Path) -> None:
        """An addition is finished first; whoever asks for it and more goes on with it."""
        path = tmp_path / "cache"
        grown(Wish(11).spec(path, data))
        grow(Wish(11, 3).spec(path, data), stop=1)
        before = tree(path)
        with pytest.raises(MismatchError, match=r"Finish that first.*describe") as caught:
            grow(wish.spec(path, data))
        assert caught.value.field == field
        assert "feature:stem, logits of teacher, views 2..2" in str(caught.value)
        assert tree(path) == before
        assert grow(Wish(14, 3, ("logits", "feature:stem", "logits@k3")).spec(path, data))[0] is not None

    def test_a_smaller_wish_is_fulfilled(self, data: Data, tmp_path: Path) -> None:
        """Fewer views, fewer fields: nothing to do, and nothing is touched."""
        path = tmp_path / "cache"
        grown(Wish(views=3).spec(path, data))
        grown(Wish(11, 3).spec(path, data))
        before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
        for wish in (Wish(11, 1), Wish(11, 3, ("logits",)), Wish(11, 2, ("feature:stem",))):
            report = grown(wish.spec(path, data))
            assert (report.shards_built, report.rows_built, report.rows, report.views) == (0, 0, 11, 3)
            assert set(report.fidelity) == set(wish.fields)
        assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


class TestProof:
    """Whoever answers a view later is shown the pixels that its digest was made of, or the build ends."""

    @pytest.mark.parametrize(
        ("kind", "wish"),
        [("zarr", Wish(fields=("logits@k3",))), ("parquet", Wish(teacher="other"))],
        ids=["field", "teacher"],
    )
    def test_a_digest_that_was_written_wrong(self, kind: str, wish: Wish, data: Data, tmp_path: Path) -> None:
        """It is signed and in its place, and not what is shown now: nothing is committed that was asked about it."""
        path, real = tmp_path / "cache", Views.digests
        wrong: set[int] = set()

        def digests(views: Views) -> NDArray[np.uint64]:
            found = real(views)
            wrong.add(int(found[0]))
            return np.where(found == min(wrong), found ^ np.uint64(1), found)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Views, "digests", digests)
            # Once to see which is the smallest, once with that one flipped.
            for place in (tmp_path / "look", path):
                grown(Wish().spec(place, data, store__kind=kind))
        assert not tc.verify(path, views="all").ok
        with pytest.raises(ViewMismatch, match="must be the pixels that the teacher saw"):
            grow(wish.spec(path, data, store__kind=kind))
        cache = tc.open(path)
        assert cache.manifest.state == "building"
        places = set(cache.indices[-1].places())
        flipped = next(
            (view, row // 4)
            for view in range(2)
            for row in range(9)
            if int(cache.digests(view, [row])[0]) ^ 1 == min(wrong)
        )
        assert flipped not in places
        assert len(places) < 6

    def test_a_callable_that_changed(self, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its name and the versions are as they were, and its code is another: no old view is shown to anyone."""
        views = {"callable": "test_growing:shifted", "count": 2, "seed": 11}
        path = tmp_path / "cache"
        grown(Wish().spec(path, data, views=views))
        before = tree(path)
        monkeypatch.setenv("TOY_SHIFT", "1")
        with pytest.raises(ViewMismatch, match=r"images/0, view 0"):
            grow(Wish(teacher="other").spec(path, data, views=views))
        assert not (path / "receipts").exists()
        require_untouched(before, tree(path))
        monkeypatch.delenv("TOY_SHIFT")
        assert grow(Wish(teacher="other").spec(path, data, views=views))[1] == 18
        grown(Wish(14, 3, teacher="other").spec(path, data, views=views | {"count": 3}))
        assert tc.verify(path, views="all", recompute=20).ok


def shifted(image_CHW: torch.Tensor) -> torch.Tensor:
    """A user's callable whose code changes with a variable."""
    return image_CHW.roll(1 + int(os.environ.get("TOY_SHIFT", "0")), -1)


@pytest.fixture(scope="module", params=["zarr", "parquet"])
def grown_cache(request: pytest.FixtureRequest, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that grew by views, rows, an encoding and a teacher; never changed by a test."""
    path = tmp_path_factory.mktemp(request.param) / "cache"
    for wish in GREW:
        grown(wish.spec(path, data, store__kind=request.param))
    return path


GREW = (
    Wish(),
    Wish(views=3),
    Wish(14, 3),
    Wish(14, 3, ("logits", "logits@k3")),
    Wish(14, 2, ("logits",), "other"),
)


class TestReading:
    """A cache that grew reads as any other."""

    def test_names(self, grown_cache: Path, whole: dict[str, tc.Cache]) -> None:
        cache = tc.open(grown_cache)
        assert set(cache.fields) == {"logits", "feature:stem", "logits@k3", "other/logits"}
        assert cache.teachers == ("teacher", "other")
        assert (len(cache), cache.views) == (14, 3)
        assert {name: cache.views_of(name) for name in cache.fields} == {
            "logits": 3,
            "feature:stem": 3,
            "logits@k3": 3,
            "other/logits": 2,
        }
        assert (cache.shape_of("other/logits"), cache.encoding_of("logits@k3").name) == ((10,), "top_k")
        first = cache.read("teacher/logits", 1, [13, 2]).dense().values
        assert torch.equal(first, cache.read("logits", 1, [13, 2]).dense().values)
        assert torch.equal(cache.read("other/logits", 1, [13, 2]).dense().values, 2 * first)
        for wrong in ("other/feature:stem", "third/logits", "logits@other"):
            with pytest.raises(MismatchError, match="other/logits"):
                cache.read(wrong, 0, [0])
        with pytest.raises(HoleError, match="other/logits, view 2"):
            cache.read("other/logits", 2, [0])
        out = cache.buffers("logits", 3)
        read = cache.columns("logits", 2, [13, 0, 9], out)["values"]
        assert (read == whole["teacher"].columns("logits", 2, [13, 0, 9])["values"]).all()

    @pytest.mark.parametrize("where", ["one segment", "two"])
    def test_only_what_fits_is_read_into(self, where: str, grown_cache: Path) -> None:
        """A buffer that is too long would keep rows of the read before."""
        cache = tc.open(grown_cache)
        rows = [0, 3, 5] if where == "one segment" else [13, 2, 5]
        wrong = [np.empty((8, 10), np.float32), np.empty((3, 10), np.float64), np.empty((10, 3), np.float32).T]
        for buffer in wrong:
            with pytest.raises(SpecError, match=r"out\['values'\]: must be float32 \[3, 10\].*buffer\[:len\(rows\)\]"):
                cache.read("logits", 1, rows, {"values": buffer})
        out = cache.buffers("logits", 8)
        part = {name: buffer[:3] for name, buffer in out.items()}
        assert torch.equal(
            cache.read("logits", 1, rows, part).dense().values, cache.read("logits", 1, rows).dense().values
        )

    def test_totals(self, grown_cache: Path) -> None:
        cache = tc.open(grown_cache)
        files = [path for path in (grown_cache / "data").rglob("*") if path.is_file() and path.name != "zarr.json"]
        totals = cache.totals
        assert totals.bytes == sum(path.stat().st_size for path in files)
        assert set(totals.fidelity) == set(cache.fields)
        assert totals.fidelity["logits"]["rows"] == 3 * 14
        assert totals.fidelity["other/logits"]["rows"] == 2 * 14
        assert totals.labelled == 14 * (3 + 3 + 2), "each answer to a view of a row, by whomever"
        assert totals.tombstones == 0
        assert cache.complete

    def test_a_copy_in_another_process(self, grown_cache: Path) -> None:
        cache = tc.open(grown_cache)
        copied = pickle.loads(pickle.dumps(cache))
        for field in cache.fields:
            ours, theirs = (each.columns(field, 1, range(14)) for each in (cache, copied))
            assert all((ours[part] == theirs[part]).all() for part in ours)

    @pytest.mark.parametrize("together", [1, 3])
    def test_a_stream(self, together: int, grown_cache: Path) -> None:
        """Rows of both segments in one batch, each with the answer to the very view that is beside it."""
        cache = tc.open(grown_cache)
        stream = ViewStream(
            cache, batch_size=6, fields=["logits", "logits@k3"], check_views=6, views_per_decode=together
        )
        seen, mixed = set[tuple[int, int]](), False
        for _epoch in range(3 // together):
            for batch in stream:
                exact = expected_logits(batch.views_BCHW)
                assert (batch.targets["logits"].dense().values.numpy() == exact).all()
                assert (np.asarray(batch.labels_B) == batch.rows_B % 8).all()
                seen |= set(zip(batch.view_B.tolist(), batch.rows_B.tolist(), strict=True))
                mixed |= bool(batch.rows_B.min() < 9 <= batch.rows_B.max())
        assert seen == {(view, row) for view in range(3) for row in range(14)}
        assert mixed

    def test_a_stream_of_a_field_with_fewer_views(self, grown_cache: Path) -> None:
        """It is refused before the first batch, not in the epoch that has no answers; never another view's answer."""
        with pytest.raises(MismatchError, match=r"other/logits: must have the 3 views that are read \(found: 2\)"):
            ViewStream(tc.open(grown_cache), batch_size=14, fields=["logits", "other/logits"])
        with pytest.raises(HoleError, match="other/logits, view 2"):
            tc.open(grown_cache).read("other/logits", 2, [0])

    def test_no_rows_of_a_view_that_a_field_has_not(self, grown_cache: Path) -> None:
        """Nothing is asked for, and nothing is there."""
        with pytest.raises(HoleError, match="other/logits, view 2"):
            tc.open(grown_cache).read("other/logits", 2, [])

    def test_describe(self, grown_cache: Path, run: Run) -> None:
        code, out, _ = run("describe", grown_cache)
        assert code == 0
        for row in (r"0–8\s.*0–1\s.*teacher", r"0–8\s.*2\s.*teacher", r"9–13\s.*0–2", r"logits@k3 \(top_k\)", r"other"):
            assert re.search(row, out), row
        assert "14 samples × 3 views" in out
        code, out, _ = run("describe", grown_cache, "--json")
        described = json.loads(out)
        kinds = [(item["extent"]["first_row"], item["extent"]["first_view"]) for item in described["additions"]]
        assert kinds == [(0, 0), (0, 2), (9, 0), (0, 0), (9, 0), (0, 0), (9, 0)]
        assert [item["extent"]["proof"] for item in described["additions"]] == [True] * 3 + [False] * 4
        assert {item["state"] for item in described["additions"]} == {"sealed"}

    def test_status_while_it_grows(self, data: Data, tmp_path: Path, run: Run) -> None:
        path = tmp_path / "cache"
        grown(Wish().spec(path, data))
        assert run("status", path)[0] == 0
        grow(Wish(11, 3).spec(path, data), stop=2)
        code, out, _ = run("status", path, "--json")
        told = json.loads(out)
        assert (code, told["state"], told["complete"]) == (1, "building", False)
        assert (told["shards committed"], told["shards planned"]) == (6 + 2, 6 + 3)
        code, out, _ = run("describe", path)
        assert (code, "building" in out) == (0, True)
        assert not tc.open(path).complete
        grow(Wish(11, 3).spec(path, data))
        assert run("status", path)[0] == 0

    def test_the_report_counts_what_was_added(self, data: Data, tmp_path: Path) -> None:
        """Of this run what it made; of the cache all that the configuration asks for."""
        path, told = tmp_path / "cache", list[tuple[int, int, int]]()
        grown(Wish().spec(path, data))
        report = build(Wish(14, 3).spec(path, data), "serial", lambda *numbers: told.append(numbers))
        assert (report.rows, report.views) == (14, 3)
        assert (report.shards_built, report.rows_built) == (3 + 2 * 3, 9 + 5 * 3)
        assert report.shards_total == 2 * 3 + 3 + 2 * 3
        assert report.fidelity["logits"]["rows"] == 14 * 3
        assert report.bytes == tc.open(path).totals.bytes
        assert told[0] == (0, 24, 0)
        assert told[-1] == (24, 24, 24)
        assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
        again = grown(Wish(14, 3, ("logits",), "other").spec(path, data))
        assert (again.rows_built, again.shards_total) == (14 * 3, 5 * 3)
        assert again.bytes < report.bytes
        assert again.teacher_accuracy == report.teacher_accuracy, "twice the logits have the same largest"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `teacher-cache` in this process; gives exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["teacher-cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        found = capsys.readouterr()
        return int(done.value.code or 0), found.out, found.err

    return call


class TestChosenEncodings:
    """What was chosen or measured when a field came holds for all rows and views that it grows by."""

    @STORES
    def test_constants_are_those_of_before(self, kind: str, data: Data, tmp_path: Path) -> None:
        """A byte a number by scales of its channels, logits chosen by a bound, and what a head reads."""
        path = tmp_path / "cache"
        fields: dict[str, Any] = {"feature:stem": {"encoding": "u8_channel"}, "logits": {"encoding": {"max_kl": 0.01}}}
        steps = ((9, 2, fields), (14, 3, fields), (14, 3, {"feature:stem": fields["feature:stem"]}), (ROWS, 3, fields))
        for rows, count, kept in steps:
            changes = {"teacher__fields": kept, "views__count": count, "store__kind": kind}
            build(Wish(rows).spec(path, data, **changes), "serial")
        manifest = tc.open(path).manifest
        assert {item.fields["logits"].encoding.kind for item in manifest.additions} != {"auto"}
        assert len({item.fields["logits"].encoding.kind for item in manifest.additions}) == 1
        assert len({item.constants for item in manifest.additions}) == 1
        cache = tc.open(path)
        for view in range(3):
            pixels = cache.render(view, range(ROWS)).float()
            read = cache.read("feature:stem", view, range(ROWS)).dense().values
            assert (read - pixels).abs().max() < 2
        found = tc.verify(path, views="all", recompute=40)
        assert found.ok, found.problems
