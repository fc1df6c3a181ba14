"""The client's side: a teacher behind a URL is the local teacher, bit for bit, or it is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from starlette.types import Receive, Scope, Send
from toy_builds import addition_of
from toy_service_models import (
    ToyTeacher,
    colour_spec,
    open_gate,
    picture,
    running,
    toy_logits,
    toy_served,
    views,
    wait_until,
)

import teacher_cache as tc
from services.app import create_app
from services.client import TeacherClient, open_http_teacher
from services.policy import Policy
from services.settings import Settings
from services.teachers import open_served
from services.wire import pack_tensors
from teacher_cache.errors import ServiceError, TeacherCacheError, TeacherError
from teacher_cache.spec import NormalizeSpec, TeacherSpec
from teacher_cache.teachers import load_teacher

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data set, and the cache `local` that the local teacher built."""
    folder = tmp_path_factory.mktemp("colour")
    tc.build(colour_spec(folder, "local"), executor="serial")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A service of the same teacher, with a key."""
    served = open_served(colour_spec(folder, "unused"))
    app = create_app({"colour": served}, Settings(api_key=KEY))  # type: ignore[arg-type]
    with running(app) as base:
        wait_until(lambda: app.state.service.not_ready() == [])
        yield f"{base}/colour"


def remote(url: str, **changes: object) -> TeacherSpec:
    """The spec of the same teacher behind the URL."""
    fields = {"logits": {"encoding": "dense_f32"}, "feature:relu": {"pool": "mean"}}
    given = {"name": "colour", "model": url, "api_key": KEY, "micro_batch": 8, "fields": fields, **changes}
    return TeacherSpec.model_validate(given)


def payload(cache: Path) -> dict[str, str]:
    """Every file but the manifest, with the digest of its bytes."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---------------------------------------------------------------- the same bits


def test_a_cache_built_through_http_is_the_local_one_byte_for_byte(folder: Path, url: str) -> None:
    spec = colour_spec(folder, "http", model=url, api_key=KEY)
    tc.build(spec, executor="serial")
    ours, theirs = payload(folder / "http"), payload(folder / "local")
    assert any("relu" in name for name in theirs)
    assert any("logits" in name for name in theirs)
    assert ours == theirs
    manifests = [addition_of(folder / name) for name in ("http", "local")]
    assert manifests[0].identity == manifests[1].identity
    assert manifests[0].totals == manifests[1].totals
    stored = json.loads((folder / "http" / "manifest.json").read_text())
    assert KEY not in json.dumps(stored)


@pytest.mark.parametrize("encoding", ["dense_f32", "dense_f16"])
def test_served_logits_of_rendered_views_are_the_cached_ones(folder: Path, url: str, encoding: str) -> None:
    path = folder / encoding
    fields = {"logits": {"encoding": encoding}, "feature:relu": {"pool": "mean"}}
    tc.build(colour_spec(folder, encoding, fields=fields), executor="serial")
    cache = tc.open(path)
    with TeacherClient(url, KEY) as client:
        for view in range(cache.views):
            # As the build cut them: shards of 10 rows, micro-batches of 8 and a padded tail.
            for rows in ([*range(8)], [8, 9], [*range(10, 18)], [18, 19], [20]):
                stored = cache.read("logits", view=view, rows=rows)
                assert isinstance(stored, tc.DenseTarget)
                found = client.predict(cache.render(view=view, rows=rows)).values
                assert found is not None
                assert torch.equal(found.to(stored.values.dtype), stored.values)
                assert found.dtype == torch.float32


def test_it_has_the_local_teachers_fingerprint_and_answers_what_it_answers(folder: Path, url: str) -> None:
    theirs, ours = load_teacher(remote(url), None), load_teacher(colour_spec(folder, "unused").teacher, None)
    assert theirs.fingerprint == ours.fingerprint
    assert theirs.fields == ours.fields
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    local = ours(views(8))
    torch.set_num_threads(before)
    found = theirs(views(8))
    assert list(found) == list(local)
    for name, values in local.items():
        assert torch.equal(found[name], values)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weights": "w.pt"}, "teacher.weights"),
        ({"arguments": {"classes": 7}}, "teacher.arguments"),
        ({"normalize": {"mean": [0.5], "std": [0.5]}}, "teacher.normalize"),
        ({"micro_batch": 4}, "teacher.micro_batch"),
        ({"micro_batch": 64}, "teacher.micro_batch"),
        ({"precision": "bf16"}, "teacher.precision"),
        ({"channels_last": True}, "teacher.channels_last"),
        ({"class_names": ["cat", "dog"]}, "teacher.class_names"),
        ({"fields": {"feature:conv": {}}}, "teacher.fields.feature:conv"),
        ({"fields": {"feature:relu": {"pool": "none"}}}, "teacher.fields.feature:relu.pool"),
    ],
)
def test_what_the_service_does_otherwise_is_refused(url: str, changes: dict[str, object], field: str) -> None:
    with pytest.raises(TeacherError) as refused:
        open_http_teacher(remote(url, **changes))
    assert refused.value.field == field
    assert refused.value.hint


