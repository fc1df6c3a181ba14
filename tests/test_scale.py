"""What a large cache costs does not depend on its size: counted in files that are read, never by the clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated import Size, left_out, logits_of, simulate
from toy_builds import CLASSES, toy_spec

import teacher_cache as tc
from teacher_cache.left import what_is_left
from teacher_cache.manifest import MANIFEST, read_manifest
from teacher_cache.samples import PART_ROWS
from teacher_cache.storage.local_root import LocalRoot

SIZE = Size(rows=3 * PART_ROWS + 5, views=4, shard_rows=1024)


@pytest.fixture(scope="module")
def large(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, four views, four parts of the sample table; read only."""
    folder = tmp_path_factory.mktemp("scale")
    tc.build(toy_spec(folder / "template", arrays), "serial")
    simulate(folder / "cache", folder / "template", SIZE)
    return folder / "cache"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what is read, mapped or listed, by the name's first part."""
    counted: Counter[str] = Counter()
    before = {name: getattr(LocalRoot, name) for name in ("read", "local", "names")}
    for method in ("read", "local"):

        def spy(root: LocalRoot, name: str, *rest: object, _method: str = method) -> object:
            counted[name.split("-")[0].split("/")[0]] += 1
            return before[_method](root, name, *rest)

        monkeypatch.setattr(LocalRoot, method, spy)

    def names(root: LocalRoot, prefix: str = "") -> Iterator[str]:
        counted[f"names of {prefix or 'all'}"] += 1
        return iter(before["names"](root, prefix))

    monkeypatch.setattr(LocalRoot, "names", names)
    return counted


def test_opening_reads_the_manifest_alone(large: Path, read: Counter[str]) -> None:
    """No table of samples or receipts, no listing."""
    cache = tc.open(large)
    assert (len(cache), cache.views, cache.fields) == (SIZE.rows, SIZE.views, ("logits", "other/logits"))
    assert read == {MANIFEST: 1}


@pytest.mark.parametrize("view", [0, SIZE.views - 1])
@pytest.mark.parametrize("row", [0, SIZE.rows - 1])
def test_any_row_costs_the_same(row: int, view: int, large: Path, read: Counter[str]) -> None:
    """One table, for its view, and the one file that it is in."""
    cache = tc.open(large)
    read.clear()
    found = cache.read("logits", view, [row]).dense().values.numpy()
    assert (found == logits_of(row, 1, CLASSES)).all()
    assert read == {"receipts": 1, "data": 1}
    assert cache.samples.key(row) == f"sample/{row}"
    assert read == {"receipts": 1, "data": 1, "samples": 1}


def test_what_is_left_is_known_from_names(large: Path, read: Counter[str]) -> None:
    """No receipt is opened: those of the simulated cache are empty, and would be refused."""
    manifest = read_manifest(LocalRoot(large))
    read.clear()
    addition = manifest.additions[-1]
    left = what_is_left(LocalRoot(large), addition, together=1)
    assert left is not None
    missing = left_out(addition.grid, SIZE.views)
    assert {(work.views[0], work.shard) for work in left.works} == missing
    spans = [addition.span(shard) for _, shard in missing]
    assert left.done == SIZE.views * SIZE.rows - sum(stop - start for start, stop in spans)
    listed = {f"names of receipts/v{view:04d}/": 1 for view in range(SIZE.views)}
    assert read == {MANIFEST: 1, "names of poison/": 1, **listed}


def test_several_views_of_one_decoding(large: Path) -> None:
    """What is left of the same rows in several views is one piece of work."""
    addition = read_manifest(LocalRoot(large)).additions[-1]
    left = what_is_left(LocalRoot(large), addition, together=SIZE.views)
    assert left is not None
    assert {(view, work.shard) for work in left.works for view in work.views} == left_out(addition.grid, SIZE.views)
    assert len({work.shard for work in left.works}) == len(left.works)


def test_rows_of_a_view_are_in_one_table(large: Path) -> None:
    """The tables that a view needs grow with its shards, not with the views of the cache."""
    cache = tc.open(large)
    sizes = [(large / table.path).stat().st_size for table in cache.manifest.first.receipts]
    assert len(sizes) == SIZE.views
    assert max(sizes) < 2 * min(sizes)
