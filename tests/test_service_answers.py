"""What holds of answers from the cache, of the journal, and of questions by name, whatever changes meanwhile."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from test_abandon import stop_after
from test_service_cache import KEYS, MICRO_BATCH, Serve, folder, serve, told, values
from test_service_journal import elsewhere
from toy_service_models import CLASSES, ColourNet, colour_spec, running, wait_until

import teacher_cache as tc
from services import keys as key_store
from services import predicting
from services.app import create_app
from services.journal_file import NAME
from services.library import Library
from services.policy import Policy
from services.settings import Settings
from services.state_folder import StateFolder
from services.status import Status
from services.teachers import ServedTeacher, open_served
from services.wire import MEDIA_TYPE, pack_images
from services.work import QueueFull
from teacher_cache.spec import BuildSpec, parse
from teacher_cache.views.digest import as_unsigned, pixel_digests

__all__ = ["folder", "serve"]

PREDICT, LOOKUP = "/v1/teachers/colour/predict", "/v1/teachers/colour/lookup"


class SizeNet(ColourNet):
    """Its last bits depend on the size of the batch, and here all can see it."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return super().forward(images_BCHW) + len(images_BCHW)


class WhiteFails(ColourNet):
    """Raises on a batch in which an image is white."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if images_BCHW[:, :, 2:6, 2:6].flatten(1).min(1).values.ge(1).any():
            raise ArithmeticError("white")
        return super().forward(images_BCHW)


class FourFit(ColourNet):
    """Memory is enough for four images."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if len(images_BCHW) > 4:
            raise torch.OutOfMemoryError
        return super().forward(images_BCHW)


@contextmanager
def limited(state: Path, policy: Policy, served: ServedTeacher, *more: ServedTeacher) -> Iterator[httpx.Client]:
    """A service of some teachers, and a client with a key of that policy."""
    key = key_store.add(StateFolder(state), "someone", policy)
    app = create_app({one.name: one for one in (served, *more)}, Settings(state=state))
    headers = {"Authorization": f"Bearer {key}"}
    with running(app) as base, httpx.Client(base_url=base, headers=headers, timeout=20) as client:
        wait_until(lambda: app.state.service.not_ready() == [])
        yield client


def shards_of(cache: Path | str, part: str) -> list[Path]:
    """The files of a field's shards."""
    return [
        path for path in sorted(Path(cache).rglob("*")) if path.is_file() and part in str(path) and "/c/" in str(path)
    ]


def damage(path: Path) -> bytes:
    """Changes one byte in a copy that takes the file's place; gives what was there."""
    data = path.read_bytes()
    place(path, data[:5] + bytes([data[5] ^ 1]) + data[6:])
    return data


def place(path: Path, data: bytes) -> None:
    """Replaces a file as a build or a repair does."""
    other = path.with_name(path.name + ".new")
    other.write_bytes(data)
    other.replace(path)


def fresh(tmp_path: Path, folder: Path, **teacher: Any) -> BuildSpec:
    """A built cache of its own."""
    spec = colour_spec(folder, "unused", **teacher).model_copy(update={"cache": str(tmp_path / "cache")})
    tc.build(spec, executor="serial")
    return spec


# ---------------------------------------------------------------- wrong answers


