"""`auto`: the smallest encoding that keeps a bound on the user's own rows, and the table that says why."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_builds import addition_of, toy_spec, tree
from typer.testing import CliRunner

import teacher_cache as tc
from teacher_cache.calibrate import _measured, calibrate, candidates
from teacher_cache.choice import sampled_answers
from teacher_cache.cli import app
from teacher_cache.encodings import open_encoding, row_bytes
from teacher_cache.encodings.calibration import Calibration
from teacher_cache.encodings.fidelity import measure_logits
from teacher_cache.errors import MismatchError, SpecError
from teacher_cache.plan import open_parts
from teacher_cache.spec import Auto, DenseF16, FieldSpec, Nucleus, TeacherSpec, TopK, parse


def auto(**wishes: Any) -> dict[str, Any]:
    return {"logits": {"encoding": {"max_kl": 1e-3, **wishes}}}


def spec_of(arrays: Path, path: Path, scale: float = 8.0, **wishes: Any) -> Any:
    return toy_spec(path, arrays, teacher__fields=auto(**wishes), teacher__arguments={"scale": scale})


def calibration(arrays: Path, tmp_path: Path, **wishes: Any) -> Calibration:
    opened = open_parts(spec_of(arrays, tmp_path / "cache", **wishes))
    wanted = opened.spec.teacher.fields["logits"].encoding
    assert isinstance(wanted, Auto)
    answers = sampled_answers(opened.teacher, opened.loader, opened.digests, opened.spec.teacher.micro_batch)
    return calibrate(wanted, torch.cat([answer["logits"] for answer in answers]))


class TestChoice:
    def test_the_smallest_that_keeps_the_bound_at_every_temperature(self, arrays: Path, tmp_path: Path) -> None:
        for bound in (1e-1, 1e-2, 1e-4, 1e-9):
            found = calibration(arrays, tmp_path, max_kl=bound, temperatures=[1, 4])
            (chosen,) = [item for item in found.table if item.encoding == found.chosen]
            assert chosen.worst <= bound
            smaller = [item for item in found.table if item.bytes < chosen.bytes]
            assert all(max(item.kl["1"], item.kl["4"]) > bound for item in smaller)
            assert [item.bytes for item in found.table] == sorted(item.bytes for item in found.table)

    def test_bytes_are_a_limit(self, arrays: Path, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match=r"at most 1e-09 nats in at most 12 bytes.*bytes a row lose") as caught:
            calibration(arrays, tmp_path, max_kl=1e-9, max_bytes=12)
        assert "max_kl 1e-09 takes 40 bytes a row (dense_f32)" in str(caught.value)
        assert caught.value.field == "teacher.fields.logits.encoding"

    def test_the_sample_does_not_depend_on_anything_but_the_keys(self, arrays: Path, tmp_path: Path) -> None:
        torch.manual_seed(1)
        first = calibration(arrays, tmp_path)
        torch.manual_seed(2)
        assert calibration(arrays, tmp_path) == first
        assert first.rows == 27

    @pytest.mark.parametrize("classes", [2, 10, 1000])
    def test_the_table_says_what_encodings_do(self, classes: int) -> None:
        """Bytes as they are stored, KL as the build's own measure of fidelity has it, shares within 0..1."""
        exact_BC = 3 * torch.randn(40, classes, generator=torch.Generator().manual_seed(classes))
        table = list(_measured(exact_BC, (1.0, 4.0)))
        assert [item.encoding for item in table] == list(candidates(classes))
        for item in table:
            encoding = open_encoding(item.encoding, (classes,), "logits")
            columns = encoding.encode(exact_BC)
            target = encoding.decode(columns)
            fidelity = measure_logits(exact_BC, target)
            if isinstance(item.encoding, Nucleus):
                # A level and a class number for each kept class; count, tail and log-sum-exp for each row.
                assert item.bytes == 4 + 2 + 2 + math.ceil((1 + 2) * float(columns["count"].mean()))
                assert item.bytes <= row_bytes(encoding)
            else:
                assert item.bytes == row_bytes(encoding)
            assert item.kl["1"] == pytest.approx(max(0, fidelity["kl_t1"] / 40), rel=1e-3, abs=1e-7)
            assert item.kl["4"] == pytest.approx(max(0, fidelity["kl_t4"] / 40), rel=1e-3, abs=1e-7)
            p_BC, decoded_BC = exact_BC.double().softmax(1), target.log_probs(1).double().exp()
            assert item.total_variation == pytest.approx(float(0.5 * (p_BC - decoded_BC).abs().sum(1).mean()), abs=1e-6)
            assert 0 <= item.total_variation <= 1
            assert 0 <= item.top1 <= 1
            off, whole = (decoded_BC - p_BC).norm(dim=1).mean(), (p_BC - 1 / classes).norm(dim=1).mean()
            assert item.gradient_error["1"] == pytest.approx(float(off / whole), abs=1e-6)

    def test_candidates_are_the_small_forms(self) -> None:
        """Top-k in levels and packed numbers, below C; a nucleus only where its cap leaves classes out."""
        for classes in (2, 10, 256, 257, 1000):
            specs = list(candidates(classes))
            top = [spec for spec in specs if isinstance(spec, TopK)]
            assert {(spec.values, spec.ids, spec.tail) for spec in top} == {("u8", "packed", "uniform")}
            assert max(spec.k for spec in top) < classes
            assert any(isinstance(spec, Nucleus) for spec in specs) == (classes > 256)
            for spec in specs:
                assert open_encoding(spec, (classes,)).parts

    def test_sure_rows_make_a_nucleus_small(self) -> None:
        """Its bytes are the mean over rows: where nearly all are sure of one class, it is what is picked."""
        exact_BC = 3 * torch.randn(64, 2000, generator=torch.Generator().manual_seed(5))
        exact_BC[torch.arange(60), torch.arange(60) * 7] += 40
        found = calibrate(Auto(max_kl=0.01, temperatures=(1.0,)), exact_BC)
        assert isinstance(found.chosen, Nucleus)
        (chosen,) = [item for item in found.table if item.encoding == found.chosen]
        columns = open_encoding(found.chosen, (2000,)).encode(exact_BC)
        assert (columns["count"][:60] == 1).all()
        assert chosen.bytes == 4 + 2 + 2 + math.ceil(3 * float(columns["count"].mean())) < 40
        with pytest.raises(SpecError, match=f"in at most {chosen.bytes - 1} bytes"):
            calibrate(Auto(max_kl=chosen.worst, temperatures=(1.0,), max_bytes=chosen.bytes - 1), exact_BC)

    def test_what_cannot_hold_the_logits_is_no_candidate(self) -> None:
        """Beyond half precision only dense_f32 is left."""
        exact_BC = torch.tensor([[90_000.0, 0.0, 1.0]])
        assert [item.encoding.kind for item in _measured(exact_BC, (1.0,))] == ["dense_f32"]


