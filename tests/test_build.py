"""Builds: the same bytes however they come about, and an error that says what to do wherever they cannot."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_builds import ROWS, addition_of, committed, expected_logits, numpy_source, toy_spec, tree, write_arrays
from toy_models import POISON

import teacher_cache as tc
from teacher_cache.build import BuildReport, build
from teacher_cache.errors import (
    BuildError,
    CorruptionError,
    HoleError,
    MismatchError,
    NonFiniteError,
    SourceError,
    SpecError,
    TeacherError,
    TombstoneError,
)
from teacher_cache.receipts import receipt_path
from teacher_cache.spec import BuildSpec, FidelitySpec, parse

STORES = pytest.mark.parametrize("store", ["zarr", "parquet"])


def stored(kind: str) -> dict[str, Any]:
    return {"kind": kind, "shard_rows": 8, "chunk_rows": 4}


def serial(spec: BuildSpec) -> BuildReport:
    return build(spec, executor="serial")


class Stop(Exception):  # noqa: N818 - no error: a way out
    """Raised by a progress callback to end a build between two shards."""


def build_some(spec: BuildSpec, shards: int) -> None:
    """Commits so many shards and stops, as Ctrl-C between two shards would."""
    told = 0

    def progress(_done: int, _total: int, _built: int) -> None:
        nonlocal told
        told += 1
        if told > shards:
            raise Stop

    with pytest.raises(Stop):
        build(spec, executor="serial", progress=progress)


class TestContents:
    """A built cache holds what the teacher says of the views that its recipe names."""

    def test_every_row_of_every_view(self, built: Path) -> None:
        cache = tc.open(built)
        assert (len(cache), cache.views) == (ROWS, 2)
        assert sorted(cache.fields) == ["feature:stem", "logits"]
        for view in range(2):
            rows = list(range(ROWS))
            pixels = cache.render(view, rows)
            target = cache.read("logits", view, rows)
            assert isinstance(target, tc.DenseTarget)
            assert (target.values.numpy() == expected_logits(pixels)).all()
            means = pixels.float().mean((2, 3)).half()
            feature = cache.read("feature:stem", view, rows)
            assert isinstance(feature, tc.DenseTarget)
            assert (feature.values == means).all()
        assert tc.verify(built, recompute=20, views=20).ok

    @STORES
    def test_two_builds_are_equal_bytes(self, store: str, arrays: Path, tmp_path: Path) -> None:
        """No time, place or order is in a cache."""
        for name in ("one", "two"):
            serial(toy_spec(tmp_path / name, arrays, store=stored(store)))
        assert tree(tmp_path / "one") == tree(tmp_path / "two")

    def test_a_row_does_not_depend_on_the_other_rows(self, arrays: Path, tmp_path: Path) -> None:
        """A subset's rows are those of the whole: views and answers follow the sample, not its place."""
        serial(toy_spec(tmp_path / "all", arrays))
        serial(toy_spec(tmp_path / "some", arrays, source={**numpy_source(arrays), "take": {"count": 9}}))
        whole, part = tc.open(tmp_path / "all"), tc.open(tmp_path / "some")
        rows = [whole.samples.keys.index(key) for key in part.samples.keys]
        for view in range(2):
            assert (whole.digests(view, rows) == part.digests(view, range(9))).all()
            ours = part.read("logits", view, range(9)).dense().values
            assert (ours == whole.read("logits", view, rows).dense().values).all()

    def test_the_report_counts(self, arrays: Path, tmp_path: Path) -> None:
        told: list[tuple[int, int, int]] = []
        spec = toy_spec(tmp_path / "cache", arrays)
        report = build(spec, "serial", lambda *numbers: told.append(numbers))
        assert (report.rows, report.views, report.shards_total, report.shards_built) == (ROWS, 2, 8, 8)
        assert report.rows_built == 2 * ROWS
        assert report.rows_per_second > 0
        assert told[0] == (0, 2 * ROWS, 0)
        assert told[-1] == (2 * ROWS, 2 * ROWS, 2 * ROWS)
        files = [path for path in (tmp_path / "cache/data").rglob("*") if path.is_file()]
        assert report.bytes == sum(path.stat().st_size for path in files if path.name != "zarr.json")
        assert report.fidelity["logits"]["top1"] == 1
        assert report.fidelity["logits"]["rows"] == 2 * ROWS
        assert 0 < report.fidelity["feature:stem"]["relative_squared_error"] < 1e-6

    def test_accuracy_is_over_the_labels(self, arrays: Path, tmp_path: Path) -> None:
        """A teacher that is right is at 100 %, and nothing is warned of; one at chance is."""
        views = {"recipe": [], "count": 1}
        right = serial(
            toy_spec(tmp_path / "a", arrays, views=views, teacher__model="toy_models:Bands", teacher__fields=["logits"])
        )
        assert right.teacher_accuracy == 1
        assert right.warnings == ()
        chance = serial(
            toy_spec(
                tmp_path / "b", arrays, views=views, teacher__model="toy_models:Constant", teacher__fields=["logits"]
            )
        )
        assert chance.teacher_accuracy == 0
        assert "near chance" in chance.warnings[0]
        assert "teacher.normalize" in chance.warnings[0]

    def test_without_labels_there_is_no_accuracy(self, arrays: Path, tmp_path: Path) -> None:
        source = {key: value for key, value in numpy_source(arrays).items() if key != "labels"}
        report = serial(toy_spec(tmp_path / "cache", arrays, source=source))
        assert report.teacher_accuracy is None
        assert report.warnings == ()
        assert tc.open(tmp_path / "cache").labels is None

    def test_torch_threads_are_put_back(self, arrays: Path, tmp_path: Path) -> None:
        import torch

        before = torch.get_num_threads()
        serial(toy_spec(tmp_path / "cache", arrays))
        assert torch.get_num_threads() == before


