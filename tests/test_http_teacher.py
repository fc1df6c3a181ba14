"""The client's side: a teacher behind a URL is the local teacher, bit for bit, or it is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
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
from services.retries import Patience, Retries
from services.settings import Settings
from services.status import Status
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


COMPUTED = torch.full((2,), Status.COMPUTED, dtype=torch.uint8)
GOOD = (200, {}, pack_tensors({"values": toy_logits(views(2)), "status": COMPUTED}, {"digest": "d"}))


def waits_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client waits from now on; it does not."""
    waits: list[float] = []
    monkeypatch.setattr("services.transport.time.sleep", waits.append)
    return waits


def asked(app: Scripted, **options: float) -> TeacherCacheError | None:
    """What a client that asks once ends with; None for an answer."""
    with running(app) as base, TeacherClient(f"{base}/toy", **options) as client:  # type: ignore[arg-type]
        try:
            client.predict(views(2))
        except TeacherCacheError as error:
            return error
    return None


def in_seconds(seconds: int) -> str:
    """An HTTP date."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def test_our_budget_is_waited_for_exactly_as_long_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Scripted(
        (429, {"Retry-After": "7"}, problem(429)), (429, {"Retry-After": in_seconds(60)}, problem(429)), GOOD
    )
    waits = waits_of(monkeypatch)
    assert asked(app) is None
    long = [wait for wait in waits if wait > 1]
    assert long[0] == 7
    assert 50 < long[1] <= 60
    assert app.calls == 3


@pytest.mark.parametrize(
    ("headers", "words"),
    [({}, "does not say when"), ({"Retry-After": "soon"}, "does not say when"), ({"Retry-After": "9999"}, "in 9999 s")],
)
def test_a_budget_that_is_gone_for_good_is_given_up_at_once(headers: dict[str, str], words: str) -> None:
    app = Scripted((429, headers, problem(429)))
    error = asked(app)
    assert isinstance(error, ServiceError)
    assert words in str(error)
    assert "Try again later" in str(error)
    assert app.calls == 1


def test_a_service_without_room_is_come_back_to_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = (503, {}, problem(503))
    app = Scripted(busy, (503, {"Retry-After": "3"}, problem(503)), busy, busy, GOOD)
    waits = waits_of(monkeypatch)
    assert asked(app) is None
    found = [wait for wait in waits if wait != 0.01]
    assert found[1] == 3
    for wait, whole in zip([found[0], *found[2:]], [0.1, 0.4, 0.8], strict=True):
        assert whole / 2 <= wait <= whole


def test_patience_is_for_all_waits_together() -> None:
    app = Scripted((503, {"Retry-After": "1"}, problem(503)))
    error = asked(app, patience=0.9)
    assert "come back in 1 s, and our patience is 0.9 s" in str(error)
    assert app.calls == 1


def test_waits_of_two_clients_are_not_the_same() -> None:
    error = httpx.ConnectError("refused")
    low, high = (Retries("url", Patience(faults=9), draw).after(error) for draw in (lambda: 0.0, lambda: 0.999))
    assert low < high


def test_a_service_that_stays_busy_is_given_up() -> None:
    app = Scripted((503, {"Retry-After": "0"}, problem(503)))
    error = asked(app, attempts=3)
    assert app.calls == 3
    assert "HTTP 503" in str(error)
    assert "3 tries in" in str(error)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 412, 500])
def test_other_refusals_are_not_asked_again(status: int) -> None:
    app = Scripted((status, {}, b"<html>a proxy's words</html>"))
    assert f"success or a problem (found: {status})" in str(asked(app))
    assert app.calls == 1


@pytest.mark.parametrize("status", [502, 504])
def test_a_gateways_failures_are_tried_a_few_times(status: int) -> None:
    app = Scripted((status, {}, b"<html>a proxy's words</html>"))
    assert "4 tries in" in str(asked(app))
    assert app.calls == 4
    assert asked(Scripted((status, {}, b""), (status, {}, b""), (status, {}, b""), GOOD)) is None


def test_an_answer_that_is_cut_off_is_asked_for_again() -> None:
    cut = (200, {"Content-Length": "5000"}, GOOD[2])
    assert asked(Scripted(cut, GOOD)) is None
    error = asked(Scripted(cut))
    assert "broke off" in str(error)
    assert "4 tries in" in str(error)


@pytest.mark.parametrize(
    "changes", [{"attempts": 0}, {"faults": 0}, {"seconds": -1.0}, {"first": 0.0}, {"first": 40.0}]
)
def test_impossible_patience_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        Patience(**changes)  # type: ignore[arg-type]


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
    good = pack_tensors({"values": toy_logits(views(2)), "status": COMPUTED}, {"digest": served.digest})
    app = Scripted(
        (200, {}, card),
        (200, {}, good),
        (200, {}, pack_tensors({"feature:x": torch.zeros(2), "status": COMPUTED})),
        GOOD,
    )
    with running(app) as base:
        teacher = open_http_teacher(TeacherSpec(model=f"{base}/toy", micro_batch=8, api_key=KEY))
        assert torch.equal(teacher(views(2))["logits"], toy_logits(views(2)))
        assert app.seen[b"if-match"] == f'"{served.digest}"'.encode()
        assert app.seen[b"authorization"] == f"Bearer {KEY}".encode()
        with pytest.raises(ServiceError, match="must answer logits for 2 images"):
            teacher(views(2))
        with pytest.raises(ServiceError, match="must answer as the teacher that was asked for"):
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


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"rounding": 0.5}, "rounded"),
        ({"by_id_only": True}, "bring images"),
        ({"outputs": ("topk",)}, "output logits"),
    ],
)
def test_a_key_whose_limits_change_the_answers_builds_no_cache(limits: dict[str, object], said: str) -> None:
    """Rounded values under the exact teacher's fingerprint would be a cache that lies."""
    card = (
        toy_served(open_gate(ToyTeacher())).card(Settings(), Policy.model_validate(limits)).model_dump_json().encode()
    )
    with running(Scripted((200, {}, card))) as base, pytest.raises(TeacherError, match=said):
        open_http_teacher(TeacherSpec(model=f"{base}/toy", micro_batch=8, api_key=KEY))
