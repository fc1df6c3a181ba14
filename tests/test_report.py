"""The report: every number on the page is computed here again, by other means."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from toy_builds import committed

import teacher_cache as tc
from teacher_cache.begin import begin, prepare
from teacher_cache.errors import BuildError, CorruptionError, SpecError
from teacher_cache.plan import open_parts
from teacher_cache.report import write_report
from teacher_cache.report_rows import Picks, pick
from teacher_cache.shard_job import Work, open_job, run_work
from teacher_cache.spec import BuildSpec, NumpySource, parse
from teacher_cache.storage.local_root import LocalRoot

VOID = {"meta", "img", "br", "link", "input", "hr"}
ROWS = 90
VIEWS = 5


class Page(HTMLParser):
    """Elements, text and tables of a page; refuses tags that do not close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.lines: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.lines.append(data)
        if self._open and {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.lines).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def row(self, name: str) -> list[str]:
        """The cells beside a row's heading."""
        found = [row for table in self.tables for row in table if row[0].strip() == name]
        assert len(found) == 1, (name, found)
        return [" ".join(cell.split()) for cell in found[0][1:]]


def spec_of(cache: Path, **changes: Any) -> BuildSpec:
    plain = {
        "cache": str(cache),
        "source": {"kind": "digits", "split": "train", "take": {"count": ROWS}},
        "views": {"recipe": [{"pad_crop": {"size": 8, "padding": 1}}], "count": VIEWS},
        "teacher": {
            "model": "toy_report_models:net",
            "fields": {"feature:2": {"encoding": "dense_f16"}, "logits": {"encoding": "dense_f32"}},
        },
        "store": {"shard_rows": 32, "chunk_rows": 16},
    }
    return parse(BuildSpec, {**plain, **changes}, "test")


def numpy_spec(tmp_path: Path, images: NDArray[np.uint8], names: list[str] | None = None, **changes: Any) -> BuildSpec:
    """A build over arrays, with labels 0, 1, 2, … where there are names."""
    np.save(tmp_path / "images.npy", images)
    source: dict[str, Any] = {"kind": "numpy", "images": str(tmp_path / "images.npy")}
    classes = 10
    if names is not None:
        classes = len(names)
        np.save(tmp_path / "labels.npy", np.arange(len(images)) % classes)
        source |= {"labels": str(tmp_path / "labels.npy"), "class_names": names}
    channels = images.shape[3] if images.ndim == 4 else 1
    teacher = {
        "model": "toy_report_models:net",
        "arguments": {"classes": classes, "channels": channels},
        "fields": {"logits": {"encoding": "dense_f16"}},
    }
    size = images.shape[1]
    views = {"recipe": [{"pad_crop": {"size": size, "padding": 1}}], "count": 2}
    return spec_of(tmp_path / "cache", **{"source": source, "views": views, "teacher": teacher, **changes})


