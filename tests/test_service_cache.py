"""Cache first: by name and by pixels the service answers what a build keeps, computes the rest as a build would, and
says of each item which it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_abandon import stop_after
from toy_service_models import (
    CLASSES,
    POISON,
    ToyTeacher,
    colour_spec,
    open_gate,
    running,
    toy_logits,
    toy_served,
    wait_until,
)
from toy_service_models import views as toy_views

import teacher_cache as tc
from services.answers import log_probs, top_k
from services.app import create_app
from services.client import TeacherClient
from services.library import Library
from services.pixel_index import PixelIndex, Place
from services.settings import Settings
from services.status import Status
from services.teachers import ServedTeacher, open_served
from teacher_cache.errors import MismatchError, ServiceError
from teacher_cache.spec import BuildSpec, parse

ROWS, VIEWS, MICRO_BATCH = 21, 2, 8
KEYS = [f"images/{row}" for row in range(ROWS)]


@dataclass
class Counting:
    """A teacher, and how often it was asked (but for the warming, with zeros)."""

    teacher: Any
    asked: list[torch.Tensor] = field(default_factory=list)
    refuse: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def __call__(self, views_BCHW: torch.Tensor) -> Any:
        if views_BCHW.any():
            assert not self.refuse, "it is not to be asked"
            self.asked.append(views_BCHW.clone())
        return self.teacher(views_BCHW)


@dataclass
class Server:
    """A running service of the colour teacher."""

    client: TeacherClient
    http: httpx.Client
    teacher: Counting
    served: ServedTeacher

    def post(self, body: object, path: str = "predict", **options: object) -> httpx.Response:
        """Raw JSON to raw JSON."""
        return self.http.post(f"/v1/teachers/colour/{path}", json=body, params=options)


Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts services; settings as keywords."""
    with ExitStack() as stack:

        def start(spec: BuildSpec, **given: Any) -> Server:
            limits = parse(Settings, given, "test")
            plain = open_served(spec, from_cache=limits.from_cache)
            teacher = Counting(plain.teacher)
            served = replace(plain, teacher=teacher, example_CHW=None)
            app = create_app({"colour": served}, limits)
            base = stack.enter_context(running(app))
            wait_until(lambda: app.state.service.not_ready() == [])
            client = stack.enter_context(TeacherClient(f"{base}/colour"))
            http = stack.enter_context(httpx.Client(base_url=base, timeout=20))
            return Server(client, http, teacher, served)

        yield start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data set, and the cache `local` of exact logits."""
    folder = tmp_path_factory.mktemp("cached")
    tc.build(colour_spec(folder, "local"), executor="serial")
    return folder


@pytest.fixture(scope="module")
def stored(folder: Path) -> torch.Tensor:
    """Logits that the build has kept, [view, row, class]."""
    cache = tc.open(folder / "local")
    return torch.stack([values(cache, view) for view in range(VIEWS)])


def values(cache: tc.Cache, view: int) -> torch.Tensor:
    """All logits of one view."""
    target = cache.read("logits", view=view, rows=range(len(cache)))
    assert isinstance(target, tc.DenseTarget)
    return target.values


def told(status: Sequence[Status]) -> set[Status]:
    """What became of the items, whichever came how."""
    return set(status)


# ---------------------------------------------------------------- by name


def test_what_the_cache_holds_is_answered_from_there_in_every_form(
    folder: Path, stored: torch.Tensor, serve: Serve
) -> None:
    server = serve(colour_spec(folder, "local"))
    server.teacher.refuse = True
    keys, views = [KEYS[20], KEYS[3], KEYS[3], KEYS[0]], [0, 1, 1, 1]
    expected = stored[views, [20, 3, 3, 0]]
    found = server.client.predict_named(keys, views)
    assert found.values is not None
    assert torch.equal(found.values, expected)
    assert told(found.status) == {Status.CACHED}
    assert found.metadata["encodings"] == '{"logits": "dense_f32"}'
    soft = server.client.predict_named(keys, views, output="logprobs", temperature=2.5).values
    assert soft is not None
    assert torch.equal(soft, log_probs(expected, 2.5))
    best = server.client.predict_named(keys, views, output="topk", k=3, temperature=4)
    for name, value in top_k(log_probs(expected, 4.0), 3).items():
        assert torch.equal(getattr(best, name), value)
    feature = server.client.predict_named(keys, 1, fields=["feature:relu", "logits"])
    kept = tc.open(folder / "local").read("feature:relu", view=1, rows=[20, 3, 3, 0])
    assert isinstance(kept, tc.DenseTarget)
    assert torch.equal(feature.features["feature:relu"], kept.values.float())
    shown = server.post({"keys": keys, "views": views}, output="probs", cache="only").json()
    assert shown["status"] == ["cached"] * 4
    torch.testing.assert_close(torch.tensor(shown["values"]), expected.softmax(1))


@given(
    places=st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, VIEWS - 1)), min_size=1, max_size=12),
    use=st.sampled_from(["prefer", "bypass"]),
)
@settings(max_examples=25)
def test_what_it_does_not_hold_is_computed_with_the_bits_of_a_build(
    computing: Server, stored: torch.Tensor, places: list[tuple[int, int]], use: Any
) -> None:
    rows, views = [row for row, _ in places], [view for _, view in places]
    before = len(computing.teacher.asked)
    found = computing.client.predict_named([KEYS[row] for row in rows], views, cache=use)
    assert found.values is not None
    assert torch.equal(found.values, stored[views, rows])
    assert told(found.status) == {Status.COMPUTED}
    # Shards of 10 rows in micro-batches of 8: each is asked about once for all that lie in it.
    batches = {(view, row // 10, row % 10 // MICRO_BATCH) for row, view in places}
    assert len(computing.teacher.asked) - before == len(batches)


@pytest.fixture(scope="module")
def computing(folder: Path) -> Iterator[Server]:
    """A service without a cache."""
    served = open_served(colour_spec(folder, "local"), from_cache=False)
    teacher = Counting(served.teacher)
    app = create_app({"colour": replace(served, teacher=teacher, example_CHW=None)}, Settings())
    with running(app) as base, TeacherClient(f"{base}/colour") as client, httpx.Client(base_url=base) as http:
        wait_until(lambda: app.state.service.not_ready() == [])
        yield Server(client, http, teacher, served)


def test_a_view_beyond_the_plan_is_the_one_that_a_longer_build_makes(
    tmp_path: Path, folder: Path, serve: Serve
) -> None:
    spec = colour_spec(folder, "local")
    longer = spec.model_copy(
        update={"cache": str(tmp_path / "longer"), "views": spec.views.model_copy(update={"count": 4})}
    )
    tc.build(longer, executor="serial")
    server = serve(spec)
    found = server.client.predict_named([KEYS[5], KEYS[17], KEYS[5]], [3, 3, 0])
    assert found.values is not None
    assert torch.equal(found.values[:2], values(tc.open(tmp_path / "longer"), 3)[[5, 17]])
    assert found.status == (Status.COMPUTED, Status.COMPUTED, Status.CACHED)


def test_a_half_built_cache_is_filled_up_by_the_model_and_looked_at_again(
    tmp_path: Path, folder: Path, stored: torch.Tensor, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.library._LOOK_SECONDS", 0.0)
    spec = colour_spec(folder, "unused").model_copy(update={"cache": str(tmp_path / "half")})
    server = serve(spec)
    with pytest.raises(KeyboardInterrupt):
        tc.build(spec, executor="serial", progress=stop_after(2))
    found = server.client.predict_named(KEYS, 0)
    assert found.values is not None
    assert torch.equal(found.values, stored[0])
    assert told(found.status) == {Status.CACHED, Status.COMPUTED}
    tc.build(spec, executor="serial")
    again = server.client.predict_named(KEYS, 1, cache="only")
    assert again.values is not None
    assert torch.equal(again.values, stored[1])
    assert told(again.status) == {Status.CACHED}


def test_items_without_an_answer_say_why_and_leave_the_others_theirs(
    folder: Path, stored: torch.Tensor, serve: Serve
) -> None:
    server = serve(colour_spec(folder, "local"))
    digests = [int(digest) for digest in tc.open(folder / "local").digests(0, [0, 1])]
    found = server.client.predict_named([KEYS[0], "nobody", KEYS[1]], 0, digests=[digests[0], 0, 7], strict=False)
    assert found.status == (Status.CACHED, Status.UNKNOWN, Status.DIFFERS)
    assert found.values is not None
    assert torch.equal(found.values[0], stored[0, 0])
    assert found.values[1:].isnan().all()
    shown = server.post({"keys": [KEYS[0], "nobody"]}, output="topk").json()
    assert shown["values"][1] is shown["indices"][1] is shown["names"][1] is None
    assert shown["status"] == ["cached", "unknown"]
    beyond = server.client.predict_named([KEYS[0], KEYS[0]], [0, 7], cache="only", strict=False)
    assert beyond.status == (Status.CACHED, Status.ABSENT)
    for keys, views, options, status in (
        ([KEYS[0], "nobody"], 0, {"strict": True}, 404),
        (["nobody"], 0, {}, 404),
        ([KEYS[0]], 7, {"cache": "only"}, 404),
        ([KEYS[0], KEYS[0]], [0, 7], {"cache": "only", "strict": True}, 404),
    ):
        answer = server.post({"keys": keys, "views": views}, **options)
        assert (answer.status_code, answer.json()["field"]) == (status, "items"), answer.text
    wrong = server.post({"keys": [KEYS[1]], "digests": ["0" * 16]})
    assert (wrong.status_code, wrong.json()["hint"]) == (422, "Send the images.")
    # Of views that the cache does not hold, too: those of the model are compared.
    assert server.client.predict_named([KEYS[1], KEYS[1]], [5, 0], digests=[3, digests[1]], strict=False).status == (
        Status.DIFFERS,
        Status.CACHED,
    )
    assert not server.teacher.asked


def test_a_sample_that_cannot_be_decoded_is_no_zero(tmp_path: Path, serve: Serve) -> None:
    for number in range(10):
        place = tmp_path / "images" / f"class {number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 10, 3), number * 20, np.uint8)).save(place / f"{number}.png")
    (tmp_path / "images" / "class 1" / "1.png").write_bytes(b"no picture")
    plain, source = colour_spec(tmp_path / "unused", "x"), {"kind": "folder", "path": str(tmp_path / "images")}
    spec = parse(
        BuildSpec,
        plain.model_dump() | {"cache": str(tmp_path / "cache"), "source": source},
        "test",
    )
    keys = list(open_keys(spec))
    for built in (False, True):
        if built:
            tc.build(spec, executor="serial")
        found = serve(spec).client.predict_named(keys, 0, strict=False)
        assert found.status.count(Status.BROKEN) == 1
        assert keys[found.status.index(Status.BROKEN)] == "class 1/1.png"
        cache = tc.open(spec.cache) if built else None
        if cache is not None and found.values is not None:
            alive = np.flatnonzero(cache.alive).tolist()
            target = cache.read("logits", view=0, rows=alive)
            assert isinstance(target, tc.DenseTarget)
            assert torch.equal(found.values[alive], target.values)


def open_keys(spec: BuildSpec) -> Sequence[str]:
    """The keys of a configuration's samples."""
    from teacher_cache.sources import open_source

    return open_source(spec.source).keys


