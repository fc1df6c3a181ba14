"""Caches of every encoding: built, resumed, verified, read, trained from, described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_builds import addition_of, toy_spec, tree
from typer.testing import CliRunner

import teacher_cache as tc
from student_train import KD, Objective, ViewStream
from teacher_cache.cli import app
from teacher_cache.encodings import DenseTarget, SparseTarget
from teacher_cache.errors import CorruptionError, SpecError, TeacherError
from teacher_cache.report import write_report
from teacher_cache.spec import TeacherSpec, parse

LOGITS: dict[str, dict[str, Any]] = {
    "dense_f32": {"kind": "dense_f32"},
    "dense_bf16": {"kind": "dense_bf16"},
    "dense_u8": {"kind": "dense_u8"},
    "dense_u8 by row": {"kind": "dense_u8", "mode": "row"},
    "dense_u4": {"kind": "dense_u4"},
    "top_k packed": {"kind": "top_k", "k": 3, "values": "u8", "ids": "packed"},
    "top_k ghost": {"kind": "top_k", "k": 3, "tail": "ghost"},
    "top_k renormalise": {"kind": "top_k", "k": 3, "tail": "renormalise"},
    "top_k prior": {"kind": "top_k", "k": 3, "tail": "prior"},
    "nucleus": {"kind": "nucleus", "mass": 0.9, "cap": 6},
    "nucleus u8": {"kind": "nucleus", "mass": 0.5, "cap": 10, "values": "u8"},
    "sampled_k": {"kind": "sampled_k", "k": 3, "temperature": 2.0},
    "feature_head": {"kind": "feature_head"},
}
MODELS = {"vectors": "toy_models:PixelSums", "sequences": "toy_models:Positions"}
RANDOM = {"recipe": [{"pad_crop": {"size": 8, "padding": 2}}], "count": 2, "seed": 3}


def spec_of(cache: Path, arrays: Path, encoding: dict[str, Any], shape: str = "vectors", **changes: Any) -> Any:
    fields = {"logits": {"encoding": encoding}}
    return toy_spec(cache, arrays, teacher__model=MODELS[shape], teacher__fields=fields, views=RANDOM, **changes)


@pytest.mark.parametrize("store", ["zarr", "parquet"])
@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("name", LOGITS)
def test_a_cache_of_every_encoding(name: str, shape: str, store: str, arrays: Path, tmp_path: Path) -> None:
    """The same bytes twice, sound and reproducible; the loss of what is read is finite and has the right slope."""
    spec = spec_of(tmp_path / "cache", arrays, LOGITS[name], shape, store__kind=store)
    report = tc.build(spec, executor="serial")
    tc.build(spec_of(tmp_path / "again", arrays, LOGITS[name], shape, store__kind=store), executor="serial")
    assert tree(tmp_path / "cache") == tree(tmp_path / "again")
    assert tc.build(spec, executor="serial").shards_built == 0
    verified = tc.verify(tmp_path / "cache", recompute=20, views=20)
    assert verified.ok, verified.problems
    assert report.fidelity["logits"]["rows"] > 0
    assert ("kl_t1" in report.fidelity["logits"]) == (name not in ("sampled_k", "top_k renormalise"))
    temperature = 2.0
    batch = next(iter(ViewStream(tc.open(tmp_path / "cache"), batch_size=9)))
    target = batch.targets["logits"]
    probs = target.log_probs(temperature).exp()
    student = torch.zeros(probs.shape, requires_grad=True)
    loss, _ = Objective([KD(temperature=temperature)])(student, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    wanted = temperature * (0.1 - probs) / probs[..., 0].numel()
    if name == "top_k ghost":
        kept = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, target.indices_BK.long(), True)  # type: ignore[union-attr]
        assert torch.allclose(student.grad[kept], wanted[kept], atol=1e-6)
    else:
        assert torch.allclose(student.grad, wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["dense_u8", "nucleus", "sampled_k", "top_k prior"])
@pytest.mark.parametrize("shape", MODELS)
def test_it_is_shown(name: str, shape: str, arrays: Path, tmp_path: Path) -> None:
    """`plan`, `describe` and the report work for logits of vectors and of sequences."""
    spec = spec_of(tmp_path / "cache", arrays, LOGITS[name], shape)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(spec.model_dump(mode="json", exclude={"teacher": {"api_key"}})))
    assert json.loads(CliRunner().invoke(app, ["plan", str(config), "--json"]).stdout)["field_bytes"]["logits"] > 0
    tc.build(spec, executor="serial")
    assert LOGITS[name]["kind"] in CliRunner().invoke(app, ["describe", str(tmp_path / "cache")]).stdout
    write_report(tmp_path / "cache", tmp_path / "report.html")
    assert LOGITS[name]["kind"] in (tmp_path / "report.html").read_text()


class TestConstants:
    """What the rows of a field share lies in one table beside the manifest."""

    def test_they_are_under_a_digest(self, arrays: Path, tmp_path: Path) -> None:
        tc.build(spec_of(tmp_path / "cache", arrays, LOGITS["top_k prior"]), executor="serial")
        (path,) = (tmp_path / "cache").glob("constants-*.parquet")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(CorruptionError, match="constants"):
            tc.open(tmp_path / "cache").read("logits", 0, [1])
        path.unlink()
        assert any("constants" in problem.place for problem in tc.verify(tmp_path / "cache").problems)

    def test_they_are_measured_once(self, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A build that goes on reads them: looking again could cost a paid teacher's answers."""
        spec = spec_of(tmp_path / "cache", arrays, LOGITS["feature_head"])
        tc.build(spec, executor="serial")
        monkeypatch.setattr("teacher_cache.plan.choose", None)
        assert tc.build(spec, executor="serial").shards_built == 0

    def test_they_are_part_of_the_identity(self, arrays: Path, tmp_path: Path) -> None:
        """Another seed of the views calibrates on other pixels: other constants, another encoding."""
        for name, seed in (("a", 1), ("b", 2)):
            spec = spec_of(tmp_path / name, arrays, LOGITS["top_k prior"])
            views = spec.views.model_copy(update={"seed": seed})
            tc.build(spec.model_copy(update={"views": views}), executor="serial")
        first, second = (addition_of(tmp_path / name).identity.encoding for name in ("a", "b"))
        assert first != second