def random_images(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tc.Cache:
    path = tmp_path_factory.mktemp("report") / "cache"
    tc.build(spec_of(path), executor="serial")
    return tc.open(path)


@pytest.fixture(scope="module")
def page(cache: tc.Cache) -> Page:
    return Page(write_report(cache.path, Path(cache.path).parent / "report.html"))


def probabilities(cache: tc.Cache, view: int, rows: list[int], temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax in NumPy over the stored logits."""
    logits = cache.read("logits", view, rows).dense().values.double().numpy() / temperature
    raised = np.exp(logits - logits.max(1, keepdims=True))
    answer: NDArray[np.float64] = raised / raised.sum(1, keepdims=True)
    return answer


def sampled(cache: tc.Cache, picks: Picks, temperature: float = 1.0) -> NDArray[np.float64]:
    pairs = zip(picks.views.tolist(), picks.rows.tolist(), strict=True)
    return np.concatenate([probabilities(cache, view, [row], temperature) for view, row in pairs])


def test_the_facts_are_those_of_the_cache(cache: tc.Cache, page: Page) -> None:
    labels = cache.labels
    assert labels is not None
    right = [
        probabilities(cache, v, list(range(ROWS))).argmax(1) == labels for v in range(VIEWS)
    ]  # dense_f32: nothing lost
    size = sum(record.size for files in committed(cache).values() for record in files.values())
    assert f"{ROWS} rows × {VIEWS} views" in page.text
    assert f"teacher’s accuracy on labels {100 * np.mean(right):.2f} %" in page.text
    assert f"{size / 1000:.1f} kB in all" in page.text
    assert "logits as dense_f32, 40 bytes a row" in page.text
    assert "feature:2 as dense_f16, 12 bytes a row" in page.text
    assert "0 tombstones" in page.text
    assert str(cache.path) in page.text


def test_the_identity_is_that_of_the_manifest(cache: tc.Cache, page: Page) -> None:
    identity = cache.manifest.first.identity
    assert page.row("Whole cache") == [cache.manifest.whole]
    for name, value in identity.model_dump().items():
        assert page.row(name.capitalize()) == [value]
    assert page.row("Format version") == ["2"]
    assert page.row("Promise of the views") == ["native"]
    assert cache.manifest.first.versions["torch"] in page.row("Built with")[0]


def test_the_fidelity_is_that_of_the_build(cache: tc.Cache, page: Page) -> None:
    totals = cache.manifest.first.totals
    assert totals is not None
    logits, feature = totals.fidelity["logits"], totals.fidelity["feature:2"]
    rows = str(int(logits["rows"]))
    kls = [f"{logits[f'kl_t{t}']:.3g}" for t in (1, 2, 4)]
    mass = f"{logits['mass_error']:.3g}"
    assert page.row("logits") == ["10", "dense_f32", rows, *kls, "100.00 %", mass, "–"]
    squared = f"{feature['relative_squared_error']:.3g}"
    assert float(squared) > 0
    assert page.row("feature:2") == ["6", "dense_f16", rows, "–", "–", "–", "–", "–", squared]


def test_entropy_and_mass_are_those_of_the_stored_logits(cache: tc.Cache, page: Page) -> None:
    picks = pick(cache, 2000)
    p1, p4 = sampled(cache, picks), sampled(cache, picks, 4)
    h1, h4 = (float(-(p * np.log(p)).sum(1).mean()) for p in (p1, p4))
    assert h1 < h4 < math.log(10)
    assert f"Mean entropy in nats: {h1:.3f} at T=1, {h4:.3f} at T=4." in page.text
    mass = 100 * np.sort(p1, axis=1)[:, ::-1].cumsum(1).mean(0)
    shown = ", ".join(f"{mass[k - 1]:.2f} % for k = {k}" for k in (1, 3, 5))
    assert f"Over {ROWS} rows. Mean mass: {shown}." in page.text
    drawn = curve(page, "Mass in the largest classes", "--c0")
    assert_affine(drawn[:, 0], np.arange(1, 11))
    assert_affine(drawn[:, 1], -mass)


def test_the_band_holds_10_to_90_percent_of_the_rows(cache: tc.Cache, page: Page) -> None:
    p = sampled(cache, pick(cache, 2000))
    low, high = np.quantile(np.sort(p, axis=1)[:, ::-1].cumsum(1), (0.1, 0.9), axis=0)
    svg = svg_of(page, "Mass in the largest classes")
    [band] = re.findall(r'FillBetweenPolyCollection_1">\s*<defs>\s*<path [^>]*? d="([^"]*)"', svg)
    points = np.array(re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", band), np.float64)
    xs = np.unique(points[:, 0])
    edges = np.array([[points[points[:, 0] == x, 1].max(), points[points[:, 0] == x, 1].min()] for x in xs])
    assert_affine(edges.T.ravel(), -np.concatenate([low, high]))


@pytest.mark.parametrize(("temperature", "colour"), [(1, "--c0"), (4, "--c1")])
def test_the_histogram_counts_the_rows(cache: tc.Cache, page: Page, temperature: int, colour: str) -> None:
    p = sampled(cache, pick(cache, 2000), temperature)
    counts = np.histogram(-(p * np.log(p)).sum(1), 40, (0, math.log(10) * 1.001))[0]
    points = curve(page, "Entropy of the soft targets", colour)
    left, right = points[:, 0].min(), points[:, 0].max()
    middles = left + (np.arange(40) + 0.5) * (right - left) / 40
    flat = [(a, b) for a, b in itertools.pairwise(points) if a[1] == b[1]]
    heights = [next(a[1] for a, b in flat if a[0] <= middle <= b[0]) for middle in middles]
    assert_affine(np.array(heights), -counts)


def svg_of(page: Page, title: str) -> str:
    return page.source.split(f"<h3>{title}</h3>")[1].split("</svg>")[0]


def curve(page: Page, title: str, colour: str) -> NDArray[np.float64]:
    """The points of the one line of a colour, in the SVG's own units (y points down)."""
    svg = svg_of(page, title)
    lines = [
        re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)
        for path, style in re.findall(r'<path d="([^"]*)"[^>]*?style="([^"]*)"', svg)
        if f"stroke: var({colour})" in style and "fill: none" in style
    ]
    assert len(lines) == 1, (title, colour, len(lines))
    return np.array(lines[0], np.float64)


def assert_affine(drawn: NDArray[np.float64], wanted: NDArray[Any]) -> None:
    """That one scale and offset, with a positive scale, bring the wanted values to the drawn ones."""
    assert len(drawn) == len(wanted)
    slope, offset = np.polyfit(wanted.astype(np.float64), drawn, 1)
    assert slope > 0
    np.testing.assert_allclose(slope * wanted + offset, drawn, atol=0.01)


def test_picks_are_distinct_and_follow_the_samples_not_their_order(cache: tc.Cache) -> None:
    few, many = pick(cache, 10), pick(cache, 2000)
    assert sorted(many.rows.tolist()) == list(range(ROWS))
    assert few.rows.tolist() == many.rows[:10].tolist() != list(range(10))
    assert set(many.views.tolist()) == set(range(VIEWS))


def test_the_gallery_shows_the_teachers_views_and_answers(cache: tc.Cache, page: Page) -> None:
    rows = pick(cache, 12).rows.tolist()
    images = page.all("img")
    assert len(images) == 12 * 4
    assert cache.labels is not None
    bars = re.findall(r'<i( class="miss")? style="width:([\d.]+)%"', page.source)
    assert len(bars) == 12 * 4 * 3
    places = [(row, view) for row in rows for view in range(4)]
    for number, ((row, view), image) in enumerate(zip(places, images, strict=True)):
        label = int(cache.labels[row])
        assert image["alt"] == f"View {view} of {cache.samples.keys[row]}, label {label}"
        assert image["class"] == "tiny"
        np.testing.assert_array_equal(pixels(image), cache.render(view, [row])[0, 0].numpy())
        p = probabilities(cache, view, [row])[0]
        top = np.argsort(-p)[:3]
        wanted = [("" if c == label else ' class="miss"', f"{100 * p[c]:.1f}") for c in top]
        assert bars[3 * number : 3 * number + 3] == wanted


def pixels(image: dict[str, str | None]) -> NDArray[np.uint8]:
    kind, data = str(image["src"]).split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_page_needs_nothing_outside_itself_and_can_be_read_aloud(page: Page) -> None:
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "embed"}
    without_images = re.sub(r'src="data:image/png;base64,[^"]*"', "", page.source)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)|src=", without_images)
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] and str(image["src"]).startswith("data:") for image in page.all("img"))
    pictures = [attrs for attrs in page.all("div") if attrs.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) == 2
    assert all(attrs["aria-label"] for attrs in pictures)
    ids = re.findall(r'\bid="([^"]*)"', page.source)
    assert len(ids) == len(set(ids))
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    assert "prefers-color-scheme: dark" in page.source
    colours = re.findall(r"(?:fill|stroke): (#\w+)", page.source)
    assert colours == [], "a fixed colour does not follow dark mode"