def test_one_request_cannot_ask_for_more_forward_passes_than_one_that_brings_its_images(
    folder: Path, serve: Serve
) -> None:
    server = serve(colour_spec(folder, "local"), from_cache=False, max_images=16)
    spread = server.post({"keys": [KEYS[0], KEYS[8], KEYS[10]]})
    assert (spread.status_code, spread.json()["field"]) == (413, "keys")
    assert "at most 2 micro-batches" in spread.json()["rule"]
    assert server.post({"keys": [KEYS[0], KEYS[8]]}).status_code == 200
    assert server.post({"keys": [KEYS[0]] * 17}).status_code == 413


# ---------------------------------------------------------------- one micro-batch, exactly


def test_a_whole_micro_batch_has_its_fillings_and_its_bits(folder: Path, stored: torch.Tensor, serve: Serve) -> None:
    server = serve(colour_spec(folder, "local"), from_cache=False)
    answer = server.post({"keys": [KEYS[8], KEYS[9]], "views": 1, "whole": True})
    assert answer.status_code == 200
    assert len(answer.json()["values"]) == MICRO_BATCH
    assert torch.equal(torch.tensor(answer.json()["values"])[:2], stored[1, 8:10])
    (asked,) = server.teacher.asked
    assert not asked[2:].any()
    assert server.post({"keys": KEYS[:9], "whole": True}).status_code == 422
    assert server.post({"keys": [KEYS[0], KEYS[1]], "views": [0, 1], "whole": True}).status_code == 422
    assert server.post({"keys": [KEYS[0], "nobody"], "whole": True}, strict=True).status_code == 404
    assert len(server.teacher.asked) == 1


