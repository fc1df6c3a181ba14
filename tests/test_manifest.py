"""The manifest and its receipts: canonical, checked, bound to their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from toy_builds import toy_spec

import teacher_cache as tc
from teacher_cache.addition import Identity
from teacher_cache.errors import CacheError, CacheNotFoundError, CorruptionError, FormatError
from teacher_cache.fingerprint import bytes_digest, canonical_json, fingerprint
from teacher_cache.manifest import MANIFEST, read_manifest, write_manifest
from teacher_cache.receipts import Receipt, read_receipt, receipt_names, receipt_path
from teacher_cache.storage import FileRecord
from teacher_cache.storage.local_root import LocalRoot


class Stop(Exception):  # noqa: N818 - no error: a way out
    """Ends a build between two shards."""


@pytest.fixture(scope="module")
def half_built(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four committed shards, not sealed."""
    path = tmp_path_factory.mktemp("half") / "cache"

    def progress(done: int, _total: int, _built: int) -> None:
        if done >= 27:
            raise Stop

    with pytest.raises(Stop):
        tc.build(toy_spec(path, arrays), "serial", progress)
    return path


def resigned(body: dict[str, Any]) -> bytes:
    """What a writer of another version would write: its digest is right."""
    return canonical_json({**body, "digest": bytes_digest(canonical_json(body))}) + b"\n"


def test_it_is_canonical_and_reads_back(built: Path, tmp_path: Path) -> None:
    """Sorted keys, no spaces, the digest of the rest; writing what was read gives the same bytes."""
    data = (built / MANIFEST).read_bytes()
    body = json.loads(data)
    digest = body.pop("digest")
    assert digest == bytes_digest(canonical_json(body))
    assert data == resigned(body)
    write_manifest(LocalRoot(tmp_path), read_manifest(LocalRoot(built)))
    assert (tmp_path / MANIFEST).read_bytes() == data


def test_it_holds_no_time_and_no_place(built: Path) -> None:
    """A cache may be moved, and two builds of one spec are equal."""
    body = json.loads((built / MANIFEST).read_bytes())
    assert str(built) not in json.dumps(body)
    (addition,) = body["additions"]
    assert "cache" not in addition["spec"]
    assert set(addition["spec"]["compute"]) == {"device", "threads"}


@given(data=st.data())
def test_any_changed_byte_is_found(built: Path, data: st.DataObject) -> None:
    """Every byte counts: no other bytes that parse to the same values pass, and nothing but our errors rises."""
    original = (built / MANIFEST).read_bytes()
    changed = bytearray(original)
    place = data.draw(st.integers(0, len(original) - 1))
    changed[place] ^= data.draw(st.integers(1, 255))
    (built.parent / "flip").mkdir(exist_ok=True)
    (built.parent / "flip" / MANIFEST).write_bytes(changed)
    with pytest.raises(CorruptionError):
        read_manifest(LocalRoot(built.parent / "flip"))


@pytest.mark.parametrize("how", ["newline", "spaces", "order", "escapes", "twice"])
def test_other_bytes_for_the_same_values_are_refused(how: str, built: Path, tmp_path: Path) -> None:
    """What parses alike and states its digest rightly is still not what was written."""
    original = (built / MANIFEST).read_bytes()
    body = json.loads(original)
    data = {
        "newline": original[:-1] + b" ",
        "spaces": json.dumps(body, sort_keys=True).encode() + b"\n",
        "order": canonical_json(dict(reversed(body.items()))).replace(b"{", b"{ ", 1),
        "escapes": original.replace(b'"rows"', b'"\\u0072ows"'),
        "twice": original.replace(b"{", b'{"format_version":1,', 1),
    }[how]
    assert json.loads(data) == body
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(CorruptionError):
        read_manifest(LocalRoot(tmp_path))


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"3", b"null", b'"text"', b"{}", b'{"digest": 3}', b'{"a": 1e999, "digest": ""}',
     b'{"a": "\\ud800", "digest": ""}', b'{"digest": {}}', b"\xff\xfe", b"{" * 2000],
)  # fmt: skip
def test_bytes_that_are_no_manifest(data: bytes, tmp_path: Path) -> None:
    """Whatever stands in the file, the answer is `CorruptionError`."""
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(CorruptionError):
        read_manifest(LocalRoot(tmp_path))
    with pytest.raises(CorruptionError):
        Receipt.from_bytes(data, "receipts/x.json")


@given(cut=st.integers(0, 10_000))
def test_truncation_is_found(built: Path, cut: int) -> None:
    original = (built / MANIFEST).read_bytes()
    (built.parent / "cut").mkdir(exist_ok=True)
    (built.parent / "cut" / MANIFEST).write_bytes(original[: cut % len(original)])
    with pytest.raises(CorruptionError):
        read_manifest(LocalRoot(built.parent / "cut"))


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_is_refused(version: object, built: Path, tmp_path: Path) -> None:
    """A sound manifest of another version is `FormatError`, not corruption, and says what to do."""
    body = json.loads((built / MANIFEST).read_bytes())
    del body["digest"]
    (tmp_path / MANIFEST).write_bytes(resigned({**body, "format_version": version}))
    with pytest.raises(FormatError, match="format 2"):
        read_manifest(LocalRoot(tmp_path))