def test_the_same_cache_gives_the_same_bytes(cache: tc.Cache, page: Page, tmp_path: Path) -> None:
    with matplotlib.rc_context({"xtick.major.size": 30, "svg.hashsalt": "other"}):
        again = write_report(str(cache.path), tmp_path / "new" / "again.html")
    assert again.read_text() == page.source
    assert [path.name for path in again.parent.iterdir()] == ["again.html"]


def test_top_k_shows_what_is_kept(tmp_path: Path) -> None:
    fields = {"logits": {"encoding": {"kind": "top_k", "k": 2}}}
    tc.build(spec_of(tmp_path / "c", teacher={"model": "toy_report_models:net", "fields": fields}), executor="serial")
    page = Page(write_report(tmp_path / "c", tmp_path / "r.html"))
    assert "logits as top_k, k = 2, 10 bytes a row" in page.text
    assert len(page.all("i")) == 12 * 4 * 2
    assert "k = 2: kept by the encoding" in page.text
    totals = tc.open(tmp_path / "c").manifest.first.totals
    assert totals is not None
    assert page.row("logits")[3:6] == [f"{totals.fidelity['logits'][f'kl_t{t}']:.3g}" for t in (1, 2, 4)]


def test_without_logits_the_page_says_so(tmp_path: Path) -> None:
    teacher = {"model": "toy_report_models:net", "fields": {"feature:2": {"encoding": "dense_f32"}}}
    tc.build(spec_of(tmp_path / "c", teacher=teacher), executor="serial")
    page = Page(write_report(tmp_path / "c", tmp_path / "r.html"))
    assert "keeps no logits" in page.text
    assert "accuracy on labels" not in page.text
    assert (len(page.all("svg")), len(page.all("i")), len(page.all("img"))) == (0, 0, 48)