@pytest.mark.parametrize(
    ("encoding", "keys", "status"),
    [
        ("dense_f32", KEYS[:8], "cached"),
        ("dense_f32", KEYS[10:18], "cached"),
        ("dense_f32", KEYS[1:9], "computed"),
        ("dense_f32", KEYS[8:10], "computed"),
        ("dense_f32", [*KEYS[1:8], KEYS[0]], "computed"),
        ("dense_f16", KEYS[:8], "computed"),
    ],
    ids=["the first", "of the second shard", "not one of the build", "with fillings", "in another order", "rounded"],
)
def test_only_the_exact_bits_of_the_same_micro_batch_come_from_the_cache(
    folder: Path, serve: Serve, encoding: str, keys: list[str], status: str
) -> None:
    fields = {"logits": {"encoding": encoding}}
    spec = colour_spec(folder, encoding, fields=fields)
    if not Path(spec.cache).exists():
        tc.build(spec, executor="serial")
    answer = serve(spec).post({"keys": keys, "whole": True}).json()
    assert set(answer["status"]) == {status}


# ---------------------------------------------------------------- by pixels


def test_views_that_the_teacher_saw_are_found_by_their_pixels(folder: Path, stored: torch.Tensor, serve: Serve) -> None:
    server = serve(colour_spec(folder, "local"))
    cache = tc.open(folder / "local")
    images = torch.cat([cache.render(view=1, rows=[4, 11]), cache.render(view=0, rows=[11])])
    found = server.client.predict(images)
    assert found.values is not None
    assert torch.equal(found.values, stored[[1, 1, 0], [4, 11, 11]])
    assert told(found.status) == {Status.CACHED}
    assert not server.teacher.asked
    other = images.clone()
    other[1, 2, 7, 7] ^= 1
    mixed = server.client.predict(other)
    assert mixed.status == (Status.CACHED, Status.COMPUTED, Status.CACHED)
    assert mixed.values is not None
    assert torch.equal(mixed.values[[0, 2]], found.values[[0, 2]])
    assert not torch.equal(mixed.values[1], found.values[1])
    fresh = server.client.predict(images, cache="bypass")
    assert told(fresh.status) == {Status.COMPUTED}
    with pytest.raises(ServiceError, match="cache or the journal"):
        server.client.predict(other[1:2], cache="only")


