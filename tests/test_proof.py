"""The proof of a view: digests, reference views, stored parameters, named tolerances, and what `verify` says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_builds import ROWS, toy_spec
from typer.testing import CliRunner

import teacher_cache as tc
from student_train import CachedRows, ViewStream
from teacher_cache import manifest as manifests
from teacher_cache.cli import app
from teacher_cache.errors import ViewMismatch
from teacher_cache.manifest import write_manifest
from teacher_cache.proof import measure, reference_count
from teacher_cache.spec import ViewSpec
from teacher_cache.storage.local_root import LocalRoot
from teacher_cache.views import open_recipe
from teacher_cache.views.recipe import Recipe


def another_library(monkeypatch: pytest.MonkeyPatch, levels: int, every: int = 1) -> None:
    """Rendering moves every so-manieth value by some levels, as after a change of library."""
    render = Recipe.render

    def moved(self: Recipe, *arguments: Any) -> Any:
        views, mixed = render(self, *arguments)
        batch = torch.stack(list(views))
        batch.view(-1)[::every] += levels
        return batch, mixed

    monkeypatch.setattr(Recipe, "render", moved)


def other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torchvision had been upgraded since the build."""
    now = {**manifests.library_versions(), "torchvision": "9.9.9"}
    for module in ("teacher_cache.proof", "teacher_cache.verify_views"):
        monkeypatch.setattr(f"{module}.library_versions", lambda: now)