def test_without_labels_and_names_the_page_says_so(tmp_path: Path) -> None:
    tc.build(numpy_spec(tmp_path, random_images(20, 8, 8)), executor="serial")
    page = Page(write_report(tmp_path / "cache", tmp_path / "r.html"))
    assert "no labels" in page.text
    assert "no class names" in page.text
    assert "teacher’s accuracy" not in page.text
    assert re.search(r"class \d", page.text)
    assert len(page.all("img")) == 12 * 2
    assert all("label" not in str(image["alt"]) for image in page.all("img"))


def test_colour_views_are_shown_and_large_ones_shrunk(tmp_path: Path) -> None:
    tc.build(numpy_spec(tmp_path, random_images(3, 200, 200, 3)), executor="serial")
    page = Page(write_report(tmp_path / "cache", tmp_path / "r.html"))
    assert [pixels(image).shape for image in page.all("img")] == [(128, 128, 3)] * 6
    assert "200 × 200 pixels and are shown smaller" in page.text
    assert all("class" not in image for image in page.all("img"))


def test_text_from_data_is_escaped(tmp_path: Path, cache: tc.Cache) -> None:
    names = ["<script>alert(1)</script>", '"><img src=x>', "{{ 7 * 7 }}", "$\\frac$", "日本"]
    tc.build(numpy_spec(tmp_path, random_images(20, 8, 8), names), executor="serial")
    other = comparison(tmp_path, {"arms": {name: {**ARM, "history": [HISTORY]} for name in names}})
    page = Page(write_report(tmp_path / "cache", tmp_path / "r.html", other))
    assert "<script" not in page.source
    assert "<script>alert(1)</script>" in page.text
    assert len(page.all("img")) == 12 * 2
    assert all(name in page.text for name in names)


def folder_with_a_broken_image(root: Path) -> dict[str, Any]:
    for number, image in enumerate(random_images(6, 8, 8)):
        (root / "a&b").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "a&b" / f"{number}.png")
    (root / "a&b" / "4.png").write_bytes(b"no image")
    return {"kind": "folder", "path": str(root)}


def test_tombstones_are_listed(tmp_path: Path) -> None:
    source = folder_with_a_broken_image(tmp_path / "images")
    teacher = {"model": "toy_report_models:net", "arguments": {"classes": 1}}
    tc.build(spec_of(tmp_path / "c", source=source, teacher=teacher), executor="serial")
    page = Page(write_report(tmp_path / "c", tmp_path / "r.html"))
    assert "1 tombstone" in page.text
    [reason] = page.row("a&b/4.png")
    assert "cannot be decoded" in reason
    assert len(page.all("details")) == 2
    assert len(page.all("img")) == 5 * 4


def unfinished(path: Path, *works: Work) -> tc.Cache:
    opened = open_parts(spec_of(path))
    root = LocalRoot(path)
    job = open_job(root, begin(root, prepare(root, opened)), opened)
    for work in works:
        run_work(job, work)
    return tc.open(path)