def test_a_digest_that_two_images_share_is_no_proof(
    folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PixelIndex, "find", lambda _self, images: [Place(3, 1)] * len(images))
    server = serve(colour_spec(folder, "local"))
    image = toy_views(1)
    assert server.client.predict(image).status == (Status.COMPUTED,)
    right = tc.open(folder / "local").render(view=1, rows=[3])
    assert server.client.predict(right).status == (Status.CACHED,)


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    ("encoding", "options", "cached"),
    [
        ({"kind": "top_k", "k": 3}, {"output": "topk", "k": 3}, True),
        ({"kind": "top_k", "k": 3, "values": "u8"}, {"output": "topk", "k": 1}, True),
        ({"kind": "top_k", "k": 3, "ids": "packed", "tail": "renormalise"}, {"output": "topk", "k": 2}, True),
        ({"kind": "top_k", "k": 3}, {"output": "topk", "k": 4}, False),
        ({"kind": "top_k", "k": 3}, {"output": "topk", "k": 3, "temperature": 2}, False),
        ({"kind": "top_k", "k": 3}, {"output": "logprobs"}, False),
        ({"kind": "top_k", "k": 3}, {"output": "logits"}, False),
        ({"kind": "sampled_k", "k": 3}, {"output": "topk", "k": 1}, False),
        ({"kind": "dense_u8"}, {"output": "probs", "temperature": 4}, True),
        ({"kind": "dense_bf16"}, {"output": "logits"}, True),
    ],
)
def test_a_cache_answers_what_its_encoding_knows_and_no_more(
    folder: Path, stored: torch.Tensor, serve: Serve, encoding: dict[str, Any], options: dict[str, Any], cached: bool
) -> None:
    name = "-".join(f"{value}" for value in encoding.values())
    spec = colour_spec(folder, name, fields={"logits": {"encoding": encoding}})
    if not Path(spec.cache).exists():
        tc.build(spec, executor="serial")
    server = serve(spec)
    found = server.client.predict_named(KEYS, 1, **options)
    assert told(found.status) == {Status.CACHED if cached else Status.COMPUTED}
    assert found.values is not None
    exact = log_probs(stored[1], options.get("temperature", 1.0))
    if options["output"] == "topk":
        expected = top_k(exact, options["k"])
        close = {"atol": 0.05 if encoding.get("values") == "u8" else 2e-3, "rtol": 0}
        assert torch.equal(found.indices, expected["indices"])  # type: ignore[arg-type]
        torch.testing.assert_close(found.values, expected["values"], **close)
        torch.testing.assert_close(found.tail_logmass, expected["tail_logmass"], atol=0.05, rtol=0)
    elif options["output"] == "logits":
        torch.testing.assert_close(found.values, stored[1], atol=0, rtol=2**-8)
    else:
        whole = exact.exp() if options["output"] == "probs" else exact
        torch.testing.assert_close(found.values, whole, atol=0.05, rtol=0)


