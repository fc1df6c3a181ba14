"""The command lines: exit codes, messages that say what to do, JSON for machines, resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from toy_builds import ROWS, numpy_source, toy_spec, tree

import teacher_cache as tc
from student_train import cli as student_cli
from teacher_cache import cli as cache_cli
from teacher_cache import console

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process; gives exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        program, *rest = map(str, arguments)
        monkeypatch.setattr("sys.argv", [program, *rest])
        with pytest.raises(SystemExit) as done:
            (student_cli if program == "student-train" else cache_cli).main()
        found = capsys.readouterr()
        return int(done.value.code or 0), found.out, found.err

    return call


@pytest.fixture
def config(arrays: Path, tmp_path: Path) -> Path:
    """A build's YAML over the toy data."""
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(toy_spec(tmp_path / "cache", arrays).model_dump(mode="json")))
    return path


def test_plan_build_status_verify_describe_export(run: Run, config: Path, tmp_path: Path) -> None:
    code, out, _ = run("teacher-cache", "plan", config, "--json")
    assert code == 0
    planned = json.loads(out)
    assert planned["rows"] == ROWS * 2
    assert planned["field_bytes"] == {"logits": 40, "feature:stem": 2, "view": 8 + 3 * 4}
    assert planned["payback_epochs"] >= 2
    assert not (tmp_path / "cache").exists(), "a plan writes nothing"

    code, out, _ = run("teacher-cache", "build", config, "--executor", "serial", "--json")
    assert code == 0
    assert json.loads(out)["shards_built"] == 8
    code, out, _ = run("teacher-cache", "build", config, "--executor", "serial", "--json")
    assert json.loads(out)["shards_built"] == 0

    cache = tmp_path / "cache"
    assert run("teacher-cache", "status", cache)[0] == 0
    code, out, _ = run("teacher-cache", "verify", cache, "--views", "20", "--recompute", "8", "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    code, out, _ = run("teacher-cache", "describe", cache, "--json")
    assert json.loads(out)["additions"][0]["field_shapes"] == {"feature:stem": [1], "logits": [10]}
    for command in ("describe", "verify", "status"):
        assert "cache" in run("teacher-cache", command, cache)[1]

    code, out, _ = run("teacher-cache", "export", cache, "--output", tmp_path / "v1.npz", "--view", "1")
    exported = np.load(tmp_path / "v1.npz")
    expected = tc.open(cache).read("logits", view=1, rows=range(ROWS))
    np.testing.assert_array_equal(exported["values"], expected.values)
    assert exported["keys"][3] == "images/3"


@pytest.mark.parametrize(
    ("override", "field", "says"),
    [
        ("store.shard_rowz=8", "store.shard_rowz", "Did you mean `shard_rows`"),
        ("store.shard_rows=7", "store", "not a multiple of chunk_rows"),
        ("views.count=0", "views.count", "greater than 0"),
        ("source.kind=digitz", "source", "digits"),
        ("teacher.model=toy_models:Nowhere", "teacher.model", "cannot be imported"),
        ("teacher.fields=[logits, 'feature:no.such']", "teacher.fields.feature:no.such", "stem"),
        ("teacher.arguments={classes: 7}", "teacher.model", "10 class names"),
        ("views.recipe=[{pad_crop: {size: 8, pading: 1}}]", "views.recipe.0.pad_crop", "pading"),
        ("views.recipe=[{warp: {}}]", "views.recipe.0", "horizontal_flip"),
        ("source.images=nowhere.npy", "source.images", "nowhere.npy"),
        ("nonsense", "--set", "KEY=VALUE"),
    ],
)
def test_wrong_requests_end_with_2_and_write_nothing(
    run: Run, config: Path, tmp_path: Path, override: str, field: str, says: str
) -> None:
    code, _, err = run("teacher-cache", "build", config, "--executor", "serial", "--set", override)
    assert code == 2
    assert err.startswith(f"error: {field}") or f"error: {field}" in err
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "cache").exists()


def test_usage_errors_end_with_2(run: Run, tmp_path: Path) -> None:
    assert run("teacher-cache", "build")[0] == 2
    assert run("teacher-cache", "build", tmp_path / "none.yaml")[0] == 2
    assert run("teacher-cache", "describe", tmp_path)[0] == 2
    assert run("student-train", "fit", tmp_path / "none.yaml")[0] == 2


def test_a_cache_of_something_else_ends_with_1_and_stays(run: Run, config: Path, tmp_path: Path) -> None:
    run("teacher-cache", "build", config, "--executor", "serial")
    before = tree(tmp_path / "cache")
    for override, part in [
        ("teacher.arguments={scale: 2.0}", "teacher"),
        ("views.seed=12", "recipe"),
        ("store.shard_rows=16", "store"),
        ("teacher.micro_batch=8", "numerics"),
    ]:
        code, _, err = run("teacher-cache", "build", config, "--executor", "serial", "--set", override)
        assert (code, f"error: {part}: must have the cache's fingerprint" in err) == (1, True), (override, err)
    for override, message in [
        ("teacher.fields={logits: {encoding: dense_f16}}", "teacher.fields.logits: must be kept as the cache keeps it"),
        ("source.take={count: 20}", "source: must begin with the 27 samples of the cache"),
    ]:
        code, _, err = run("teacher-cache", "build", config, "--executor", "serial", "--set", override)
        assert (code, message in err) == (1, True), (override, err)
    assert tree(tmp_path / "cache") == before