def test_an_unfinished_cache_shows_what_is_committed(tmp_path: Path) -> None:
    # Shards of 32, 32 and 26 rows: views 1 and 3 of the first, view 3 of the last, nothing of the second.
    cache = unfinished(tmp_path / "c", Work((1, 3), 0), Work((3,), 2))
    page = Page(write_report(tmp_path / "c", tmp_path / "r.html"))
    assert "90 of 450 rows × views are committed (20.0 %)" in page.text
    assert page.all("progress")[0]["value"] == "90"
    picks = pick(cache, 2000)
    assert sorted(picks.rows.tolist()) == [*range(32), *range(64, 90)]
    assert all(view in ((1, 3) if row < 32 else (3,)) for row, view in zip(picks.rows, picks.views, strict=True))
    rows = picks.rows[:12].tolist()
    wanted = [f"View {v} of {cache.samples.keys[r]}," for r in rows for v in ((1, 3) if r < 32 else (3,))]
    assert [str(image["alt"]).split(" label")[0] for image in page.all("img")] == wanted
    assert page.row("logits")[2] == str(32 + 32 + 26)
    labels = cache.labels
    assert labels is not None
    right = [
        probabilities(cache, view, [row]).argmax() == labels[row]
        for view, rows in ((1, range(32)), (3, range(32)), (3, range(64, 90)))
        for row in rows
    ]
    assert f"accuracy on labels {100 * np.mean(right):.2f} %" in page.text


def test_a_cache_with_nothing_committed_is_a_page_too(tmp_path: Path) -> None:
    unfinished(tmp_path / "c")
    page = Page(write_report(tmp_path / "c", tmp_path / "r.html"))
    assert "0 of 450 rows × views" in page.text
    assert page.text.count("No row is committed yet") == 2
    assert page.row("logits")[2:] == ["0", "–", "–", "–", "–", "–", "–"]


def test_a_moved_source_leaves_a_visible_note(tmp_path: Path) -> None:
    tc.build(numpy_spec(tmp_path, random_images(20, 8, 8)), executor="serial")
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "images.npy").rename(tmp_path / "moved" / "images.npy")
    page = Page(write_report(tmp_path / "cache", tmp_path / "r.html"))
    assert page.all("img") == []
    assert len(page.all("svg")) == 2
    assert "Problem. The gallery is left out" in page.text
    assert f"must be a readable .npy file (found: {tmp_path / 'images.npy'})" in page.text
    source = NumpySource(kind="numpy", images=str(moved))
    found = Page(write_report(tmp_path / "cache", tmp_path / "r.html", source=source))
    assert len(found.all("img")) == 24
    assert "Problem" not in found.text


def test_a_changed_source_leaves_a_visible_note(tmp_path: Path) -> None:
    images = random_images(20, 8, 8)
    tc.build(numpy_spec(tmp_path, images), executor="serial")
    np.save(tmp_path / "images.npy", 255 - images)
    page = Page(write_report(tmp_path / "cache", tmp_path / "r.html"))
    assert page.all("img") == []
    assert "must have the bytes that the teacher saw" in page.text


def test_a_damaged_cache_gives_no_page(tmp_path: Path) -> None:
    tc.build(spec_of(tmp_path / "c"), executor="serial")
    records = [record for found in committed(tc.open(tmp_path / "c")).values() for record in found.values()]
    for record in records:
        data = bytearray((tmp_path / "c" / record.path).read_bytes())
        data[0] ^= 1
        (tmp_path / "c" / record.path).write_bytes(data)
    with pytest.raises(CorruptionError):
        write_report(tmp_path / "c", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_place_that_cannot_be_written_is_named(cache: tc.Cache, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be written"):
        write_report(cache.path, tmp_path)


ARM = {"accuracy": [0.9, 0.92, 0.97]}
HISTORY = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "accuracy": 0.5}, {"epoch": 3, "accuracy": 0.6}]


def comparison(folder: Path, content: object) -> Path:
    path = folder / "comparison.json"
    path.write_text(json.dumps(content))
    return path