def test_another_teachers_answers_are_not_this_ones(tmp_path: Path, folder: Path, serve: Serve) -> None:
    spec = colour_spec(folder, "unused").model_copy(update={"cache": str(tmp_path / "cache")})
    changed = spec.teacher.model_copy(update={"name": "other", "channels_last": True})
    tc.build(spec.model_copy(update={"teacher": changed}), executor="serial")
    server = serve(spec)
    assert told(server.client.predict_named([KEYS[0]]).status) == {Status.COMPUTED}
    assert server.client.card().dataset is not None
    assert server.client.card().dataset.encodings == {}  # type: ignore[union-attr]


def test_a_cache_of_other_views_or_samples_is_refused_when_the_service_starts(tmp_path: Path, folder: Path) -> None:
    spec = colour_spec(folder, "local")
    seeded = spec.model_copy(update={"views": spec.views.model_copy(update={"seed": 99})})
    with pytest.raises(MismatchError, match=r"the configuration's views.*from_cache=false"):
        open_served(seeded)
    assert open_served(seeded, from_cache=False).library is not None
    other = colour_spec(tmp_path, "unused")
    images = np.load(tmp_path / "images.npy")
    np.save(tmp_path / "images.npy", images[:15])
    with pytest.raises(MismatchError, match="first samples"):
        open_served(other.model_copy(update={"cache": spec.cache}))


# ---------------------------------------------------------------- what the cache has


def test_a_lookup_tells_what_a_question_would_meet(folder: Path, serve: Serve) -> None:
    server = serve(colour_spec(folder, "local"))
    assert server.client.lookup([KEYS[0], "nobody", KEYS[3]], [0, 0, 5]) == ("cached", "unknown", "computable")
    digests = [f"{int(digest):016x}" for digest in tc.open(folder / "local").digests(0, [0, 1])]
    answer = server.post(
        {"keys": [KEYS[0], KEYS[1], KEYS[2]], "views": [0, 0, 9], "digests": [*reversed(digests), "0" * 16]}, "lookup"
    )
    assert answer.json()["status"] == ["differs", "differs", "differs"]
    assert not server.teacher.asked
    assert server.post({"keys": [KEYS[0]]}, "lookup", output="topk", k=2).json()["status"] == ["cached"]
    card = server.client.card().dataset
    assert card is not None
    assert (card.name, card.samples, card.cached_views) == ("numpy", ROWS, VIEWS)
    assert card.encodings == {"logits": "dense_f32", "feature:relu": "dense_f16"}