class TestHead:
    """`feature_head`: the last linear layer, once, and what it reads."""

    def test_logits_are_rebuilt(self, arrays: Path, tmp_path: Path) -> None:
        """Within half a step of each channel times the head's weights, and the head's name and width are recorded."""
        tc.build(spec_of(tmp_path / "cache", arrays, LOGITS["feature_head"]), executor="serial")
        tc.build(spec_of(tmp_path / "exact", arrays, LOGITS["dense_f32"]), executor="serial")
        cache, exact = tc.open(tmp_path / "cache"), tc.open(tmp_path / "exact")
        encoding = cache.manifest.first.fields["logits"].fixed
        assert encoding.model_dump() == {"kind": "feature_head", "head": "head", "width": 64}
        rows = range(len(cache))
        target, wanted = cache.read("logits", 1, rows), exact.read("logits", 1, rows)
        assert isinstance(target, DenseTarget)
        assert target.values.dtype == torch.uint8
        common = target.scale.shared.tensors  # type: ignore[union-attr]
        bound_C = (common["weight"].abs() * common["step"] / 2).sum(1)
        error_BC = (target.dense().values - wanted.dense().values).abs()
        clipped_B = ((target.values == 255) | ((target.values == 0) & (common["low"] != 0))).any(1)
        assert bool((error_BC <= bound_C + 1e-4)[~clipped_B].all())
        assert not bool(clipped_B.all())

    def test_what_is_not_linear_is_refused(self, arrays: Path, tmp_path: Path) -> None:
        """Logits that are scaled after the head are not W h + b."""
        spec = spec_of(tmp_path / "cache", arrays, LOGITS["feature_head"], teacher__arguments={"scale": 3.0})
        with pytest.raises(TeacherError, match="must be W h \\+ b of 'head'"):
            tc.build(spec, executor="serial")

    def test_a_head_must_be_there(self, arrays: Path, tmp_path: Path) -> None:
        for head in ("nowhere", "stem"):
            spec = spec_of(tmp_path / "cache", arrays, {"kind": "feature_head", "head": head})
            with pytest.raises(TeacherError, match=r"must name an nn\.Linear"):
                tc.build(spec, executor="serial")
        spec = spec_of(tmp_path / "cache", arrays, {"kind": "feature_head", "width": 3})
        with pytest.raises(TeacherError, match="must be 64"):
            tc.build(spec, executor="serial")