def test_an_answer_computed_in_other_micro_batches_is_not_adopted_by_a_build(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    """A service of micro-batches of 16 answers 8 images that are sent; a build asks in micro-batches of 8."""
    spec = colour_spec(folder, "unused", model="test_service_answers:SizeNet")
    plain = elsewhere(spec, tmp_path / "plain")
    tc.build(plain, executor="serial")
    server = serve(elsewhere(spec, tmp_path / "x", micro_batch=16), journal=tmp_path / "journal")
    views = tc.open(plain.cache).render(view=0, rows=range(8))
    server.client.predict(views, fields=["logits", "feature:relu"])
    tc.build(elsewhere(spec, tmp_path / "cache", journal=str(tmp_path / "journal")), executor="serial")
    assert torch.equal(values(tc.open(tmp_path / "cache"), 0), values(tc.open(plain.cache), 0))


def test_an_answer_computed_in_other_micro_batches_is_not_a_kept_one(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    """The same journal, and a micro-batch that was changed between two runs of the service."""
    spec = colour_spec(folder, "unused", model="test_service_answers:SizeNet")
    views = torch.randint(1, 99, (8, 3, 8, 8), dtype=torch.uint8)
    serve(elsewhere(spec, tmp_path / "x", micro_batch=16), journal=tmp_path / "journal").client.predict(views)
    assert told(serve(spec, journal=tmp_path / "journal").client.predict(views).status) == {Status.COMPUTED}


def test_a_feature_that_the_cache_pools_otherwise_is_not_the_served_one(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    whole = {"logits": {"encoding": "dense_f32"}, "feature:relu": {"pool": "none"}}
    spec = fresh(tmp_path, folder, fields=whole)
    server = serve(elsewhere(colour_spec(folder, "unused"), Path(spec.cache)))
    found = server.client.predict_named(KEYS[:2], fields=["feature:relu"]).features["feature:relu"]
    assert tuple(found.shape) == (2, *server.client.card().fields["feature:relu"].shape)


def test_a_kept_feature_that_is_pooled_otherwise_is_not_the_served_one(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    whole = {"logits": {"encoding": "dense_f32"}, "feature:relu": {"pool": "none"}}
    for spec in (colour_spec(folder, "unused", fields=whole), colour_spec(folder, "unused")):
        client = serve(spec, journal=tmp_path / "journal").client
        found = client.predict_named(KEYS[:2], fields=["feature:relu"]).features["feature:relu"]
        assert tuple(found.shape) == (2, *client.card().fields["feature:relu"].shape)


def test_a_kept_feature_that_is_pooled_otherwise_ends_no_build(folder: Path, tmp_path: Path, serve: Serve) -> None:
    whole = {"logits": {"encoding": "dense_f32"}, "feature:relu": {"pool": "none"}}
    server = serve(colour_spec(folder, "unused", fields=whole), journal=tmp_path / "journal")
    server.client.predict_named(KEYS[:8], fields=["logits", "feature:relu"])
    spec = elsewhere(colour_spec(folder, "unused"), tmp_path / "cache", journal=str(tmp_path / "journal"))
    tc.build(spec, executor="serial")
    assert torch.equal(values(tc.open(tmp_path / "cache"), 0), values(tc.open(folder / "local"), 0))


def test_a_rounded_key_learns_no_more_from_the_cache_and_the_model_together(folder: Path, tmp_path: Path) -> None:
    """Rounded twice, of what an encoding has moved and of what it has not, a value tells where it lies between."""
    served = open_served(fresh(tmp_path, folder, fields={"logits": {"encoding": "dense_u8"}}))
    with limited(tmp_path / "state", Policy(rounding=0.2), served) as client:
        seen = [
            client.post(PREDICT, json={"keys": KEYS}, params={"cache": use}).json()["values"]
            for use in ("prefer", "bypass")
        ]
        assert seen[0] == seen[1]


def test_a_whole_micro_batch_of_a_cache_is_one_of_its_own_shards(folder: Path, tmp_path: Path, serve: Serve) -> None:
    """Rows 8 to 15 are no micro-batch of a cache in shards of 10, whatever the service's configuration says."""
    spec = fresh(tmp_path, folder, fields={"logits": {"encoding": "dense_f32"}})
    store = spec.store.model_copy(update={"shard_rows": 20})
    server = serve(spec.model_copy(update={"store": store}))
    answer = server.post({"keys": KEYS[8:16], "whole": True}).json()
    assert set(answer["status"]) == {"computed"}


def test_a_build_with_the_inputs_of_the_head_adopts_or_asks(folder: Path, tmp_path: Path, serve: Serve) -> None:
    fields = {"logits": {"encoding": "feature_head"}}
    plain, spec = tmp_path / "plain", colour_spec(folder, "unused", fields=fields)
    tc.build(elsewhere(spec, plain), executor="serial")
    server = serve(spec, journal=tmp_path / "journal")
    server.client.predict_named(KEYS[:8])
    tc.build(elsewhere(spec, tmp_path / "cache", journal=str(tmp_path / "journal")), executor="serial")
    assert torch.equal(values(tc.open(tmp_path / "cache"), 0), values(tc.open(plain), 0))


def test_an_image_is_answered_beside_one_that_breaks_the_teacher_and_was_not_asked_about(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    images = np.load(folder / "images.npy") // 2
    images[3] = 255
    spec = colour_spec(tmp_path, "unused", model="test_service_answers:WhiteFails")
    np.save(tmp_path / "images.npy", images)
    server = serve(spec, from_cache=False)
    for keys in ([KEYS[0], KEYS[1]], [KEYS[0]]):
        answer = server.post({"keys": keys})
        assert answer.json().get("status") == ["computed"] * len(keys), (keys, answer.text)


def test_a_service_runs_in_the_micro_batches_that_fitted_the_build(tmp_path: Path, folder: Path) -> None:
    spec = colour_spec(folder, "unused", model="test_service_answers:FourFit")
    compute = spec.compute.model_copy(update={"on_oom": "halve"})
    spec = spec.model_copy(update={"cache": str(tmp_path / "cache"), "compute": compute})
    tc.build(spec, executor="serial")
    assert open_served(spec).micro_batch == 4


# ---------------------------------------------------------------- a cache that changes while it is served


def test_a_build_that_seals_between_two_looks_breaks_no_question(folder: Path, tmp_path: Path, serve: Serve) -> None:
    spec = colour_spec(folder, "unused").model_copy(update={"cache": str(tmp_path / "cache")})
    with pytest.raises(KeyboardInterrupt):
        tc.build(spec, executor="serial", progress=stop_after(20))
    server = serve(spec)
    assert server.post({"keys": [KEYS[0]]}).status_code == 200
    tc.build(spec, executor="serial")
    for key in (KEYS[0], KEYS[15], KEYS[20]):
        answer = server.post({"keys": [key], "views": 0})
        assert answer.status_code == 200, answer.text


def test_what_was_built_after_the_first_question_by_image_is_found_by_its_pixels(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    spec = colour_spec(folder, "unused").model_copy(update={"cache": str(tmp_path / "cache")})
    with pytest.raises(KeyboardInterrupt):
        tc.build(spec, executor="serial", progress=stop_after(20))
    server = serve(spec)
    library = server.served.library
    assert library is not None
    images = tc.open(folder / "local").render(view=1, rows=[20])
    server.client.predict(images)
    tc.build(spec, executor="serial")
    # The reader takes the new manifest in by itself, as it does where a receipt has become a table.
    library.cache.shards()
    library._looked = -1e9
    assert told(server.client.predict(images).status) == {Status.CACHED}


def test_a_damaged_shard_is_a_problem_that_says_so(folder: Path, tmp_path: Path, serve: Serve) -> None:
    spec = fresh(tmp_path, folder, fields={"logits": {"encoding": "dense_f32"}})
    for path in shards_of(spec.cache, "logits"):
        damage(path)
    answer = serve(spec).post({"keys": [KEYS[0]]})
    assert answer.json()["field"] == "cache", answer.text


def test_a_shard_that_is_mended_is_read_again_without_a_restart(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.library._LOOK_SECONDS", 0.0)
    spec = fresh(tmp_path, folder, fields={"logits": {"encoding": "dense_f32"}})
    files = shards_of(spec.cache, "logits")
    for path in files:
        damage(path)
    server = serve(spec)
    server.post({"keys": [KEYS[0]]})
    tc.repair(spec.cache)
    assert tc.verify(spec.cache).ok
    assert server.post({"keys": [KEYS[0]]}).json().get("status") == ["cached"]


@pytest.mark.parametrize("told_by", ["an answer", "readyz"])
def test_a_cache_that_cannot_be_opened_any_more_is_told(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    monkeypatch.setattr("services.library._LOOK_SECONDS", 0.0)
    spec = fresh(tmp_path, folder)
    server = serve(spec)
    (Path(spec.cache) / "manifest.json").write_bytes(b"{}")
    answer = server.post({"keys": [KEYS[0]]})
    if told_by == "an answer":
        assert answer.json()["field"] == "cache", answer.text
    else:
        assert server.http.get("/readyz").status_code == 503


def test_a_service_whose_cache_is_mended_is_ready_before_anybody_asks(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is not ready nobody is sent here whose question could show that it is."""
    monkeypatch.setattr("services.library._LOOK_SECONDS", 0.0)
    spec = fresh(tmp_path, folder)
    server, manifest = serve(spec), Path(spec.cache) / "manifest.json"
    data = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    server.post({"keys": [KEYS[0]]})
    assert server.http.get("/readyz").status_code == 503
    manifest.write_bytes(data)
    wait_until(lambda: server.http.get("/readyz").status_code == 200, 8)


def test_a_sample_that_has_changed_leaves_its_neighbours_their_answers(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    spec = colour_spec(tmp_path, "cache")
    tc.build(spec, executor="serial")
    images = np.load(tmp_path / "images.npy")
    images[3] ^= 1
    server_images = tmp_path / "images.npy"
    np.save(server_images, images)
    server = serve(spec)
    answer = server.post({"keys": [KEYS[0], KEYS[10]], "views": 5})
    # What lies in another micro-batch has nothing to do with it; nor is the whole service out of order.
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"][-1] == "computed"
    assert server.http.get("/readyz").status_code == 200


def test_the_card_tells_of_a_cache_that_was_built_meanwhile(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.library._LOOK_SECONDS", 0.0)
    spec = colour_spec(folder, "unused").model_copy(update={"cache": str(tmp_path / "cache")})
    server = serve(spec)
    tc.build(spec, executor="serial")
    card = server.client.card().dataset
    assert card is not None
    assert card.cached_views == 2


def test_a_library_is_looked_at_in_its_own_thread_for_the_card_too(
    folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    real = Library.card

    def card(self: Library) -> Any:
        seen.add(threading.current_thread().name.rpartition("_")[0])
        return real(self)

    monkeypatch.setattr(Library, "card", card)
    serve(colour_spec(folder, "local")).client.card()
    assert seen == {"reader-colour"}


# ---------------------------------------------------------------- what a key may know


def test_a_second_encoding_of_the_logits_is_no_feature(folder: Path, tmp_path: Path) -> None:
    fields = {"logits": {"encoding": "dense_f32"}, "logits@small": {"encoding": {"kind": "top_k", "k": 3}}}
    served = open_served(colour_spec(folder, "unused", fields=fields))
    policy = Policy(outputs=("topk", "features"), largest_k=1)
    with limited(tmp_path, policy, served) as client:
        headers = {"Accept": "application/safetensors"}
        options = {"fields": "logits@small"}
        answer = client.post(PREDICT, json={"keys": [KEYS[0]]}, params=options, headers=headers)
        assert answer.status_code in (400, 403), "raw logits left as a feature"


def test_names_of_two_data_sets_are_two_distinct_images(folder: Path, tmp_path: Path) -> None:
    one = open_served(colour_spec(folder, "unused"))
    other = open_served(colour_spec(tmp_path / "others", "unused", name="second", channels_last=True))
    images = np.load(tmp_path / "others" / "images.npy")
    np.save(tmp_path / "others" / "images.npy", images[::-1].copy())
    with limited(tmp_path / "state", Policy(distinct_images=1), one, other) as client:
        assert client.post(PREDICT, json={"keys": [KEYS[0]]}).status_code == 200
        second = client.post("/v1/teachers/second/predict", json={"keys": [KEYS[0]]})
        assert (second.status_code, second.json().get("field")) == (403, "distinct_images")


def test_the_card_names_no_data_set_and_no_field_that_the_key_may_not_ask(folder: Path, tmp_path: Path) -> None:
    served = open_served(colour_spec(folder, "local"))
    with limited(tmp_path, Policy(datasets=(), outputs=("topk",)), served) as client:
        assert client.get("/v1/teachers/colour").json()["dataset"] is None
    with limited(tmp_path / "two", Policy(outputs=("topk",)), served) as client:
        assert set(client.get("/v1/teachers/colour").json()["dataset"]["encodings"]) == {"logits"}


def test_items_without_an_answer_cost_nothing(folder: Path, tmp_path: Path) -> None:
    served = open_served(colour_spec(folder, "local"))
    with limited(tmp_path, Policy(images_per_day=9, distinct_images=9), served) as client:
        assert client.post(PREDICT, json={"keys": [KEYS[0], "nobody", "none"]}).json()["status"][0] == "cached"
        usage = client.get("/v1/usage").json()
        assert (usage["images"], usage["distinct_images"]) == (1, 1)


# ---------------------------------------------------------------- robustness


def test_a_journal_that_another_process_holds_keeps_no_kept_answer_back(
    folder: Path, tmp_path: Path, serve: Serve
) -> None:
    server = serve(colour_spec(folder, "unused"), journal=tmp_path / "journal")
    server.client.predict_named([KEYS[0]])
    holder = sqlite3.connect(tmp_path / "journal" / NAME, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    waiting = threading.Thread(target=lambda: server.http.post(PREDICT, json={"keys": [KEYS[10]]}))
    try:
        waiting.start()
        wait_until(lambda: len(server.teacher.asked) == 2)
        answer = httpx.post(f"{str(server.http.base_url).rstrip('/')}{PREDICT}", json={"keys": [KEYS[0]]}, timeout=4)
    finally:
        holder.execute("ROLLBACK")
        holder.close()
        waiting.join()
    assert answer.json()["status"] == ["kept"]


def test_a_journal_that_cannot_be_read_is_a_problem_that_says_so(folder: Path, tmp_path: Path, serve: Serve) -> None:
    server = serve(colour_spec(folder, "unused"), journal=tmp_path / "journal")
    database = sqlite3.connect(tmp_path / "journal" / NAME)
    with database:
        database.execute("DROP TABLE answers")
    database.close()
    answer = server.post({"keys": [KEYS[0]]})
    assert (answer.status_code, answer.json()["field"]) == (503, "journal")


def test_the_event_loop_parses_no_body(folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = predicting.parse_named

    def parse(data: bytes, most: int) -> Any:
        seen.append(threading.current_thread() is loop_thread[0])
        return real(data, most)

    real_body = predicting.read_body

    async def read_body(*given: Any) -> bytes:
        loop_thread.append(threading.current_thread())
        return await real_body(*given)

    loop_thread: list[threading.Thread] = []
    monkeypatch.setattr("services.predicting.read_body", read_body)
    monkeypatch.setattr("services.predicting.parse_named", parse)
    server = serve(colour_spec(folder, "local"))
    server.post({"keys": [KEYS[0]]})
    server.post({"keys": [KEYS[0]]}, "lookup")
    assert seen == [False, False]


def test_images_that_no_cache_is_asked_about_do_not_wait_for_its_reader(
    folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, gate, entered = serve(colour_spec(folder, "local")), threading.Event(), threading.Event()

    def stuck(*_: object) -> Any:
        entered.set()
        assert gate.wait(20)
        return ()

    monkeypatch.setattr("services.predicting.look_up", lambda *_, **__: stuck())
    waiting = threading.Thread(target=lambda: server.post({"keys": [KEYS[0]]}, "lookup"))
    waiting.start()
    try:
        assert entered.wait(20)
        body = pack_images(torch.randint(1, 99, (1, 3, 8, 8), dtype=torch.uint8))
        headers = {"Content-Type": MEDIA_TYPE, "Accept": "application/json"}
        url = f"{str(server.http.base_url).rstrip('/')}{PREDICT}"
        answer = httpx.post(url, content=body, params={"cache": "bypass"}, headers=headers, timeout=4)
    finally:
        gate.set()
        waiting.join()
    assert answer.json()["status"] == ["computed"]


def test_a_full_queue_keeps_no_cached_answer_back(folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(colour_spec(folder, "local"))

    def full(_self: object, images: int) -> None:
        if images:
            raise QueueFull(1)

    monkeypatch.setattr("services.batching.Batcher.require_room", full)
    answer = server.post({"keys": [KEYS[0]]})
    assert answer.json().get("status") == ["cached"], answer.text


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("options", [{"cache": "bypass"}, {"cache": "refresh"}, {"strict": "true"}])
def test_a_lookup_refuses_options_that_have_no_effect_on_it(
    folder: Path, serve: Serve, options: dict[str, str]
) -> None:
    server = serve(colour_spec(folder, "local"))
    answer = server.post({"keys": [KEYS[0], "nobody"]}, "lookup", **options)
    assert answer.status_code == 400 or answer.json()["status"][0] == "computable", answer.text


def test_a_lookup_has_a_deadline(folder: Path, serve: Serve) -> None:
    server = serve(colour_spec(folder, "local"))
    answer = server.http.post(LOOKUP, json={"keys": [KEYS[0]]}, headers={"X-Deadline-Ms": "nonsense"})
    assert answer.status_code == 400, answer.text


def test_a_lookup_tells_what_the_journal_has(folder: Path, tmp_path: Path, serve: Serve) -> None:
    server = serve(colour_spec(folder, "unused"), journal=tmp_path / "journal")
    server.client.predict_named([KEYS[0]])
    assert server.client.predict_named([KEYS[0]], cache="only").status == (Status.KEPT,)
    assert server.client.lookup([KEYS[0]]) == ("kept",)


def test_what_computes_nothing_is_not_refused_for_its_micro_batches(folder: Path, serve: Serve) -> None:
    server = serve(colour_spec(folder, "local"), max_images=2 * MICRO_BATCH)
    keys, views = [KEYS[0], KEYS[8], KEYS[10], KEYS[0]], [7, 7, 7, 0]
    answer = server.post({"keys": keys, "views": views}, cache="only")
    assert answer.json().get("status") == ["absent", "absent", "absent", "cached"], answer.text


def test_an_encoding_is_told_only_where_something_of_it_was_read(folder: Path, serve: Serve) -> None:
    server = serve(colour_spec(folder, "local"))
    library = server.served.library
    assert library is not None
    views_BCHW = library.render(5, [1], server.served.view_shape).views_BCHW
    good = f"{int(as_unsigned(pixel_digests(views_BCHW))[0]):016x}"
    found = server.post({"keys": KEYS[:2], "views": [0, 5], "digests": ["0" * 16, good]}).json()
    assert found["status"] == ["differs", "computed"]
    assert found["encodings"] == {}


def test_a_whole_micro_batch_with_a_stranger_names_the_stranger(folder: Path, serve: Serve) -> None:
    server = serve(colour_spec(folder, "local"), from_cache=False)
    answer = server.post({"keys": [KEYS[0], "nobody"], "whole": True})
    assert answer.status_code == 404
    assert answer.json()["value"] == "item 1 is unknown"


# ---------------------------------------------------------------- what holds, and no other test sees


def mixed(folder: Path, cache: Path, count: int) -> BuildSpec:
    """A recipe whose views depend on which samples there were."""
    spec = colour_spec(folder, "unused")
    views = {**spec.views.model_dump(), "recipe": [{"pad_crop": {"size": 8, "padding": 1}}, {"mixup": {}}]}
    return parse(BuildSpec, spec.model_dump() | {"cache": str(cache), "views": {**views, "count": count}}, "test")


def test_a_grown_data_set_is_answered_as_a_build_that_grows_would(tmp_path: Path, serve: Serve) -> None:
    colour_spec(tmp_path, "unused")
    images = np.load(tmp_path / "images.npy")
    for name in ("cache", "grown"):
        np.save(tmp_path / "images.npy", images[:15])
        tc.build(mixed(tmp_path, tmp_path / name, 1), executor="serial")
    np.save(tmp_path / "images.npy", images)
    tc.build(mixed(tmp_path, tmp_path / "grown", 3), executor="serial")
    server = serve(mixed(tmp_path, tmp_path / "cache", 3))
    grown = tc.open(tmp_path / "grown")
    for view in range(3):
        found = server.client.predict_named(KEYS, view)
        assert found.values is not None
        assert torch.equal(found.values, values(grown, view)), view
        assert found.status.count(Status.CACHED) == (15 if view == 0 else 0)


def test_a_sealed_cache_that_grows_is_looked_at_again(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.library._LOOK_SECONDS", 0.0)
    spec = fresh(tmp_path, folder)
    server = serve(spec)
    longer = spec.model_copy(update={"views": spec.views.model_copy(update={"count": 3})})
    images = tc.open(spec.cache).render(view=1, rows=[4])
    assert server.client.predict(images).status == (Status.CACHED,)
    tc.build(longer, executor="serial")
    assert server.client.predict_named(KEYS, 2, cache="only").status == (Status.CACHED,) * len(KEYS)
    images = tc.open(spec.cache).render(view=2, rows=[4])
    assert server.client.predict(images).status == (Status.CACHED,)


def test_a_broken_sample_that_was_mended_is_a_tombstone_still(tmp_path: Path, serve: Serve) -> None:
    """Its neighbours keep their places in the micro-batch, and so their bits."""
    pictures = tmp_path / "images" / "class 0"
    pictures.mkdir(parents=True)
    for number in range(10):
        Image.fromarray(np.full((10, 10, 3), number * 20, np.uint8)).save(pictures / f"{number}.png")
    plain, source = colour_spec(tmp_path / "x", "x"), {"kind": "folder", "path": str(tmp_path / "images")}
    for number in range(1, CLASSES):
        (tmp_path / "images" / f"class {number}").mkdir()
        Image.fromarray(np.full((10, 10, 3), number, np.uint8)).save(tmp_path / "images" / f"class {number}" / "a.png")
    spec = parse(BuildSpec, plain.model_dump() | {"cache": str(tmp_path / "cache"), "source": source}, "test")
    good = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(b"no picture")
    tc.build(spec, executor="serial")
    (pictures / "1.png").write_bytes(good)
    server = serve(spec)
    keys = [f"class 0/{number}.png" for number in range(3)]
    found = server.client.predict_named(keys, 5, strict=False)
    assert found.status == (Status.COMPUTED, Status.BROKEN, Status.COMPUTED)
    (asked,) = server.teacher.asked
    assert not asked[7:].any(), "the tombstone has no place among them"


def test_a_key_whose_answers_are_rounded_gets_no_other_ones_from_a_cached_top_k(tmp_path: Path, folder: Path) -> None:
    served = open_served(fresh(tmp_path, folder, fields={"logits": {"encoding": {"kind": "top_k", "k": 3}}}))
    with limited(tmp_path / "state", Policy(rounding=0.5), served) as client:
        answer = client.post(PREDICT, json={"keys": KEYS}, params={"output": "topk", "k": 2}).json()
    assert set(answer["status"]) == {"computed"}
    assert all(value % 0.5 == 0 for row in answer["values"] for value in row)


def test_bits_of_other_numerics_are_not_the_exact_ones(tmp_path: Path, folder: Path, serve: Serve) -> None:
    spec = fresh(tmp_path, folder, fields={"logits": {"encoding": "dense_f32"}})
    server = serve(spec.model_copy(update={"compute": spec.compute.model_copy(update={"threads": 2})}))
    assert set(server.post({"keys": KEYS[:8], "whole": True}).json()["status"]) == {"computed"}
    assert server.post({"keys": KEYS[:8]}).json()["status"] == ["cached"] * 8


def test_a_teacher_that_came_second_to_a_cache_is_answered_by_its_own_rows(tmp_path: Path, folder: Path) -> None:
    first = fresh(tmp_path, folder)
    second = elsewhere(first, Path(first.cache), name="other", model="test_service_answers:SizeNet")
    tc.build(second, executor="serial")
    cache = tc.open(first.cache)
    served = open_served(second)
    with limited(tmp_path / "state", Policy(), served) as client:
        answer = client.post("/v1/teachers/other/predict", json={"keys": KEYS}, params={"cache": "only"}).json()
    target = cache.read("other/logits", view=0, rows=range(len(KEYS)))
    assert isinstance(target, tc.DenseTarget)
    assert torch.equal(torch.tensor(answer["values"]), target.values)
    assert not torch.equal(target.values, values(cache, 0))