BAD = {
    "no JSON": b"{",
    "bad UTF-8": b'{"keys": ["\xff"]}',
    "a lone surrogate": b'{"keys": ["\\ud800"]}',
    "no key": b'{"keys": []}',
    "an empty key": b'{"keys": [""]}',
    "a list": b"[]",
    "keys that are numbers": b'{"keys": [1]}',
    "a key twice": b'{"keys": ["1"], "keys": ["2"]}',
    "an unknown member": b'{"keys": ["1"], "images": []}',
    "a negative view": b'{"keys": ["1"], "views": -1}',
    "a view of 2^32": b'{"keys": ["1"], "views": 4294967296}',
    "a fraction of a view": b'{"keys": ["1"], "views": 0.5}',
    "a view that is true": b'{"keys": ["1"], "views": true}',
    "NaN": b'{"keys": ["1"], "views": NaN}',
    "too few views": b'{"keys": ["1", "2"], "views": [0]}',
    "too few digests": b'{"keys": ["1", "2"], "digests": ["0000000000000000"]}',
    "a digest of letters": b'{"keys": ["1"], "digests": ["zzzzzzzzzzzzzzzz"]}',
    "nested": b'{"keys": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of a million digits": b'{"keys": ["1"], "views": ' + b"9" * 10**6 + b"}",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["predict", "lookup"])
def test_a_question_that_is_none_is_refused(computing: Server, name: str, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = computing.http.post(f"/v1/teachers/colour/{path}", content=BAD[name], headers=headers)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


# ---------------------------------------------------------------- the image that breaks the teacher


@pytest.mark.parametrize("bad", [[3], [0, 7], list(range(8))], ids=["one", "first and last", "all"])
def test_the_neighbours_of_an_image_that_breaks_the_teacher_are_answered(bad: list[int]) -> None:
    teacher = open_gate(ToyTeacher())
    images = toy_views(11)
    images[bad, 0, 0, 0] = POISON
    app = create_app({"toy": toy_served(teacher)}, Settings())
    with running(app) as base, TeacherClient(f"{base}/toy") as client:
        wait_until(lambda: app.state.service.not_ready() == [])
        found = client.predict(images, strict=False)
        good = [row for row in range(11) if row not in bad]
        assert [row for row, one in enumerate(found.status) if one is Status.FAILED] == bad
        assert found.values is not None
        assert torch.equal(found.values[good], toy_logits(images)[good])
        assert found.values[bad].isnan().all()
        assert len(teacher.batches) <= 2 * 32
        with pytest.raises(ServiceError, match="must answer these images"):
            client.predict(images)
        with pytest.raises(ServiceError, match="must answer these images"):
            client.predict(images[bad[:1]], strict=False)


# ---------------------------------------------------------------- a service that has no data set


def test_a_teacher_without_a_data_set_takes_no_names() -> None:
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings())
    with running(app) as base, httpx.Client(base_url=base) as client:
        wait_until(lambda: app.state.service.not_ready() == [])
        for path in ("predict", "lookup"):
            answer = client.post(f"/v1/teachers/toy/{path}", json={"keys": ["0"]})
            assert answer.status_code == 415


def test_a_library_is_asked_in_one_thread_only(folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    real = Library.rows_of

    def rows_of(self: Library, keys: Sequence[str]) -> Any:
        seen.add(threading.current_thread().name)
        return real(self, keys)

    monkeypatch.setattr(Library, "rows_of", rows_of)
    server = serve(colour_spec(folder, "local"))
    for _ in range(8):
        server.client.predict_named([KEYS[1]])
    assert len(seen) == 1
    assert next(iter(seen)).startswith("reader-colour")


def test_a_cache_that_is_not_what_was_built_is_no_answer(folder: Path, tmp_path: Path, serve: Serve) -> None:
    spec = colour_spec(folder, "unused").model_copy(update={"cache": str(tmp_path / "cache")})
    tc.build(spec, executor="serial")
    server = serve(spec)
    for file in (tmp_path / "cache" / "data" / "teachers").rglob("*"):
        if file.is_file() and file.suffix != ".json":
            data = bytearray(file.read_bytes())
            data[7] ^= 1
            file.write_bytes(data)
    answer = server.post({"keys": [KEYS[0]]})
    assert answer.status_code == 503, answer.text
    assert answer.json()["field"] == "cache"
    assert answer.headers["retry-after"] == "30"
    assert str(tmp_path) not in answer.text
    other = server.client.predict(toy_views(1), cache="bypass")
    assert other.status == (Status.COMPUTED,)
    assert server.http.get("/readyz").status_code == 200, "it can be opened, and much of it may be sound"


# ---------------------------------------------------------------- forms


def test_named_classes_and_the_log_sum_exp_come_from_the_cache(
    folder: Path, stored: torch.Tensor, serve: Serve
) -> None:
    server = serve(colour_spec(folder, "local"))
    server.teacher.refuse = True
    classes, expected = [[6, 0, 0], [1, 2, 3]], stored[[0, 1], [20, 3]]
    asked = {"keys": [KEYS[20], KEYS[3]], "views": [0, 1]}
    found = server.client.predict_named(
        **asked, output="gather", classes=classes, temperature=2.5, lse=True, dtype="f16"
    )
    assert found.values is not None
    assert found.lse is not None
    assert torch.equal(found.values, log_probs(expected, 2.5).gather(1, torch.tensor(classes)).half())
    assert torch.equal(found.lse, expected.logsumexp(1).half())
    assert told(found.status) == {Status.CACHED}
    shown = server.post({**asked, "keys": [KEYS[20], "nobody"], "classes": classes}, output="gather").json()
    assert (shown["values"][1], shown["indices"]) == (None, [[6, 0, 0], None])
    assert server.post({**asked, "classes": classes}, "lookup", output="gather").json()["status"] == ["cached"] * 2
    for body in ({**asked, "classes": [[7]] * 2}, {**asked, "classes": [[0]]}, asked, {**asked, "classes": [[]] * 2}):
        for path in ("predict", "lookup"):
            answer = server.post(body, path, output="gather")
            assert (answer.status_code, answer.json()["field"]) == (422, "classes"), answer.text
    whole = server.post({**asked, "views": 1, "whole": True}, output="gather")
    assert whole.status_code == 422


def test_what_a_sparse_cache_keeps_is_neither_gathered_nor_summed(
    tmp_path: Path, folder: Path, stored: torch.Tensor, serve: Serve
) -> None:
    spec = colour_spec(folder, "sparse", fields={"logits": {"encoding": {"kind": "top_k", "k": 3}}})
    spec = spec.model_copy(update={"cache": str(tmp_path / "sparse")})
    tc.build(spec, executor="serial")
    server = serve(spec)
    assert server.client.predict_named([KEYS[0]], 0, output="topk", k=3).status == (Status.CACHED,)
    summed = server.client.predict_named([KEYS[0]], 0, output="topk", k=3, lse=True)
    gathered = server.client.predict_named([KEYS[0]], 0, output="gather", classes=[[4]])
    assert summed.status == gathered.status == (Status.COMPUTED,)
    assert summed.lse is not None
    assert gathered.values is not None
    assert torch.equal(summed.lse, stored[0, :1].logsumexp(1))
    assert torch.equal(gathered.values, log_probs(stored[0, :1], 1.0)[:, [4]])


def test_what_stands_for_a_broken_file_is_not_looked_for(tmp_path: Path, serve: Serve) -> None:
    """It is black, and here the cache has a black image."""
    np.save(tmp_path / "images.npy", np.zeros((21, 10, 10, 3), np.uint8))
    spec = colour_spec(tmp_path, "black")
    tc.build(spec, executor="serial")
    server = serve(spec)
    for name, pixels in (("black.png", 0), ("grey.png", 90)):
        Image.fromarray(np.full((8, 8, 3), pixels, np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"")
    paths = [tmp_path / name for name in ("broken.png", "black.png", "grey.png")]
    found = server.client.predict_files(paths, strict=False)
    assert found.status == (Status.BROKEN, Status.CACHED, Status.COMPUTED)


def test_json_is_bounded_more_tightly_than_tensors(folder: Path, serve: Serve) -> None:
    server = serve(colour_spec(folder, "local"), max_body_bytes=800)
    assert server.post({"keys": [KEYS[0]]}).status_code == 200
    for path in ("predict", "lookup"):
        answer = server.post({"keys": ["k" * 100]}, path)
        assert (answer.status_code, answer.json()["field"], answer.json()["rule"]) == (
            413,
            "body",
            "must be at most 100 bytes where it is JSON",
        )