def test_no_cache_is_no_cache(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CacheNotFoundError) as caught:
            read_manifest(LocalRoot(place))
        assert caught.value.exit_code == 2


@given(
    seed=SEEDS,
    view=st.integers(0, 9999),
    shard=st.integers(0, 999_999),
    reason=st.text(st.characters(codec="utf-8"), max_size=20),
    place=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
)
def test_a_receipt_reads_back_and_any_flip_is_found(
    seed: int, view: int, shard: int, reason: str, place: float, flip: int
) -> None:
    content = np.random.Generator(np.random.Philox(seed)).integers(0, 2**64, 5, np.uint64)
    receipt = Receipt(
        identity="i" * 32,
        view=view,
        shard=shard,
        files=(FileRecord("data/a", 12, "ab"),),
        tombstones=((3, reason),),
        content=content,
        labelled=5,
        correct=2,
        fidelity={"logits": {"rows": 2.0, "kl_t1": 1.5e-7}},
    )
    data = receipt.to_bytes()
    again = Receipt.from_bytes(data, "here")
    assert again.to_bytes() == data
    assert (again.content == content).all()
    assert (again.files, again.tombstones, again.fidelity) == (receipt.files, receipt.tombstones, receipt.fidelity)
    changed = bytearray(data)
    changed[int(place * len(data))] ^= flip
    with pytest.raises(CorruptionError, match="here"):
        Receipt.from_bytes(bytes(changed), "here")


class TestReceipts:
    """While a build runs they are the authority."""

    def test_they_say_what_is_there(self, half_built: Path) -> None:
        addition = read_manifest(LocalRoot(half_built)).first
        root = LocalRoot(half_built)
        receipts = [read_receipt(root, name, addition) for name in receipt_names(root)]
        assert [(receipt.view, receipt.shard) for receipt in receipts] == [(0, n) for n in range(4)]
        for receipt in receipts:
            for record in receipt.files:
                assert (half_built / record.path).stat().st_size == record.size

    def _copy(self, half_built: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(half_built, tmp_path / "cache"))

    @pytest.mark.parametrize("target", [receipt_path(0, 1), receipt_path(1, 0), "receipts/extra.json"])
    def test_one_in_anothers_place_is_refused(self, target: str, half_built: Path, tmp_path: Path) -> None:
        root = self._copy(half_built, tmp_path)
        (root / target).parent.mkdir(exist_ok=True)
        shutil.copy(root / receipt_path(0, 0), root / target)
        assert any("another receipt's place" in problem.what for problem in tc.verify(root).problems) == (
            target != "receipts/extra.json"
        )
        assert any(problem.place == target for problem in tc.verify(root).problems)

    def test_one_of_another_cache_is_refused(self, half_built: Path, arrays: Path, tmp_path: Path) -> None:
        root = self._copy(half_built, tmp_path)
        addition = read_manifest(LocalRoot(root)).first
        receipt = read_receipt(LocalRoot(root), receipt_path(0, 0), addition)
        foreign = Receipt(**{**vars(receipt), "identity": "0" * 32})
        (root / receipt_path(0, 0)).write_bytes(foreign.to_bytes())
        with pytest.raises(CorruptionError, match="belongs to another cache"):
            tc.open(root).read("logits", 0, [3])

    def test_a_missing_one_is_a_hole(self, half_built: Path, tmp_path: Path) -> None:
        """Without its receipt a shard does not exist, whatever files lie there; building makes it again."""
        root = self._copy(half_built, tmp_path)
        (root / receipt_path(0, 2)).unlink()
        with pytest.raises(CacheError, match="must be committed"):
            tc.open(root).read("logits", 0, [16])
        assert any("view 0, shard 2" in problem.place for problem in tc.verify(root).problems)


def test_identity_covers_every_part() -> None:
    """Changing any part changes `whole`."""
    parts = dict.fromkeys(Identity.model_fields, "a")
    wholes = {Identity(**{**parts, name: "b"}).whole for name in parts} | {Identity(**parts).whole}
    assert len(wholes) == len(parts) + 1


def test_fingerprints_have_kinds_and_versions() -> None:
    """Two kinds or versions never share one; the order of fields does not matter; NaN is refused."""
    names = {
        fingerprint("a", 1, {"x": 1, "y": 2}),
        fingerprint("b", 1, {"x": 1, "y": 2}),
        fingerprint("a", 2, {"x": 1, "y": 2}),
        fingerprint("a", 1, {"x": 1, "y": 3}),
    }
    assert len(names) == 4
    assert fingerprint("a", 1, {"y": 2, "x": 1}) in names
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint("a", 1, {"x": float("nan")})