class TestFeatures:
    """`u8_channel`: a range for each channel, from calibration."""

    @pytest.mark.parametrize("pool", ["none", "mean"])
    @pytest.mark.parametrize("store", ["zarr", "parquet"])
    def test_features_and_maps(self, pool: str, store: str, arrays: Path, tmp_path: Path) -> None:
        """One byte a number, shapes in the manifest, and a relative squared error that is measured."""
        fields = {
            "logits": {"encoding": "dense_f16"},
            "feature:conv": {"pool": pool, "encoding": "u8_channel"},
            "attention:conv": {"encoding": "u8_channel"},
        }
        spec = toy_spec(
            tmp_path / "cache",
            arrays,
            teacher__model="toy_models:SmallNet",
            teacher__fields=fields,
            views=RANDOM,
            store__kind=store,
        )
        report = tc.build(spec, executor="serial")
        assert report.fidelity["feature:conv"]["relative_squared_error"] < 1e-3
        assert report.fidelity["attention:conv"]["relative_squared_error"] < 1e-3
        cache = tc.open(tmp_path / "cache")
        shape = (4,) if pool == "mean" else (4, 8, 8)
        assert cache.manifest.first.field_shapes["feature:conv"] == shape
        assert cache.columns("feature:conv", 0, [0])["values"].shape == (1, *shape)
        assert cache.read("attention:conv", 0, [3, 1]).dense().values.shape == (2, 8, 8)  # type: ignore[union-attr]
        assert tc.verify(tmp_path / "cache", recompute=10).ok

    def test_it_is_for_features(self) -> None:
        with pytest.raises(SpecError, match="keeps features only"):
            parse(TeacherSpec, {"model": "a:b", "fields": {"logits": {"encoding": "u8_channel"}}}, "test")


def test_many_classes_are_not_kept_whole_by_default(arrays: Path, tmp_path: Path) -> None:
    """Up to 64 classes dense_f16; beyond, the smallest encoding within 1e-3 nats on the user's rows."""
    for classes, dense in ((64, True), (65, False)):
        spec = toy_spec(
            tmp_path / str(classes),
            arrays,
            source={"kind": "numpy", "images": str(arrays / "images.npy"), "labels": str(arrays / "labels.npy")},
            teacher__fields=["logits"],
            teacher__arguments={"classes": classes},
        )
        tc.build(spec, executor="serial")
        manifest = addition_of(tmp_path / str(classes))
        assert (manifest.calibration is None) == dense
        assert (manifest.fields["logits"].fixed.kind == "dense_f16") == dense
        if not dense:
            assert manifest.totals is not None
            assert manifest.totals.fidelity["logits"]["kl_t1"] < 2e-3
            assert tc.build(spec, executor="serial").shards_built == 0


def test_a_nucleus_takes_what_its_rows_need(arrays: Path, tmp_path: Path) -> None:
    """Rows keep the smallest set with the mass; the files are smaller than with room for `cap` classes."""
    encoding = {"kind": "nucleus", "mass": 0.6, "cap": 10}
    tc.build(spec_of(tmp_path / "cache", arrays, encoding, teacher__arguments={"scale": 8.0}), executor="serial")
    cache = tc.open(tmp_path / "cache")
    target = cache.read("logits", 0, range(len(cache)))
    assert isinstance(target, SparseTarget)
    assert target.count_B is not None
    assert 1 <= int(target.count_B.min()) < int(target.count_B.max()) <= 10
    exact = target.log_probs().exp()
    for row, count in enumerate(target.count_B.tolist()):
        down = exact[row].sort(descending=True).values
        assert float(down[:count].sum()) >= 0.6 - 1e-3
        assert count == 1 or float(down[: count - 1].sum()) < 0.6 + 1e-3


def test_more_than_a_shard_can_count_is_refused_when_planning(arrays: Path, tmp_path: Path) -> None:
    """Offsets are uint32: a shard whose rows could hold more elements is refused before anything is written."""
    encoding = {"kind": "nucleus", "mass": 0.9, "cap": 10}
    spec = spec_of(tmp_path / "cache", arrays, encoding, store={"kind": "zarr", "shard_rows": 2**29, "chunk_rows": 4})
    with pytest.raises(SpecError, match="must be less than"):
        tc.build(spec, executor="serial")
    assert not (tmp_path / "cache").exists()