class TestBuild:
    def test_the_choice_is_built_recorded_and_not_made_twice(
        self, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = spec_of(arrays, tmp_path / "cache", max_kl=1e-3)
        tc.build(spec, executor="serial")
        manifest = addition_of(tmp_path / "cache")
        assert manifest.calibration is not None
        assert manifest.fields["logits"].encoding == manifest.calibration.chosen
        totals = tc.open(tmp_path / "cache").totals
        assert totals.fidelity["logits"]["kl_t4"] <= 2e-3
        assert tc.verify(tmp_path / "cache", recompute=20, views=20).ok
        tc.build(spec_of(arrays, tmp_path / "again", max_kl=1e-3), executor="serial")
        assert tree(tmp_path / "again") == tree(tmp_path / "cache")
        monkeypatch.setattr("teacher_cache.choice.calibrate", None)
        assert tc.build(spec, executor="serial").shards_built == 0

    def test_other_wishes_that_choose_otherwise_are_another_cache(self, arrays: Path, tmp_path: Path) -> None:
        tc.build(spec_of(arrays, tmp_path / "cache", max_kl=1e-3), executor="serial")
        with pytest.raises(MismatchError, match=r"teacher\.fields\.logits.*give this one a label"):
            tc.build(spec_of(arrays, tmp_path / "cache", max_kl=1e-10), executor="serial")

    def test_naming_the_choice_is_the_same_cache(self, arrays: Path, tmp_path: Path) -> None:
        """What decides bytes is what was chosen, not how."""
        tc.build(spec_of(arrays, tmp_path / "cache", max_kl=1e-3), executor="serial")
        chosen = addition_of(tmp_path / "cache").fields["logits"].encoding
        named = toy_spec(
            tmp_path / "cache",
            arrays,
            teacher__fields={"logits": {"encoding": chosen.model_dump()}},
            teacher__arguments={"scale": 8.0},
        )
        assert tc.build(named, executor="serial").shards_built == 0

    def test_the_commands_show_the_table(self, arrays: Path, tmp_path: Path) -> None:
        spec = spec_of(arrays, tmp_path / "cache", max_kl=1e-3)
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps(spec.model_dump(mode="json", exclude={"teacher": {"api_key"}})))
        planned = CliRunner().invoke(app, ["plan", str(config), "--json"])
        table = json.loads(planned.stdout)["calibration"]
        assert len(table["table"]) == len(list(candidates(10)))
        assert "top_k 5" in CliRunner().invoke(app, ["plan", str(config)]).stdout
        tc.build(spec, executor="serial")
        described = CliRunner().invoke(app, ["describe", str(tmp_path / "cache")]).stdout
        assert "→" in described
        assert "dense_u8" in described


def test_how_it_may_be_written() -> None:
    assert parse(FieldSpec, {"encoding": {"max_kl": 0.1}}, "test").encoding == Auto(max_kl=0.1)
    assert parse(FieldSpec, {}, "test").encoding == DenseF16(kind="dense_f16")
    for wrong, message in (
        ({"max_kl": 0}, "max_kl"),
        ({"max_kl": 1, "temperatures": []}, "temperatures"),
        ({"max_kl": 1, "temperatures": [0]}, "temperatures"),
        ({"max_kl": 1, "max_bytes": 0}, "max_bytes"),
    ):
        with pytest.raises(SpecError, match=message):
            parse(FieldSpec, {"encoding": wrong}, "test")
    with pytest.raises(SpecError, match="`auto` keeps logits only"):
        parse(TeacherSpec, {"model": "a:b", "fields": {"feature:x": {"encoding": {"max_kl": 1}}}}, "test")
