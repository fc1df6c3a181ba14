"""Policies: each limit is refused by its name before any compute, shown in the card, and rounding holds everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_service_models import (
    CLASSES,
    ToyTeacher,
    open_gate,
    picture,
    running,
    toy_logits,
    toy_served,
    views,
    wait_until,
)

from services import keys
from services.answers import rounded, transform
from services.app import create_app
from services.options import Wanted
from services.policy import Asked, Policy, Span, require_allowed
from services.problems import Problem
from services.settings import Settings
from services.state_folder import StateFolder
from services.wire import pack_images, unpack_metadata, unpack_tensors
from teacher_cache.errors import SpecError

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}
NOW = datetime(2026, 11, 21, tzinfo=UTC)

POLICIES: dict[str, Policy] = {
    "all": Policy(),
    "toy-only": Policy(teachers=("toy",)),
    "by-id": Policy(by_id_only=True),
    "topk": Policy(outputs=("topk",), largest_k=3, temperatures=(1.0, 4.0)),
    "features": Policy(outputs=("features", "probs"), temperatures=Span(low=1, high=2)),
    "nothing": Policy(outputs=()),
    "rounded": Policy(rounding=0.25),
    "bounded": Policy(images_per_second=0.5, images_per_day=3, distinct_images=2, datasets=("digits",)),
}


class Server:
    """A running service with two teachers and a key for each policy."""

    def __init__(self, client: httpx.Client, found: dict[str, str], teacher: ToyTeacher) -> None:
        self.client, self.keys, self.teacher = client, found, teacher

    def headers(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}

    def get(self, name: str, place: str) -> httpx.Response:
        return self.client.get(place, headers=self.headers(name))

    def ask(self, name: str, count: int = 1, place: str = PREDICT, **options: object) -> httpx.Response:
        headers = {**TENSORS, **self.headers(name)}
        return self.client.post(place, content=pack_images(views(count)), headers=headers, params=options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = StateFolder(tmp_path_factory.mktemp("state"))
    found = {name: keys.add(folder, name, policy) for name, policy in POLICIES.items()}
    teacher = open_gate(ToyTeacher())
    teachers = {name: toy_served(teacher, name=name) for name in ("toy", "other")}
    app = create_app(teachers, Settings(state=folder.path))
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield Server(client, found, teacher)


# ---------------------------------------------------------------- what is refused

REFUSED: list[tuple[str, str, dict[str, object]]] = [
    ("toy-only", "teachers", {"place": "/v1/teachers/other/predict"}),
    ("toy-only", "teachers", {"place": "/v1/teachers/nowhere/predict"}),
    ("by-id", "by_id_only", {}),
    ("topk", "outputs", {}),
    ("topk", "outputs", {"output": "probs"}),
    ("topk", "outputs", {"output": "topk", "k": 1, "fields": "logits,feature:pixels"}),
    ("topk", "outputs", {"output": "topk", "k": 3, "lse": True}),
    ("topk", "largest_k", {"output": "topk", "k": 4}),
    ("topk", "largest_k", {"output": "topk"}),
    ("topk", "temperatures", {"output": "topk", "k": 3, "temperature": 2}),
    ("features", "outputs", {"output": "logits"}),
    ("features", "temperatures", {"output": "probs", "temperature": 2.01}),
    ("nothing", "outputs", {}),
    ("nothing", "outputs", {"fields": "feature:pixels"}),
    ("bounded", "images_per_day", {"count": 4}),
    ("bounded", "distinct_images", {"count": 3}),
]


@pytest.mark.parametrize(("name", "limit", "asked"), REFUSED)
def test_a_limit_is_named_and_nothing_is_computed(server: Server, name: str, limit: str, asked: dict[str, Any]) -> None:
    before = len(server.teacher.batches)
    answer = server.ask(name, **asked)
    assert answer.status_code == 403, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["field"] == limit
    assert "retry-after" not in answer.headers
    assert len(server.teacher.batches) == before


ALLOWED: list[tuple[str, dict[str, object]]] = [
    ("all", {}),
    ("all", {"fields": "feature:pixels,logits"}),
    ("toy-only", {}),
    ("topk", {"output": "topk", "k": 3}),
    ("topk", {"output": "topk", "k": 1, "temperature": 4}),
    ("features", {"fields": "feature:pixels"}),
    ("features", {"output": "probs", "temperature": 2}),
    ("features", {"output": "probs", "temperature": 1.5, "fields": "feature:pixels,logits"}),
]


@pytest.mark.parametrize(("name", "asked"), ALLOWED)
def test_what_a_policy_allows_is_answered(server: Server, name: str, asked: dict[str, Any]) -> None:
    assert server.ask(name, **asked).status_code == 200


def test_a_picture_is_an_upload_too(server: Server) -> None:
    headers = {"Content-Type": "image/png", **server.headers("by-id")}
    answer = server.client.post(PREDICT, content=picture("PNG"), headers=headers)
    assert (answer.status_code, answer.json()["field"]) == (403, "by_id_only")


def test_what_is_malformed_is_said_before_what_is_forbidden(server: Server) -> None:
    headers = {**TENSORS, **server.headers("by-id")}
    assert server.client.post(PREDICT, content=b"nothing", headers=headers).status_code == 422


def test_a_temperature_does_not_touch_what_has_none() -> None:
    wanted = Wanted("logits", 0, 1.0, ("logits", "feature:pixels"))
    asked = Asked.predict("toy", wanted)
    assert asked.temperature is None
    assert asked.outputs == ("logits", "features")
    require_allowed(Policy(temperatures=(2.0,)), asked, NOW)
    assert Asked.predict("toy", replace(wanted, output="probs")).temperature == 1.0


def test_by_id_the_data_set_counts_and_uploads_do_not() -> None:
    policy = Policy(by_id_only=True, datasets=("digits",))
    wanted = Wanted("logits", 0, 1.0, ("logits",))
    require_allowed(policy, Asked.predict("toy", wanted, uploaded=False, dataset="digits"), NOW)
    with pytest.raises(Problem, match="datasets"):
        require_allowed(policy, Asked.predict("toy", wanted, uploaded=False, dataset="faces"), NOW)


def test_a_key_ends_at_its_moment() -> None:
    policy = Policy(expires=NOW)
    require_allowed(policy, Asked(), NOW - timedelta(microseconds=1))
    with pytest.raises(Problem, match="expires"):
        require_allowed(policy, Asked(), NOW)


# ---------------------------------------------------------------- what is shown


def test_the_cards_show_what_the_key_may_have(server: Server) -> None:
    card = server.get("topk", "/v1/teachers/toy").json()
    assert card["outputs"] == ["topk"]
    assert list(card["fields"]) == ["logits"]
    assert (card["limits"]["largest_k"], card["limits"]["temperatures"]) == (3, [1.0, 4.0])
    assert server.get("features", "/v1/teachers/toy").json()["limits"]["temperatures"] == {"low": 1.0, "high": 2.0}
    assert set(server.get("features", "/v1/teachers/toy").json()["fields"]) == {"feature:pixels", "logits"}
    assert server.get("nothing", "/v1/teachers/toy").json()["fields"] == {}
    bounded = server.get("bounded", "/v1/teachers/toy").json()["limits"]
    assert (bounded["images_per_second"], bounded["images_per_day"], bounded["distinct_images"]) == (0.5, 3, 2)
    assert bounded["datasets"] == ["digits"]
    assert server.get("by-id", "/v1/teachers/toy").json()["limits"]["by_id_only"] is True
    everything = server.get("all", "/v1/teachers/toy").json()
    assert everything["outputs"] == ["logits", "logprobs", "probs", "topk", "gather"]
    assert everything["limits"]["rounding"] is None


def test_other_teachers_are_neither_listed_nor_told_from_none(server: Server) -> None:
    assert [one["name"] for one in server.get("all", "/v1/teachers").json()["teachers"]] == ["toy", "other"]
    assert [one["name"] for one in server.get("toy-only", "/v1/teachers").json()["teachers"]] == ["toy"]
    told = []
    for name in ("other", "nowhere"):
        answer = server.get("toy-only", f"/v1/teachers/{name}")
        assert answer.status_code == 403
        told.append(answer.text.replace(name, "").replace(answer.json()["request_id"], ""))
    assert told[0] == told[1]
    assert server.get("all", "/v1/teachers/nowhere").status_code == 404


# ---------------------------------------------------------------- rounding


def multiples(values: torch.Tensor, step: float) -> bool:
    """Whether all of them are; −inf is."""
    finite = values[values.isfinite()].double()
    return bool(((finite / step).round() * step).float().eq(finite.float()).all())


@pytest.mark.parametrize("output", ["logits", "logprobs", "probs", "topk"])
def test_every_value_of_every_output_is_a_multiple(server: Server, output: str) -> None:
    options = {"output": output, "fields": "logits,feature:pixels"}
    if output == "topk":
        options["k"] = str(CLASSES - 2)
    answer = server.ask("rounded", 6, **options)
    assert answer.status_code == 200
    tensors = unpack_tensors(answer.content)
    assert unpack_metadata(answer.content)["rounding"] == "0.25"
    for name, value in tensors.items():
        assert name == "indices" or multiples(value, 0.25), name
    exact = unpack_tensors(server.ask("all", 6, **options).content)
    assert "rounding" not in unpack_metadata(server.ask("all", 6, **options).content)
    assert not multiples(exact["values"], 0.25), "else this test shows nothing"
    if output == "logits":
        # To the nearest one, halves to the even one.
        assert torch.equal(tensors["values"], (toy_logits(views(6)) * 4).round() / 4)


def test_rounding_holds_in_json(server: Server) -> None:
    headers = {"Content-Type": "image/png", **server.headers("rounded")}
    answer = server.client.post(f"{PREDICT}?output=topk&k=3", content=picture("PNG"), headers=headers).json()
    assert answer["rounding"] == 0.25
    numbers = [*answer["values"][0], answer["tail_logmass"][0]]
    assert all(number * 4 == int(number * 4) for number in numbers)


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=8)


@given(LOGITS, st.sampled_from([0.01, 0.1, 0.5, 2.0]), st.sampled_from([0.01, 1.0, 20.0]))
def test_no_question_tells_more_than_rounded_logits(logits: list[float], step: float, temperature: float) -> None:
    """Two images whose rounded logits are the same get the same answers: at a low temperature, and in their order."""
    exact = torch.tensor([logits])
    coarse = rounded(exact, step)
    for output in ("logits", "logprobs", "probs", "topk"):
        wanted = Wanted(output, 2 if output == "topk" else 0, temperature, ("logits",), step)
        one, other = transform({"logits": exact}, wanted), transform({"logits": coarse}, wanted)
        for name in one:
            assert torch.equal(one[name], other[name]), (output, name)
            assert name == "indices" or multiples(one[name], step)


@given(LOGITS, st.sampled_from([0.1, 0.5, 3.0]))
def test_a_rounded_top_k_keeps_its_order(logits: list[float], step: float) -> None:
    found = transform({"logits": torch.tensor([logits])}, Wanted("topk", len(logits), 1.0, ("logits",), step))
    pairs = list(zip((-found["values"][0]).tolist(), found["indices"][0].tolist(), strict=True))
    assert pairs == sorted(pairs)
    assert found["tail_logmass"].item() == -math.inf


def test_rounding_shows_no_sign_of_what_is_rounded_away() -> None:
    found = rounded(torch.tensor([-0.01, 0.01, -0.0, 0.75, 1.25]), 0.5)
    assert found.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert not found.signbit().any()


# ---------------------------------------------------------------- impossible policies

IMPOSSIBLE: list[dict[str, object]] = [
    {"largest_k": 0, "outputs": ["topk"]},
    {"largest_k": 3},
    {"largest_k": 3, "outputs": ["topk", "probs"]},
    {"outputs": ["pickle"]},
    {"temperatures": [0]},
    {"temperatures": [math.inf]},
    {"temperatures": {"low": 1}},
    {"temperatures": {"low": 3, "high": 2}},
    {"rounding": 0},
    {"rounding": -0.5},
    {"rounding": math.nan},
    {"images_per_second": 0},
    {"images_per_second": 1e-9},
    {"images_per_day": -1},
    {"distinct_images": -1},
    {"expires": "2027-01-01T00:00:00"},
    {"expries": "2027-01-01T00:00:00Z"},
]


@pytest.mark.parametrize("given_", IMPOSSIBLE, ids=str)
def test_impossible_policies_are_refused(given_: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises((SpecError, ValueError)):
        Policy.model_validate(given_)
