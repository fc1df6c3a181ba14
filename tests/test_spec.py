"""Configurations: closed, frozen, and refused with the field, the rule, the value and what to do."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_builds import toy_spec

from teacher_cache import errors
from teacher_cache.errors import SpecError, TeacherCacheError
from teacher_cache.imports import import_attribute
from teacher_cache.spec import BuildSpec, DenseF16, TopK, load_spec, parse, read_yaml

YAML = """
cache: runs/x
source: {kind: digits, split: train}
views:
  recipe: [{pad_crop: {size: 8}}, horizontal_flip]
  count: 3
teacher:
  model: "toy_models:PixelSums"
  fields: {logits: {encoding: {kind: top_k, k: 3}}, "feature:stem": {pool: mean}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "build.yaml"
    path.write_text(YAML)
    return path


def test_a_file_is_a_spec_with_every_default(config: Path) -> None:
    spec = load_spec(config)
    assert spec.views.recipe == ({"pad_crop": {"size": 8}}, {"horizontal_flip": {}})
    assert spec.teacher.fields["logits"].encoding == TopK(kind="top_k", k=3)
    assert spec.teacher.fields["feature:stem"].encoding == DenseF16(kind="dense_f16")
    assert (spec.store.kind, spec.store.shard_rows, spec.compute.device, spec.compute.attempts) == (
        "zarr",
        1024,
        "auto",
        3,
    )


def test_json_gives_the_same_spec(arrays: Path, tmp_path: Path) -> None:
    """A spec travels into the manifest and to workers as JSON, and as a pickle."""
    spec = toy_spec(tmp_path, arrays)
    assert BuildSpec.model_validate_json(spec.model_dump_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_overrides(config: Path) -> None:
    spec = load_spec(config, ["store.kind=parquet", "views.seed=7", "teacher.fields=[logits]", "cache=a=b"])
    assert (spec.store.kind, spec.views.seed, list(spec.teacher.fields), spec.cache) == (
        "parquet",
        7,
        ["logits"],
        "a=b",
    )


@pytest.mark.parametrize(
    ("override", "field", "message"),
    [
        ("teacher.micro_bach=3", "teacher.micro_bach", "Did you mean `micro_batch`"),
        ("colour=red", "colour", "not a known key"),
        ("store.shard_rows=100", "store", "not a multiple of chunk_rows"),
        ("store.shard_rows=0", "store.shard_rows", "greater than 0"),
        ("store.kind=lance", "store.kind", "found: lance"),
        ("views.count=0", "views.count", "greater than 0"),
        ("views.seed=18446744073709551616", "views.seed", "less than"),
        ("teacher.name=../up", "teacher.name", "pattern"),
        ("teacher.fields={logit: null}", "teacher.fields", "none of `logits`"),
        ("teacher.fields={}", "teacher.fields", "at least 1"),
        ("teacher.fields={'feature:a': {encoding: {kind: top_k, k: 2}}}", "teacher.fields", "keeps logits only"),
        ("teacher.normalize={mean: [1], std: [1, 2]}", "teacher.normalize", "one value for each channel"),
        ("teacher.normalize={mean: [1], std: [0]}", "teacher.normalize", "above 0"),
        ("compute.device=tpu", "compute.device", "pattern"),
        ("source.kind=tar", "source", "tar"),
        ("source.take.count=0", "source.digits.take.count", "greater than 0"),
        ("views.recipe.x=1", "--set", "not a mapping"),
        ("store.kind", "--set", "KEY=VALUE"),
        ("store=[1", "--set", "YAML"),
    ],
)
def test_what_is_wrong_is_named(config: Path, override: str, field: str, message: str) -> None:
    """Exit 2, the field in the user's own words, the rule, the value, and a hint."""
    with pytest.raises(SpecError) as caught:
        load_spec(config, [override])
    assert caught.value.field == field
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize("data", [b"", b"- a\n- b\n", b"a: [1", b"\xff\xfe\x00", b"3"])
def test_files_that_are_no_mapping(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(data)
    with pytest.raises(SpecError, match=r"x\.yaml"):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(SpecError, match="readable"):
        read_yaml(tmp_path / "missing.yaml")


def test_yaml_is_never_executed(tmp_path: Path) -> None:
    """No tag builds a Python object."""
    (tmp_path / "x.yaml").write_text("cache: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(SpecError, match="readable YAML"):
        read_yaml(tmp_path / "x.yaml")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(section=st.sampled_from(sorted(BuildSpec.model_fields)), value=PLAIN)
def test_any_value_anywhere_is_a_spec_or_a_spec_error(section: str, value: Any) -> None:
    """No value of a YAML file raises anything but `SpecError`."""
    data = {
        "cache": "x",
        "source": {"kind": "digits"},
        "views": {"recipe": []},
        "teacher": {"model": "a:b"},
        section: value,
    }
    with contextlib.suppress(SpecError):
        parse(BuildSpec, data, "a test")


def test_specs_are_frozen(arrays: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        toy_spec(tmp_path, arrays).cache = "y"


class TestErrors:
    """One tree; each error names field, rule, value and hint, and survives pickling."""

    KINDS: ClassVar[list[type[TeacherCacheError]]] = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TeacherCacheError)
    ]

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_each_one(self, kind: type[TeacherCacheError]) -> None:
        error = kind("the field", "must hold", 3, "Do this.")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == "the field: must hold (found: 3). Do this."
        assert (again.field, again.rule, again.value, again.hint) == ("the field", "must hold", "3", "Do this.")
        assert kind.exit_code in (1, 2)
        assert kind.__doc__

    def test_exit_codes_follow_the_tree(self) -> None:
        """2 where the request was wrong, 1 where the work failed or the cache is not sound."""
        for kind in self.KINDS:
            asked = issubclass(kind, errors.RequestError) or kind is errors.CacheNotFoundError
            assert kind.exit_code == (2 if asked else 1), kind

    def test_the_picture_in_the_docstring_is_the_tree(self) -> None:
        drawn = errors.__doc__ or ""
        for kind in self.KINDS:
            assert kind.__name__ in drawn


@pytest.mark.parametrize("reference", ["os", "os:", ":path", "os:no_such", "no_such_module:x", "os:path.no"])
def test_references_that_cannot_be_imported(reference: str) -> None:
    with pytest.raises(SpecError) as caught:
        import_attribute(reference, "the.field")
    assert caught.value.field == "the.field"


def test_references() -> None:
    assert import_attribute("os:path.join", "x") is __import__("os").path.join