def test_a_comparison_is_shown(cache: tc.Cache, tmp_path: Path) -> None:
    def seed(shift: float) -> list[dict[str, float]]:
        accuracies = (0.2, 0.5, 0.6)
        return [
            {"epoch": epoch, "loss": 3 / epoch + shift, "accuracy": value + shift, "seconds": 0.3}
            for epoch, value in enumerate(accuracies, 1)
        ]

    content = {
        "arms": {
            "ce": {"accuracy": [0.9, 0.92], "mean": 0.91, "std": 0.0141, "history": [seed(0), seed(0.1)]},
            "kd": {"accuracy": [0.95, 0.97], "mean": 0.96, "std": 0.0142, "history": [seed(0.1), seed(0.3)]},
        },
        "seeds": [4, 5],
        "differences": [{"arm": "kd", "against": "ce", "mean": 0.05, "low": 0.012, "high": 0.088, "significant": True}],
        "student": "small_cnn",
        "train": {"epochs": 3},
    }
    page = Page(write_report(cache.path, tmp_path / "r.html", comparison(tmp_path, content)))
    assert page.row("ce") == ["91.00 ± 1.41", "2", "–"]
    assert page.row("kd") == ["96.00 ± 1.42", "2", "+5.00 against ce [+1.20, +8.80], significant"]
    assert "of small_cnn, mean ± standard deviation over seeds (4, 5)" in page.text
    assert "At the end: ce 65; kd 80." in page.text
    assert "At the end: ce 1.05; kd 1.2." in page.text
    ce, kd = (curve(page, "Accuracy while training", colour) for colour in ("--c0", "--c1"))
    wanted = np.array([0.25, 0.55, 0.65, 0.4, 0.7, 0.8])
    assert_affine(np.concatenate([ce[:, 1], kd[:, 1]]), -wanted)
    losses = np.array([3.05, 1.55, 1.05, 3.2, 1.7, 1.2])
    drawn = [curve(page, "Loss while training", colour)[:, 1] for colour in ("--c0", "--c1")]
    assert_affine(np.concatenate(drawn), -losses)


def test_a_comparison_without_its_optional_parts(cache: tc.Cache, tmp_path: Path) -> None:
    content = {"arms": {"ce": ARM, "one seed": {"accuracy": [0.5], "std": math.nan}}}
    page = Page(write_report(cache.path, tmp_path / "r.html", comparison(tmp_path, content)))
    assert page.row("ce") == [f"93.00 ± {100 * np.std([0.9, 0.92, 0.97], ddof=1):.2f}", "3", "–"]
    assert page.row("one seed") == ["50.00", "1", "–"]
    assert "no training history" in page.text


def test_epochs_that_recorded_nothing_are_left_out(cache: tc.Cache, tmp_path: Path) -> None:
    content = {"arms": {"ce": {**ARM, "history": [HISTORY]}}}
    page = Page(write_report(cache.path, tmp_path / "r.html", comparison(tmp_path, content)))
    assert len(curve(page, "Accuracy while training", "--c0")) == 2
    assert "At the end: ce 60." in page.text
    only_loss = [[{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]]
    content = {"arms": {"ce": {**ARM, "history": only_loss}}}
    page = Page(write_report(cache.path, tmp_path / "r.html", comparison(tmp_path, content)))
    assert "Accuracy while training" not in page.text
    assert len(page.all("svg")) == 3


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"arms": {}},
        {"arms": {"ce": {"mean": 0.9}}},
        {"arms": {"ce": {"accuracy": []}}},
        {"arms": {"ce": {"accuracy": [math.nan]}}},
        {"arms": {"ce": {"accuracy": "high"}}},
        {"arms": {"ce": {**ARM, "history": [[{"loss": 1.0}]]}}},
        {"arms": {"ce": ARM}, "differences": [{"arm": "kd", "against": "ce", "mean": 0.1}]},
    ],
)
def test_another_json_is_refused(cache: tc.Cache, tmp_path: Path, content: object) -> None:
    with pytest.raises(SpecError):
        write_report(cache.path, tmp_path / "r.html", comparison(tmp_path, content))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("data", [None, b"", b"{", b"\xff\xfe"])
def test_what_is_no_json_is_refused(cache: tc.Cache, tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "comparison.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SpecError, match="comparison"):
        write_report(cache.path, tmp_path / "r.html", path)