def test_a_micro_batch_that_is_only_a_default_must_be_right_too(url: str) -> None:
    with pytest.raises(TeacherError, match="must be the service's, 8"):
        open_http_teacher(TeacherSpec(model=url, api_key=KEY))


@pytest.mark.parametrize(
    ("field", "reason"), [("flow:conv,relu", "commas between them"), ("saliency@small", "requests bring no labels")]
)
def test_fields_that_no_request_can_ask_for_are_not_served(field: str, reason: str, folder: Path, url: str) -> None:
    with pytest.raises(TeacherError, match=rf"teacher\.fields\.{field}: cannot be served: .*{reason}"):
        open_served(colour_spec(folder, "unused", fields=["logits", field]))
    with pytest.raises(TeacherError, match=rf"{field}: must be offered by the service"):
        load_teacher(remote(url, fields=["logits", field]), None)


def test_the_recipes_normalisation_must_be_the_services() -> None:
    ours = NormalizeSpec(mean=(0.5,), std=(0.25,))
    served = replace(toy_served(open_gate(ToyTeacher())), normalize=ours)
    with running(create_app({"toy": served}, Settings())) as base:
        spec = TeacherSpec(model=f"{base}/toy", micro_batch=8)
        assert open_http_teacher(spec, ours).fingerprint == open_http_teacher(spec).fingerprint
        with pytest.raises(TeacherError, match="must be the service's") as refused:
            open_http_teacher(spec, NormalizeSpec(mean=(0.5,), std=(0.5,)))
        assert refused.value.field == "views.recipe.normalize"


def test_fewer_fields_and_equal_settings_are_taken(url: str) -> None:
    spec = remote(url, fields=["logits"], precision="fp32", class_names=[f"class {n}" for n in range(7)])
    teacher = open_http_teacher(spec)
    assert list(teacher(views(8))) == ["logits"]


@pytest.mark.parametrize("model", ["http://127.0.0.1:1", "http://127.0.0.1:1/", "http:///x", "http://a:b/x"])
def test_urls_without_a_teacher_are_refused(model: str) -> None:
    with pytest.raises(TeacherError, match="host:port"):
        open_http_teacher(remote(model))