class TestResume:
    """Killed at any moment, the same command ends with the bytes of an undisturbed build."""

    @pytest.mark.parametrize("store", ["zarr", pytest.param("parquet", marks=pytest.mark.slow)])
    def test_kill_9_half_way(self, store: str, arrays: Path, tmp_path: Path) -> None:
        """SIGKILL inside a shard: what is committed is kept as it is, no hole is read, the end is the same."""
        teacher = {"teacher__model": "toy_models:KillsItself", "store": stored(store)}
        spec = toy_spec(tmp_path / "killed", arrays, **teacher)
        program = (
            "import sys; from teacher_cache import build, BuildSpec\n"
            "build(BuildSpec.model_validate_json(sys.argv[1]), executor='serial')"
        )
        killed = subprocess.run(
            [sys.executable, "-c", program, spec.model_dump_json()],
            env={**os.environ, "TOY_KILL_AFTER": "5"},
            capture_output=True,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        cache = tc.open(spec.cache)
        assert sorted(committed(cache)) == [(0, 0), (0, 1)]
        assert not cache.complete
        cache.read("logits", 0, range(16))
        with pytest.raises(HoleError, match=r"view 0.*rows 16\.\.23"):
            cache.read("logits", 0, [0, 16])
        with pytest.raises(HoleError, match="view 1"):
            cache.read("logits", 1, [0])
        before = {path: path.stat() for path in Path(spec.cache, "data").rglob("*") if path.is_file()}
        report = serial(spec)
        assert (report.shards_built, report.rows_built) == (6, 11 + ROWS)
        for path, stat in before.items():
            if path.name != "zarr.json":
                assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
        serial(toy_spec(tmp_path / "whole", arrays, **teacher))
        assert tree(tmp_path / "killed") == tree(tmp_path / "whole")

    @STORES
    @pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
    def test_every_crash_point(
        self, step: int, store: str, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Dies before a change of the file system, each third one in turn (slow: each), and goes on: the same tree."""
        changes: dict[str, Any] = {
            "source": {**numpy_source(arrays), "take": {"count": 9}},
            "views__count": 1,
            "store": stored(store),
            "teacher__fields": ["logits"],
        }
        serial(toy_spec(tmp_path / "whole", arrays, **changes))
        expected = tree(tmp_path / "whole")
        point, reached = 0, True
        while reached:
            spec = toy_spec(tmp_path / f"crash{point}", arrays, **changes)
            with monkeypatch.context() as patch:
                crash = Crash(patch, point)
                try:
                    serial(spec)
                    reached = False
                except Crashed:
                    assert crash.dead
            serial(spec)
            assert tree(Path(spec.cache)) == expected, f"crash point {point}, before {crash.log[-1]}"
            point += step
        assert point > 20

    def test_ctrl_c_between_shards(self, arrays: Path, tmp_path: Path) -> None:
        spec = toy_spec(tmp_path / "cache", arrays)
        build_some(spec, 3)
        assert len(committed(tc.open(spec.cache))) == 3
        assert serial(spec).shards_built == 5
        assert tc.verify(spec.cache).ok

    def test_a_sealed_cache_is_left_alone(self, arrays: Path, tmp_path: Path) -> None:
        """Building again changes no file, not even its time, and reports the same figures."""
        spec = toy_spec(tmp_path / "cache", arrays)
        first = serial(spec)
        before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(spec.cache).rglob("*")}
        again = serial(spec)
        assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(spec.cache).rglob("*")} == before
        assert (again.shards_built, again.rows_built) == (0, 0)
        assert (again.fidelity, again.bytes, again.teacher_accuracy) == (
            first.fidelity,
            first.bytes,
            first.teacher_accuracy,
        )

    def test_a_damaged_receipt_stops_the_build(self, arrays: Path, tmp_path: Path) -> None:
        """It is neither trusted nor silently replaced."""
        spec = toy_spec(tmp_path / "cache", arrays)
        build_some(spec, 2)
        path = Path(spec.cache, receipt_path(0, 0))
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(CorruptionError, match=re.escape(receipt_path(0, 0))):
            serial(spec)

    def test_a_changed_source_is_found(self, tmp_path: Path) -> None:
        """Bytes that change between two views of one build: the answers belong to two contents."""
        folder = write_arrays(tmp_path / "arrays")
        spec = toy_spec(tmp_path / "cache", folder)
        build_some(spec, 4)
        images = np.load(folder / "images.npy")
        images[5, 0, 0] ^= 1
        np.save(folder / "images.npy", images)
        with pytest.raises(CorruptionError, match=r"images/5.*changed in the source"):
            serial(spec)


class Crashed(BaseException):
    """The process is gone: nothing may catch it and go on writing."""


class Crash:
    """Lets `point` changes of the file system happen, then dies: every later one fails too."""

    def __init__(self, patch: pytest.MonkeyPatch, point: int) -> None:
        self.left, self.dead, self.log = point, False, ["nothing"]
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(Path, name, self._wrapped(f"Path.{name}", getattr(Path, name)))
        patch.setattr(os, "fsync", self._wrapped("os.fsync", os.fsync))
        real_open = Path.open

        def opened(path: Path, mode: str = "r", *more: Any, **keywords: Any) -> Any:
            if set(mode) & set("wxa+"):
                self._step(f"open {path.name}")
            return real_open(path, mode, *more, **keywords)

        patch.setattr(Path, "open", opened)

    def _step(self, what: str) -> None:
        if self.dead or self.left == 0:
            if not self.dead:
                self.log.append(what)
            self.dead = True
            raise Crashed
        self.left -= 1

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._step(f"{name} {arguments[0]}")
            return real(*arguments, **keywords)

        return call


class TestMismatch:
    """Another source, recipe, teacher, encoding, store or micro-batch in the same folder is refused by name."""

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("recipe", {"views__seed": 12}),
            ("recipe", {"views__recipe": [{"horizontal_flip": {}}]}),
            ("teacher", {"teacher__arguments": {"scale": 2.0}}),
            ("teacher", {"teacher__model": "toy_models:KillsItself"}),
            ("teacher", {"teacher__normalize": {"mean": [0.0], "std": [1.0]}}),
            ("teacher", {"teacher__precision": "bf16"}),
            ("teacher", {"teacher__class_names": [f"class {number}" for number in range(10)]}),
            (
                "teacher.fields.logits",
                {"teacher__fields": {"logits": {"encoding": "dense_f16"}, "feature:stem": {"pool": "mean"}}},
            ),
            ("store", {"store__kind": "parquet"}),
            ("store", {"store__shard_rows": 16}),
            ("numerics", {"teacher__micro_batch": 8}),
            ("numerics", {"compute__threads": 2}),
            ("teacher.name", {"teacher__name": "other"}),
        ],
    )
    @pytest.mark.parametrize("state", ["sealed", "building"])
    def test_is_refused(self, field: str, changes: dict[str, Any], state: str, arrays: Path, tmp_path: Path) -> None:
        spec = toy_spec(tmp_path / "cache", arrays)
        if state == "sealed":
            serial(spec)
        else:
            build_some(spec, 2)
        before = tree(tmp_path / "cache")
        with pytest.raises(MismatchError) as caught:
            serial(toy_spec(tmp_path / "cache", arrays, **changes))
        assert caught.value.field == field
        assert caught.value.exit_code == 1
        assert tree(tmp_path / "cache") == before

    def test_another_source(self, arrays: Path, tmp_path: Path) -> None:
        serial(toy_spec(tmp_path / "cache", arrays))
        for change in ({"take": {"count": 9}}, {"labels": None}, {"class_names": None}):
            with pytest.raises(MismatchError) as caught:
                serial(toy_spec(tmp_path / "cache", arrays, source={**numpy_source(arrays), **change}))
            assert caught.value.field == "source"

    def test_where_it_runs_is_no_part_of_the_identity(self, arrays: Path, tmp_path: Path) -> None:
        """Workers and attempts may change between two runs, and the data set may move."""
        build_some(toy_spec(tmp_path / "cache", arrays), 2)
        moved = write_arrays(tmp_path / "moved")
        changes = {"compute__workers": 3, "compute__attempts": 1}
        assert serial(toy_spec(tmp_path / "cache", moved, **changes)).shards_built == 6


class TestTombstones:
    """A sample that cannot be decoded is shown, never skipped, replaced or zero-filled in silence."""

    def _folder(self, root: Path, broken: str) -> Path:
        for number in range(10):
            place = root / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.Generator(np.random.Philox(number)).integers(0, 256, (8, 8, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.jpg", quality=95)
        data = (root / broken).read_bytes()
        (root / broken).write_bytes(data[: len(data) // 2])
        return root

    @STORES
    def test_a_truncated_image(self, store: str, tmp_path: Path) -> None:
        folder = self._folder(tmp_path / "images", "class0/4.jpg")
        spec = toy_spec(
            tmp_path / "cache",
            tmp_path,
            source={"kind": "folder", "path": str(folder)},
            teacher__arguments={"classes": 2, "pixels": 192},
            store=stored(store),
        )
        report = serial(spec)
        ((key, reason),) = report.tombstones
        assert key == "class0/4.jpg"
        assert "cannot be decoded" in reason
        cache = tc.open(spec.cache)
        row = cache.samples.keys.index(key)
        others = [other for other in range(10) if other != row]
        assert np.flatnonzero(~cache.alive).tolist() == [row]
        for view in range(2):
            pixels = cache.render(view, others)
            flat = pixels.numpy().reshape(9, -1).astype(int)
            classes, places = np.meshgrid(np.arange(2), np.arange(192), indexing="ij")
            logits = flat @ ((classes * 7 + places * 3) % 11 - 5).T * 2.0**-10
            assert (cache.read("logits", view, others).dense().values.numpy() == logits).all()
            for ask in (cache.read, lambda _f, v, r: cache.render(v, r), lambda _f, v, r: cache.digests(v, r)):
                with pytest.raises(TombstoneError, match=r"class0/4\.jpg"):
                    ask("logits", view, [others[0], row])  # type: ignore[operator]
        assert tc.verify(spec.cache, recompute=10, views=10).ok

    def test_nothing_but_broken_samples(self, tmp_path: Path) -> None:
        (tmp_path / "images/a").mkdir(parents=True)
        (tmp_path / "images/a/1.png").write_bytes(b"no image")
        spec = toy_spec(tmp_path / "cache", tmp_path, source={"kind": "folder", "path": str(tmp_path / "images")})
        with pytest.raises(SourceError, match="no sample that can be decoded"):
            serial(spec)
        assert not (tmp_path / "cache").exists()


class TestFailures:
    """What cannot be done says whose fault it is and what to do; what is committed stays."""

    def _poisoned(self, tmp_path: Path, model: str, name: str = "cache", **changes: Any) -> BuildSpec:
        """Row 20 is poison: shards 0 and 1 of view 0 are committed before it is met."""
        fields = {"logits": {"encoding": "dense_f32"}}
        changes = {"views": {"recipe": [], "count": 1}, "teacher__fields": fields, **changes}
        folder = write_arrays(tmp_path / "arrays", poison=20)
        assert np.load(folder / "images.npy")[20].min() == POISON
        return toy_spec(tmp_path / name, folder, teacher__model=f"toy_models:{model}", **changes)

    def _two_shards_stay(self, spec: BuildSpec) -> None:
        cache = tc.open(spec.cache)
        assert sorted(committed(cache)) == [(0, 0), (0, 1)]
        cache.read("logits", 0, range(16))
        assert not list(Path(spec.cache).rglob("*.tmp"))

    def test_nan_names_the_sample(self, tmp_path: Path) -> None:
        spec = self._poisoned(tmp_path, "NaNs")
        with pytest.raises(NonFiniteError, match=r"images/20, view 0, logits.*nan"):
            serial(spec)
        self._two_shards_stay(spec)

    def test_overflow_names_the_sample(self, tmp_path: Path) -> None:
        """A logit beyond 65,504 does not become inf in float16; float32 keeps it."""
        scale = {"scale": 2.0**20}
        half = {"logits": {"encoding": "dense_f16"}}
        spec = self._poisoned(tmp_path, "PixelSums", teacher__arguments=scale, teacher__fields=half)
        with pytest.raises(NonFiniteError, match=r"images/\d+, view 0, logits.*dense_f16.*inf"):
            serial(spec)
        exact = self._poisoned(tmp_path, "PixelSums", "exact", teacher__arguments=scale)
        serial(exact)
        assert tc.open(exact.cache).read("logits", 0, [20]).dense().values.abs().max() > 65_504

    def test_a_teacher_that_raises_names_the_samples(self, tmp_path: Path) -> None:
        spec = self._poisoned(tmp_path, "Raises")
        with pytest.raises(BuildError, match=r"images/20 … images/23.*the poison was too much") as caught:
            serial(spec)
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert caught.value.exit_code == 1
        self._two_shards_stay(spec)

    def test_classes_must_fit_the_class_names(self, arrays: Path, tmp_path: Path) -> None:
        spec = toy_spec(tmp_path / "cache", arrays, teacher__arguments={"classes": 9})
        with pytest.raises(TeacherError, match=r"10 class names.*found: 9"):
            serial(spec)
        assert not (tmp_path / "cache").exists()

    def test_the_order_of_classes_must_fit(self, arrays: Path, tmp_path: Path) -> None:
        names = [f"class {number}" for number in (0, 1, 3, 2, 4, 5, 6, 7, 8, 9)]
        with pytest.raises(TeacherError, match=r"in order.*first at class 2"):
            serial(toy_spec(tmp_path / "cache", arrays, teacher__class_names=names))

    def test_logits_that_are_no_tensor_are_the_teachers_fault(self, arrays: Path, tmp_path: Path) -> None:
        with pytest.raises(TeacherError, match=r"teacher\.(model|fields\.logits).*tuple"):
            serial(toy_spec(tmp_path / "cache", arrays, teacher__model="toy_models:AnswersTuple"))

    def test_k_above_the_classes(self, arrays: Path, tmp_path: Path) -> None:
        fields = {"logits": {"encoding": {"kind": "top_k", "k": 11}}}
        with pytest.raises(SpecError, match=r"teacher\.fields\.logits\.encoding\.k.*at most 10"):
            serial(toy_spec(tmp_path / "cache", arrays, teacher__fields=fields))
        assert not (tmp_path / "cache").exists()

    def test_a_teacher_that_does_not_fit_the_views(self, arrays: Path, tmp_path: Path) -> None:
        with pytest.raises(TeacherError, match="fails on a view"):
            serial(toy_spec(tmp_path / "cache", arrays, teacher__arguments={"pixels": 65}))
        assert not (tmp_path / "cache").exists()

    def test_a_recipe_that_does_not_fit_the_images(self, arrays: Path, tmp_path: Path) -> None:
        """The very first sample shows it: the request was wrong, and nothing was written."""
        spec = toy_spec(tmp_path / "cache", arrays, views__recipe=[{"pad_crop": {"size": 30, "padding": 1}}])
        with pytest.raises(SpecError, match="fit into the padded image"):
            serial(spec)
        assert not (tmp_path / "cache").exists()

    def test_images_of_two_sizes(self, tmp_path: Path) -> None:
        """Found at the sample where it happens, with the operation that would help."""
        (tmp_path / "images/a").mkdir(parents=True)
        for number, size in enumerate([8] * 10 + [9]):
            Image.new("L", (size, size), number).save(tmp_path / f"images/a/{number:02}.png")
        spec = toy_spec(
            tmp_path / "cache",
            tmp_path,
            source={"kind": "folder", "path": str(tmp_path / "images")},
            views={"recipe": [], "count": 1},
            teacher__arguments={"classes": 1},
        )
        with pytest.raises(BuildError, match=r"a/08\.png … a/10\.png.*one shape"):
            serial(spec)
        Image.new("L", (9, 9), 1).save(tmp_path / "images/a/01.png")
        with pytest.raises(SpecError, match="one shape"):
            serial(spec.model_copy(update={"cache": str(tmp_path / "other")}))
        assert not (tmp_path / "other").exists(), "what the first samples show is refused before anything is written"

    def test_attention_maps_and_bfloat16(self, arrays: Path, tmp_path: Path) -> None:
        """A map [H, W] for each row, with its shape in the manifest; verified like any field."""
        fields = {"logits": {"encoding": "dense_bf16"}, "attention:stem": {"encoding": "dense_f32"}}
        for kind in ("zarr", "parquet"):
            spec = toy_spec(tmp_path / kind, arrays, teacher__fields=fields, store={"kind": kind})
            serial(spec)
            cache = tc.open(tmp_path / kind)
            assert cache.manifest.first.field_shapes["attention:stem"] == (8, 8)
            pixels = cache.render(1, [3, 9]).float()
            read = cache.read("attention:stem", 1, [3, 9])
            assert isinstance(read, tc.DenseTarget)
            assert torch.equal(read.values, pixels.square().mean(1))
            logits = cache.read("logits", 1, [3, 9])
            assert isinstance(logits, tc.DenseTarget)
            assert logits.values.dtype == torch.bfloat16
            assert tc.verify(tmp_path / kind, recompute=9).ok

    def test_an_error_beyond_its_bound(self, arrays: Path, tmp_path: Path) -> None:
        """The build fails and says by how much; with a wider bound the same command seals what is there."""
        fields = {"logits": {"encoding": {"kind": "top_k", "k": 1}}}
        spec = toy_spec(tmp_path / "cache", arrays, teacher__fields=fields, fidelity={"max_kl": 1e-4})
        with pytest.raises(
            BuildError, match=r"fidelity\.max_kl: logits: mean KL.*at most 0\.0001.*over 54 rows.*top_k"
        ):
            serial(spec)
        assert addition_of(tmp_path / "cache").state == "building"
        wider = toy_spec(tmp_path / "cache", arrays, teacher__fields=fields, fidelity={"max_kl": 5.0})
        assert serial(wider).shards_built == 0
        assert addition_of(tmp_path / "cache").state == "sealed"
        found = tc.open(tmp_path / "cache").totals.fidelity["logits"]
        worst = max(found[f"kl_t{temperature}"] for temperature in (1, 2, 4))
        for factor in (0.99, 1.01):
            near = toy_spec(tmp_path / str(factor), arrays, teacher__fields=fields, fidelity={"max_kl": worst * factor})
            with pytest.raises(BuildError, match="at most") if factor < 1 else nullcontext():
                serial(near)
        exact = toy_spec(tmp_path / "exact", arrays, fidelity={"max_kl": 1e-6})
        assert serial(exact).fidelity["logits"]["kl_t1"] < 1e-6
        with pytest.raises(SpecError, match="rows to measure on"):
            parse(FidelitySpec, {"rows_per_shard": 0, "max_kl": 1}, "test")

    def test_two_keys_of_one_digest(self, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two samples would share every view's address: found when planning, before anything is written."""
        digests = np.arange(ROWS, dtype=np.uint64)
        digests[20] = digests[3]
        monkeypatch.setattr("teacher_cache.plan.key_digests", lambda _keys: digests)
        with pytest.raises(SourceError, match="two keys one 64-bit digest"):
            serial(toy_spec(tmp_path / "cache", arrays))
        assert not (tmp_path / "cache").exists()

    def test_a_callable_that_nobody_can_seed(self, arrays: Path, tmp_path: Path) -> None:
        """Found by making the same views twice, before anything is written."""
        views = {"callable": "toy_models:from_numpys_generator", "count": 1}
        with pytest.raises(SpecError, match=r"same view twice.*images/"):
            serial(toy_spec(tmp_path / "cache", arrays, views=views))
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("dtype", ["uint16", "float32", "int64", "bool"])
    def test_arrays_that_are_no_bytes(self, dtype: str, arrays: Path, tmp_path: Path) -> None:
        """16-bit and float images are refused with what to do, not cut to 8 bits in silence."""
        shutil.copytree(arrays, tmp_path / "arrays")
        np.save(tmp_path / "arrays/images.npy", np.load(arrays / "images.npy").astype(dtype))
        with pytest.raises(SourceError, match=f"must be uint8.*{dtype}.*Scale them"):
            serial(toy_spec(tmp_path / "cache", tmp_path / "arrays"))

    def test_pictures_of_16_bits(self, tmp_path: Path) -> None:
        (tmp_path / "images/a").mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 999, np.uint16)).save(tmp_path / "images/a/0.png")
        source = {"kind": "folder", "path": str(tmp_path / "images")}
        with pytest.raises(SourceError, match=r"no sample that can be decoded.*more than 8 bits a channel"):
            serial(toy_spec(tmp_path / "cache", tmp_path, source=source))

    def test_images_of_many_channels(self, tmp_path: Path) -> None:
        """Seven channels of satellite data: built, verified and read like any other."""
        images = np.random.Generator(np.random.Philox(1)).integers(0, 256, (9, 8, 8, 7), np.uint8)
        np.save(tmp_path / "images.npy", images)
        source = {"kind": "numpy", "images": str(tmp_path / "images.npy")}
        spec = toy_spec(tmp_path / "cache", tmp_path, source=source, teacher__arguments={"pixels": 7 * 64})
        serial(spec)
        assert tc.open(tmp_path / "cache").manifest.view_shape == (7, 8, 8)
        assert tc.verify(tmp_path / "cache", views="all", recompute=9).ok

    def test_a_folder_that_cannot_be_written(self, arrays: Path, tmp_path: Path) -> None:
        """Works for root too: a file stands where the folder should be."""
        (tmp_path / "file").write_bytes(b"precious")
        for place in (tmp_path / "file", tmp_path / "file/below"):
            with pytest.raises(BuildError, match="cannot be written") as caught:
                serial(toy_spec(place, arrays))
            assert caught.value.exit_code == 1
        assert (tmp_path / "file").read_bytes() == b"precious"

    @pytest.mark.parametrize("name", ["notes.tmp", "samples-of-mine.parquet", "zarr.json", "thesis.tex"])
    def test_a_folder_of_someone_elses_is_left_alone(self, name: str, arrays: Path, tmp_path: Path) -> None:
        """`cache:` names a folder with other files by mistake: refused, and nothing in it is removed."""
        (tmp_path / "home/deeper").mkdir(parents=True)
        for place in (f"home/{name}", "home/deeper/draft.tmp"):
            (tmp_path / place).write_bytes(b"precious")
        before = tree(tmp_path / "home")
        with pytest.raises(SpecError, match="cache"):
            serial(toy_spec(tmp_path / "home", arrays))
        assert tree(tmp_path / "home") == before

    def test_a_full_disk(self, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """ENOSPC in the middle: the message says so, no torn file is visible, and the build goes on later."""
        spec = toy_spec(tmp_path / "cache", arrays)
        build_some(spec, 3)

        def full(_handle: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(BuildError, match="No space left on device"):
                serial(spec)
        assert len(committed(tc.open(spec.cache))) == 3
        serial(spec)
        serial(toy_spec(tmp_path / "whole", arrays))
        assert tree(tmp_path / "cache") == tree(tmp_path / "whole")

    def test_a_damaged_manifest_is_not_built_over(self, arrays: Path, tmp_path: Path) -> None:
        spec = toy_spec(tmp_path / "cache", arrays)
        serial(spec)
        path = tmp_path / "cache/manifest.json"
        path.write_bytes(path.read_bytes().replace(b"sealed", b"sealet"))
        before = tree(tmp_path / "cache")
        with pytest.raises(CorruptionError):
            serial(spec)
        assert tree(tmp_path / "cache") == before

    def test_an_unknown_executor(self, arrays: Path, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="ray or serial"):
            build(toy_spec(tmp_path / "cache", arrays), executor="dask")  # type: ignore[arg-type]


def test_the_api_key_is_never_stored(arrays: Path, tmp_path: Path) -> None:
    """A secret in the spec reaches no file of the cache."""
    serial(toy_spec(tmp_path / "cache", arrays, teacher__api_key="hunter2-secret"))
    for path in (tmp_path / "cache").rglob("*"):
        assert path.is_dir() or b"hunter2-secret" not in path.read_bytes()
    assert addition_of(tmp_path / "cache").state == "sealed"


def test_other_libraries_do_not_go_on_with_a_build(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half by one torch and half by another would be one cache with two kinds of bits; a sealed one is only read."""
    spec = toy_spec(tmp_path / "cache", arrays)
    build_some(spec, 3)
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "99.0")
        with pytest.raises(MismatchError, match=r"versions.*99\.0"):
            serial(spec)
    serial(spec)
    monkeypatch.setattr("torch.__version__", "99.0")
    assert serial(spec).shards_built == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__class_names": ["a", "b"]}, r"teacher\.class_names.*each of 10 outputs"),
        ({"teacher__arguments": {"classes": 5}}, r"teacher\.model.*labels 0\.\.7"),
    ],
)
def test_classes_are_checked_without_the_sources_names(
    changes: dict[str, Any], message: str, arrays: Path, tmp_path: Path
) -> None:
    """A source may have labels and no names: the teacher's head must still hold every label."""
    source = {key: value for key, value in numpy_source(arrays).items() if key != "class_names"}
    with pytest.raises(TeacherError, match=message):
        serial(toy_spec(tmp_path / "cache", arrays, source=source, **changes))