class TestReferences:
    """A few views are kept whole, so that a difference can be measured."""

    def test_they_are_the_views_of_the_build(self, built: Path) -> None:
        found = measure(tc.open(built))
        assert (found.views, found.pixels, found.differing, found.largest) == (8, 8 * 64, 0, 0)

    def test_the_difference_is_measured(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_library(monkeypatch, levels=2, every=4)
        found = measure(tc.open(built))
        assert (found.differing, found.largest) == (8 * 64 // 4, 2)
        assert str(found) == "on 8 reference views 128 of 512 values (25.00%) differ, by at most 2 of 255"

    def test_their_number_is_bounded_by_bytes(self) -> None:
        assert reference_count((3, 32, 32)) == 8
        assert reference_count((3, 512, 512)) == 2
        assert reference_count((3, 4000, 4000)) == 1

    def test_a_damaged_table_is_found(self, built: Path, tmp_path: Path) -> None:
        copied = Path(shutil.copytree(built, tmp_path / "cache"))
        (table,) = copied.glob("references-*.parquet")
        data = bytearray(table.read_bytes())
        data[len(data) // 2] ^= 1
        table.write_bytes(data)
        assert [problem.place for problem in tc.verify(copied).problems] == [table.name]
        table.unlink()
        assert [problem.place for problem in tc.verify(copied).problems] == [table.name]

    def test_a_cache_without_them_reads(self, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Caches of earlier releases have none: a mismatch is found, and said not to be measurable."""
        copied = Path(shutil.copytree(built, tmp_path / "cache"))
        manifest = tc.open(copied).manifest
        for table in copied.glob("references-*.parquet"):
            table.unlink()
        write_manifest(LocalRoot(copied), manifest.model_copy(update={"references": None}))
        assert tc.verify(copied, views=5).ok
        another_library(monkeypatch, levels=1)
        with pytest.raises(ViewMismatch, match="keeps no reference views"):
            tc.open(copied).render(0, [1])
        with pytest.raises(ViewMismatch, match="keeps no reference views"):
            tc.open(copied).render(0, [1], tolerance="rounding")

    def test_an_unfinished_cache_measures_what_is_there(self, arrays: Path, tmp_path: Path) -> None:
        def stop(done: int, _total: int, _built: int) -> None:
            if done >= 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tc.build(toy_spec(tmp_path / "cache", arrays, store={"shard_rows": 4, "chunk_rows": 4}), "serial", stop)
        assert measure(tc.open(tmp_path / "cache")).views == 4, "of view 0; those of view 1 are not there yet"
        (tmp_path / "cache/receipts/v0000/s000001.json").unlink()
        assert measure(tc.open(tmp_path / "cache")).views == 2


class TestTolerance:
    """A difference stops the run, unless a tolerance that covers it was asked for by name."""

    def test_one_level_passes_by_name_only(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_library(monkeypatch, levels=1, every=5)
        monkeypatch.setattr(Recipe, "rounds", True)
        cache = tc.open(built)
        with pytest.raises(ViewMismatch, match=r"by at most 1 of 255.*tolerance: rounding"):
            list(ViewStream(cache, batch_size=9))
        assert len(list(ViewStream(CachedRows(cache, tolerance="rounding"), batch_size=9))) == 3
        assert cache.render(0, [1], tolerance="rounding").shape == (1, 1, 8, 8)

    def test_two_levels_never_pass(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_library(monkeypatch, levels=2, every=64)
        with pytest.raises(ViewMismatch, match="by at most 2 of 255"):
            list(ViewStream(CachedRows(tc.open(built), tolerance="rounding"), batch_size=9))

    def test_a_wrong_view_is_no_rounding(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The reference views are as they were: whatever these pixels are, no library made them."""
        cache = tc.open(built)
        with pytest.raises(ViewMismatch, match="Nothing in this recipe rounds"):
            cache.check_views(0, [3], cache.render_views(0, [4]), "rounding")
        monkeypatch.setattr(Recipe, "rounds", True)
        with pytest.raises(ViewMismatch, match="that no reference view went through"):
            cache.check_views(0, [3], cache.render_views(0, [4]), "rounding")

    def test_a_recipe_that_cannot_round_has_no_tolerance(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Crops and flips copy bytes: not even one level is excused."""
        another_library(monkeypatch, levels=1)
        with pytest.raises(ViewMismatch, match=r"by at most 1 of 255.*Nothing in this recipe rounds"):
            list(ViewStream(CachedRows(tc.open(built), tolerance="rounding"), batch_size=9))

    @pytest.mark.parametrize(
        ("step", "rounds"),
        [
            ({"resize": {"size": 8}}, True),
            ({"resize": {"size": 8, "interpolation": "nearest"}}, False),
            ({"random_resized_crop": {"size": 8}}, True),
            ({"random_resized_crop": {"size": 8, "kernel": "integer"}}, False),
            ({"color_jitter": {}}, True),
            ({"rand_augment": {}}, True),
            ({"trivial_augment": {}}, True),
            ({"random_erasing": {}}, False),
            ({"mixup": {}}, False),
            ({"pad_crop": {"size": 8}}, False),
        ],
    )
    def test_which_operations_round(self, step: dict[str, Any], rounds: bool) -> None:
        assert open_recipe(ViewSpec(recipe=(step,))).rounds == rounds

    def test_a_mismatch_is_told_whatever_else_is_wrong(
        self, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The references are gone, or their rows cannot be read: the mismatch comes first."""
        copied = Path(shutil.copytree(built, tmp_path / "cache"))
        another_library(monkeypatch, levels=1)
        next(copied.glob("references-*.parquet")).unlink()
        with pytest.raises(ViewMismatch, match=r"images/20.*cannot be measured by: references-"):
            tc.open(copied).render(1, [20])

    def test_a_reference_row_that_became_a_tombstone_is_left_out(self, built: Path, tmp_path: Path) -> None:
        copied = Path(shutil.copytree(built, tmp_path / "cache"))
        cache = tc.open(copied)
        cache.samples.learn({2: "broken since"})
        assert measure(cache).views == 7

    def test_the_message_names_everything(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_library(monkeypatch, levels=3)
        other_versions(monkeypatch)
        with pytest.raises(ViewMismatch) as caught:
            tc.open(built).render(1, [5, 6])
        text = str(caught.value)
        recipe, torch_version = tc.open(built).manifest.first.identity.view, torch.__version__
        for part in ("images/5", "view 1", recipe, torch_version, "9.9.9", "2 of 2 rows", "at most 3 of 255"):
            assert part in text, part


class TestVerify:
    """`teacher-cache verify --views` says what changed, and whether it matters."""

    def test_a_source_that_is_gone_is_one_problem(self, built: Path, tmp_path: Path) -> None:
        elsewhere = toy_spec(tmp_path, tmp_path / "nowhere").source
        (problem,) = tc.verify(built, views="all", source=elsewhere).problems
        assert "source" in problem.place

    def test_all_views(self, built: Path) -> None:
        seen: list[tuple[int, int]] = []
        report = tc.verify(built, views="all", progress=lambda done, total: seen.append((done, total)))
        assert report.ok
        assert report.views_checked == 2 * ROWS
        assert report.notes == ()
        assert seen[-1] == (2 * ROWS, 2 * ROWS)

    def test_another_library_with_the_same_pixels(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        other_versions(monkeypatch)
        (note,) = tc.verify(built, views="all").notes
        assert "torchvision" in note
        assert "→ 9.9.9" in note
        assert f"pixel for pixel: {2 * ROWS} of {2 * ROWS}" in note

    def test_other_parameters_today(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stored parameters survive a change in how they are drawn."""
        monkeypatch.setattr("teacher_cache.views.operations.crops.below", lambda words, _bound: words[:, :2] * 0)
        report = tc.verify(built, views="all")
        assert report.ok
        (note,) = report.notes
        assert "drawn with other parameters today" in note

    def test_pixels_that_differ(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_library(monkeypatch, levels=1, every=64)
        report = tc.verify(built, views="all")
        assert [problem.place.split(",")[1] for problem in report.problems] == [" view 0", " view 1"]
        assert all("27 of 27 rows differ; on 8 reference views 8 of 512 values" in p.what for p in report.problems)
        assert report.notes == ()

    def test_the_command(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = CliRunner()
        answer = run.invoke(app, ["verify", str(built), "--views", "all", "--json"])
        assert answer.exit_code == 0
        assert json.loads(answer.stdout)["views_checked"] == 2 * ROWS
        other_versions(monkeypatch)
        assert "Libraries have changed" in run.invoke(app, ["verify", str(built), "--views", "20"]).stdout
        wrong = run.invoke(app, ["verify", str(built), "--views", "most"])
        assert "--views" in str(wrong.exception)

    def test_what_is_drawn_is_what_is_stored(self, built: Path) -> None:
        cache = tc.open(built)
        for view in range(2):
            np.testing.assert_array_equal(cache.draw(view, range(ROWS)), cache.params(view, range(ROWS)))

    def test_describing_a_cache_imports_nothing_of_the_users(
        self, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A callable's module may be elsewhere, or somebody else's."""
        views = {"callable": "toy_models:half_up", "count": 1}
        tc.build(toy_spec(tmp_path / "cache", arrays, views=views), executor="serial")
        monkeypatch.setitem(sys.modules, "toy_models", None)
        answer = CliRunner().invoke(app, ["describe", str(tmp_path / "cache")])
        assert answer.exit_code == 0
        assert "image by image" in answer.stdout
        assert "seeded-global" in answer.stdout