def test_wrong_keys_names_and_ports_are_explained(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_API_KEY", raising=False)
    for key in (None, "wrong"):
        with pytest.raises(ServiceError, match=r"Authorization \(HTTP 401") as refused:
            open_http_teacher(remote(url, api_key=key))
        assert "wrong" not in str(refused.value)
    with pytest.raises(ServiceError, match="Served here: colour"):
        open_http_teacher(remote(f"{url}s"))
    with pytest.raises(ServiceError, match="could not be reached"):
        open_http_teacher(remote("http://127.0.0.1:1/colour"))
    with pytest.raises(TeacherError, match="visible ASCII"):
        open_http_teacher(remote(url, api_key="schlüssel"))


def test_the_key_may_come_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    assert open_http_teacher(remote(url, api_key=None)).fingerprint


# ---------------------------------------------------------------- the client


def test_the_client_is_typed_and_complete(url: str, tmp_path: Path) -> None:
    with TeacherClient(url, KEY) as client:
        card = client.card()
        images = views(3)
        logits = client.predict(images, digest=card.digest).values
        assert logits is not None
        top = client.predict(images, output="topk", k=2, temperature=4, deadline_ms=20_000)
        assert top.values is not None
        assert top.indices is not None
        assert top.tail_logmass is not None
        expected = torch.log_softmax(logits / 4, 1).topk(2)
        torch.testing.assert_close(top.values, expected.values)
        assert torch.equal(top.indices.long(), expected.indices)
        assert top.tail_logmass.shape == (3,)
        features = client.predict(images, fields=["feature:relu"])
        assert features.values is None
        assert features.features["feature:relu"].shape == (3, *card.fields["feature:relu"].shape)
        for kind in ("png", "jpeg", "webp"):
            path = tmp_path / f"picture.{kind}"
            path.write_bytes(picture(kind.upper(), (20, 10)))
            found = client.predict_file(path, output="probs")
            assert found.metadata["resized"] == "true"
            assert found.metadata["digest"] == card.digest
            assert found.values is not None
            assert found.values.shape == (1, 7)


def test_the_clients_errors_say_what_to_do(url: str, tmp_path: Path) -> None:
    with TeacherClient(url, KEY) as client:
        with pytest.raises(ServiceError, match=r"If-Match \(HTTP 412"):
            client.predict(views(1), digest="0" * 32)
        with pytest.raises(ServiceError, match=r"images \(HTTP 422"):
            client.predict(torch.zeros(1, 3, 9, 8, dtype=torch.uint8))
        with pytest.raises(ServiceError, match=r"k \(HTTP 400"):
            client.predict(views(1), output="topk", k=8)
        with pytest.raises(TeacherError, match=r"\.png"):
            client.predict_file(tmp_path / "animation.gif")
        with pytest.raises(TeacherError, match="readable"):
            client.predict_file(tmp_path / "none.png")
        for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
            with pytest.raises(TeacherCacheError, match="uint8"):
                client.predict(wrong)


class Scripted:
    """Answers one (status, headers, body) after the other, the last for ever, and counts."""

    def __init__(self, *script: tuple[int, dict[str, str], bytes]) -> None:
        self.script, self.calls, self.seen = list(script), 0, {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        while (await receive()).get("more_body"):
            pass
        self.calls += 1
        self.seen = dict(scope["headers"])
        status, headers, body = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def problem(status: int) -> bytes:
    """A problem's body."""
    parts = {"field": "queue", "rule": "must have room", "value": "full", "hint": "Try again later."}
    return json.dumps({"status": status, **parts}).encode()


GOOD = (200, {}, pack_tensors({"values": toy_logits(views(2))}, {"digest": "d"}))


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_waited_for_as_long_as_it_asks(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("services.transport.time.sleep", waits.append)
    late = {"Retry-After": "Sat, 21 Nov 2026 04:00:00 GMT"}
    busy = problem(status)
    app = Scripted(
        (status, {"Retry-After": "7"}, busy), (status, late, busy), (status, {"Retry-After": "9999"}, busy), GOOD
    )
    with running(app) as base, TeacherClient(f"{base}/toy") as client:
        waits.clear()
        found = client.predict(views(2))
    assert found.values is not None
    assert app.calls == 4
    # An HTTP date is not read: the wait doubles instead. Nobody is waited for longer than half a minute.
    assert [wait for wait in waits if wait > 0.05] == [7, 0.4, 30]


def test_a_service_that_stays_busy_is_given_up() -> None:
    app = Scripted((503, {"Retry-After": "0"}, problem(503)))
    given_up = pytest.raises(ServiceError, match=r"queue \(HTTP 503.*must have room.*Try again later")
    with running(app) as base, TeacherClient(f"{base}/toy", attempts=3) as client, given_up:
        client.predict(views(2))
    assert app.calls == 3


@pytest.mark.parametrize("status", [400, 404, 500, 504])
def test_other_refusals_are_not_asked_again(status: int) -> None:
    app = Scripted((status, {}, b"<html>a proxy's words</html>"))
    refused = pytest.raises(ServiceError, match=f"success or a problem.*{status}")
    with running(app) as base, TeacherClient(f"{base}/toy") as client, refused:
        client.predict(views(2))
    assert app.calls == 1


def test_answers_that_are_none_are_refused() -> None:
    app = Scripted((200, {}, b"hello"))
    with running(app) as base, TeacherClient(f"{base}/toy") as client:
        with pytest.raises(ServiceError, match="card"):
            client.card()
        with pytest.raises(ServiceError, match="safetensors"):
            client.predict(views(2))


def test_every_request_of_a_build_names_the_digest_and_the_row_count_is_checked() -> None:
    served = toy_served(open_gate(ToyTeacher()))
    card = served.card(Settings(), Policy()).model_dump_json().encode()
    app = Scripted((200, {}, card), GOOD, (200, {}, pack_tensors({"feature:x": torch.zeros(2)})))
    with running(app) as base:
        teacher = open_http_teacher(TeacherSpec(model=f"{base}/toy", micro_batch=8, api_key=KEY))
        assert torch.equal(teacher(views(2))["logits"], toy_logits(views(2)))
        assert app.seen[b"if-match"] == f'"{served.digest}"'.encode()
        assert app.seen[b"authorization"] == f"Bearer {KEY}".encode()
        with pytest.raises(ServiceError, match="must answer logits for 2 images"):
            teacher(views(2))
        teacher.close()


def test_a_teacher_that_changes_in_the_middle_of_a_build_stops_it() -> None:
    before, after = ToyTeacher(), ToyTeacher(fingerprint="f" * 32)
    app = create_app({"toy": toy_served(open_gate(before))}, Settings())
    with running(app) as base:
        teacher = open_http_teacher(TeacherSpec(model=f"{base}/toy", micro_batch=8))
        teacher(views(8))
        app.state.service.teachers["toy"] = toy_served(open_gate(after))
        with pytest.raises(ServiceError, match="HTTP 412"):
            teacher(views(8))
        teacher.close()