def test_a_source_that_changed_since_the_cache_was_begun_is_refused(
    run: Run, config: Path, arrays: Path, tmp_path: Path
) -> None:
    run("teacher-cache", "build", config, "--executor", "serial")
    moved = shutil.copytree(arrays, tmp_path / "moved")
    labels = np.load(moved / "labels.npy")
    labels[0] = 9
    np.save(moved / "labels.npy", labels)
    source = json.dumps(numpy_source(moved))
    code, _, err = run("teacher-cache", "build", config, "--executor", "serial", "--set", f"source={source}")
    assert code == 1
    assert "changed since the cache was begun" in err


def test_damage_ends_with_1_and_says_where(run: Run, config: Path, tmp_path: Path) -> None:
    run("teacher-cache", "build", config, "--executor", "serial")
    shard = tmp_path / "cache/data/teachers/teacher/logits/v0001/values/c/2/0"
    shard.unlink()
    code, out, _ = run("teacher-cache", "verify", tmp_path / "cache", "--json")
    assert code == 1
    assert [problem["place"] for problem in json.loads(out)["problems"]] == [
        "data/teachers/teacher/logits/v0001/values/c/2/0"
    ]
    code, out, _ = run("teacher-cache", "verify", tmp_path / "cache")
    assert "NOT SOUND" in out
    assert "must be there" in out


def test_a_folder_with_other_files_is_left_alone(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("precious")
    code, _, err = run("teacher-cache", "build", config, "--executor", "serial")
    assert code == 2
    assert "thesis.tex" in err
    assert (tmp_path / "cache" / "thesis.tex").read_text() == "precious"


def test_an_unwritable_folder_is_named(run: Run, config: Path, tmp_path: Path) -> None:
    """A file stands where the folder should be: root may write anywhere else."""
    (tmp_path / "file").write_text("")
    override = f"cache={tmp_path / 'file' / 'cache'}"
    code, _, err = run("teacher-cache", "build", config, "--executor", "serial", "--set", override)
    assert code == 1
    assert "cannot be written" in err
    assert "a file stands where a folder should be" in err
    assert "Name another folder" in err


def student_config(tmp_path: Path, cache: Path, arrays: Path, **changes: Any) -> Path:
    described: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "data": {"cache": str(cache)},
        "student": {"model": "small_cnn", "arguments": {"width": 4}},
        "train": {"epochs": 2, "batch_size": 8, "device": "cpu"},
        "evaluate": {"source": numpy_source(arrays), "views": {"recipe": []}},
        **changes,
    }
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump(described))
    return path


def test_fit_and_evaluate(run: Run, built: Path, arrays: Path, tmp_path: Path) -> None:
    config = student_config(tmp_path, built, arrays, objective=[{"kind": "kd"}])
    code, out, _ = run("student-train", "fit", config, "--json")
    assert code == 0
    fitted = json.loads(out)
    weights = tmp_path / "run" / "model.safetensors"
    code, out, _ = run("student-train", "evaluate", config, "--weights", weights, "--json")
    assert json.loads(out)["accuracy"] == fitted["accuracy"]
    assert "accuracy" in run("student-train", "fit", config)[1]


def test_compare_says_what_is_not_significant(run: Run, built: Path, arrays: Path, tmp_path: Path) -> None:
    same = [{"kind": "cross_entropy"}]
    config = student_config(tmp_path, built, arrays, arms={"a": same, "b": same}, seeds=[0, 1])
    code, out, _ = run("student-train", "compare", config)
    assert code == 0
    assert "b − a: +0.00%" in out
    assert "the same in every pair" in out
    other = student_config(tmp_path, built, arrays, arms={"a": same, "c": [{"kind": "kd"}]}, seeds=[0, 1, 2])
    out = run("student-train", "compare", other)[1]
    assert "c − a" in out
    assert "significant" in out or "the same in every pair" in out


def test_a_term_whose_field_is_not_cached_lists_those_that_are(
    run: Run, built: Path, arrays: Path, tmp_path: Path
) -> None:
    config = student_config(tmp_path, built, arrays, objective=[{"kind": "kd", "field": "feature:nope"}])
    code, _, err = run("student-train", "fit", config)
    assert code == 1
    assert "feature:stem, logits" in err


def test_tables_show_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup, and what is too long for a column goes on in the next line."""
    console.print_facts("facts [1]", {"shape": "[B, C]", "folder": "/data/[/red]"})
    console.print_rows("rows", ("a", "b"), [("[bold]", "x" * 300)])
    out = capsys.readouterr().out
    for text in ("facts [1]", "[B, C]", "/data/[/red]", "[bold]"):
        assert text in out
    assert out.count("x") == 300
    assert "…" not in out
