"""Forms of an answer: classes that are named, the log-sum-exp, and narrower types, for every way to ask."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_service_http import PNG, require_problem
from test_service_policy import NOW
from toy_service_models import CLASSES, ToyTeacher, open_gate, picture, serving, toy_logits, toy_served, views

from services.answers import rounded, transform
from services.async_client import AsyncTeacherClient
from services.client import TeacherClient
from services.naming import parse_named
from services.options import Wanted
from services.policy import Asked, Policy, require_allowed
from services.problems import Problem
from services.responding import narrowed
from services.wire import pack_tensors, unpack_metadata, unpack_tensors
from teacher_cache.errors import ServiceError

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}
CHOSEN = torch.tensor([[0, 6], [3, 3], [5, 1]])


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with serving(toy_served(open_gate(ToyTeacher()))) as client:
        yield client


@pytest.fixture(scope="module")
def client(http: httpx.Client) -> Iterator[TeacherClient]:
    with TeacherClient(f"{http.base_url}/toy") as client:
        yield client


def post(http: httpx.Client, tensors: dict[str, torch.Tensor], **options: Any) -> httpx.Response:
    return http.post(PREDICT, content=pack_tensors(tensors), headers=TENSORS, params=options)


# ---------------------------------------------------------------- gather


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_the_named_classes_are_answered_in_their_order(client: TeacherClient, temperature: float) -> None:
    images = views(3)
    found = client.predict(images, output="gather", classes_BK=CHOSEN, temperature=temperature)
    expected = torch.log_softmax(toy_logits(images) / temperature, 1)
    assert found.values is not None
    assert found.indices is not None
    torch.testing.assert_close(found.values, expected.gather(1, CHOSEN))
    assert torch.equal(found.indices, CHOSEN.int())
    assert found.tail_logmass is None


def test_an_async_client_gathers_too(http: httpx.Client) -> None:
    async def ask() -> Any:
        async with AsyncTeacherClient(f"{http.base_url}/toy") as client:
            return await client.predict(views(3), output="gather", classes_BK=CHOSEN, dtype="bf16", lse=True)

    found = asyncio.run(ask())
    assert torch.equal(found.values, torch.log_softmax(toy_logits(views(3)), 1).gather(1, CHOSEN).bfloat16())
    assert found.lse.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_class_numbers_may_have_either_width(http: httpx.Client, dtype: torch.dtype) -> None:
    images_NHWC = views(3).permute(0, 2, 3, 1)
    answer = post(http, {"images": images_NHWC, "classes": CHOSEN.to(dtype)}, output="gather")
    found = unpack_tensors(answer.content)
    assert sorted(found) == ["indices", "status", "values"]
    assert found["indices"].dtype == torch.int32
    shown = http.post(
        PREDICT,
        content=pack_tensors({"images": images_NHWC, "classes": CHOSEN.to(dtype)}),
        headers={**TENSORS, "Accept": "application/json"},
        params={"output": "gather"},
    ).json()
    assert shown["names"][2] == ["class 5", "class 1"]
    assert torch.equal(torch.tensor(shown["values"]), found["values"])


LYING: dict[str, torch.Tensor] = {
    "below zero": torch.tensor([[0], [-1], [2]]),
    "as many as there are": torch.tensor([[0], [CLASSES], [2]]),
    "beyond 32 bits": torch.tensor([[0], [2**32], [2]]),
    "the least number": torch.tensor([[0], [-(2**63)], [2]]),
    "for fewer items": torch.zeros(2, 1, dtype=torch.int64),
    "for more items": torch.zeros(4, 1, dtype=torch.int64),
    "none for each": torch.zeros(3, 0, dtype=torch.int64),
    "more than there are": torch.zeros(3, CLASSES + 1, dtype=torch.int64),
    "in a row": torch.zeros(3, dtype=torch.int64),
    "in a cube": torch.zeros(3, 1, 1, dtype=torch.int64),
    "floating": torch.zeros(3, 1),
    "bytes": torch.zeros(3, 1, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", LYING)
def test_classes_that_do_not_fit_are_refused(http: httpx.Client, name: str) -> None:
    answer = post(http, {"images": views(3).permute(0, 2, 3, 1), "classes": LYING[name]}, output="gather")
    assert require_problem(answer, 422)["field"] == "classes"


def test_classes_belong_to_gather_and_it_to_them(http: httpx.Client) -> None:
    images_NHWC = views(3).permute(0, 2, 3, 1)
    require_problem(post(http, {"images": images_NHWC}, output="gather"), 422, "classes", "none")
    require_problem(post(http, {"images": images_NHWC, "classes": CHOSEN}, output="topk"), 422, "classes")
    require_problem(post(http, {"images": images_NHWC, "classes": CHOSEN}), 422, "classes")
    require_problem(http.post(f"{PREDICT}?output=gather", content=picture("PNG"), headers=PNG), 422, "classes")
    assert post(http, {"images": images_NHWC, "classes": CHOSEN, "more": CHOSEN}, output="gather").status_code == 422


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"keys": ["a", "b"], "classes": [[1], [1, 2]]}, "as many"),
        ({"keys": ["a"], "classes": [[-1]]}, "greater"),
        ({"keys": ["a"], "classes": [[2**31]]}, "less"),
        ({"keys": ["a"], "classes": [[1.5]]}, "integer"),
        ({"keys": ["a"], "classes": [[True]]}, "integer"),
        ({"keys": ["a"], "classes": [1]}, "tuple"),
        ({"keys": ["a"], "classes": [[1]], "whole": True}, "whole"),
    ],
)
def test_classes_in_json_are_rows_of_numbers(body: object, word: str) -> None:
    with pytest.raises(Problem, match=word):
        parse_named(json.dumps(body).encode(), 10)


# ---------------------------------------------------------------- what a key may have


def wanted(output: Any, k: int = 0, lse: bool = False, rounding: float | None = None) -> Wanted:
    return Wanted(output, k, 1.0, ("logits",), rounding, lse)


def test_the_largest_k_bounds_the_classes_of_one_question() -> None:
    policy = Policy(outputs=("topk", "gather"), largest_k=3)

    require_allowed(policy, Asked.predict("toy", wanted("gather", 3)), NOW)
    with pytest.raises(Problem, match="largest_k"):
        require_allowed(policy, Asked.predict("toy", wanted("gather", 4)), NOW)
    with pytest.raises(Problem, match="outputs"):
        require_allowed(Policy(outputs=("topk",)), Asked.predict("toy", wanted("gather", 1)), NOW)


def test_the_log_sum_exp_is_for_keys_that_may_have_logits() -> None:

    asked = Asked.predict("toy", wanted("topk", 3, lse=True))
    with pytest.raises(Problem, match="outputs"):
        require_allowed(Policy(outputs=("topk",)), asked, NOW)
    require_allowed(Policy(outputs=("topk", "logits")), asked, NOW)


# ---------------------------------------------------------------- log-sum-exp


@pytest.mark.parametrize("output", ["logprobs", "probs", "topk", "gather"])
def test_the_log_sum_exp_is_that_of_the_raw_logits(client: TeacherClient, output: Any) -> None:
    images = views(3)
    chosen = CHOSEN if output == "gather" else None
    found = client.predict(images, output=output, classes_BK=chosen, temperature=3, lse=True)
    assert found.lse is not None
    torch.testing.assert_close(found.lse, toy_logits(images).logsumexp(1))
    assert client.predict(images, output=output, classes_BK=chosen).lse is None


def test_with_it_log_probabilities_are_logits(client: TeacherClient) -> None:
    found = client.predict(views(3), output="topk", k=4, lse=True)
    assert found.values is not None
    assert found.indices is not None
    assert found.lse is not None
    expected = toy_logits(views(3)).gather(1, found.indices.long())
    torch.testing.assert_close(found.values + found.lse[:, None], expected)


@given(st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=8), st.sampled_from([0.1, 0.5, 3.0]))
def test_a_rounded_log_sum_exp_tells_no_more_than_rounded_logits(logits: list[float], step: float) -> None:
    exact = torch.tensor([logits])
    one, other = (
        transform({"logits": each}, wanted("topk", 2, True, step))["lse"] for each in (exact, rounded(exact, step))
    )
    assert torch.equal(one, other)
    assert torch.equal(one, rounded(one, step))


def test_json_has_it_too(http: httpx.Client) -> None:
    found = http.post(f"{PREDICT}?output=topk&lse=true", content=picture("PNG"), headers=PNG).json()
    assert len(found["lse"]) == 1
    assert math.isfinite(found["lse"][0])
    assert "lse" not in http.post(f"{PREDICT}?output=topk", content=picture("PNG"), headers=PNG).json()


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(("dtype", "expected"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_floating_tensors_are_narrowed_to_the_nearest_value(
    client: TeacherClient, dtype: Any, expected: torch.dtype
) -> None:
    images = views(5)
    exact = client.predict(images, output="topk", k=CLASSES, fields=("logits", "feature:pixels"), lse=True)
    found = client.predict(images, output="topk", k=CLASSES, fields=("logits", "feature:pixels"), lse=True, dtype=dtype)
    assert found.metadata["dtype"] == dtype
    assert (exact.metadata["dtype"], found.status) == ("f32", exact.status)
    for name in ("values", "tail_logmass", "lse"):
        assert torch.equal(getattr(found, name), getattr(exact, name).to(expected)), name
    assert torch.equal(found.features["feature:pixels"], images.to(expected))
    assert found.indices is not None
    assert exact.indices is not None
    assert torch.equal(found.indices, exact.indices)


def test_what_a_type_cannot_hold_is_refused_by_item() -> None:
    values = torch.tensor([[1.0, 2.0], [65_519.0, -torch.inf], [3.0, torch.nan]])
    kept = narrowed({"values": values}, "f16")["values"]
    assert kept[1].tolist() == [65_504, -math.inf]
    assert kept[2, 1].isnan()
    values[2, 0] = -65_520.0
    with pytest.raises(Problem, match="item 2") as refused:
        narrowed({"values": values}, "f16")
    assert (refused.value.status, refused.value.field, refused.value.hint) == (422, "dtype", "Ask for f32 or bf16.")
    with pytest.raises(Problem, match="item 1") as refused:
        narrowed({"lse": torch.tensor([0.0, 3.4e38])}, "bf16")
    assert refused.value.hint == "Ask for f32."


def test_json_has_one_type(http: httpx.Client) -> None:
    answer = http.post(f"{PREDICT}?dtype=f32", content=picture("PNG"), headers=PNG)
    require_problem(answer, 400, "dtype", "JSON")
    headers = {**PNG, "Accept": "application/safetensors"}
    found = http.post(f"{PREDICT}?dtype=f16", content=picture("PNG"), headers=headers)
    assert unpack_tensors(found.content)["values"].dtype == torch.float16
    assert unpack_metadata(found.content)["dtype"] == "f16"


def test_a_client_tells_what_was_refused(client: TeacherClient) -> None:
    with pytest.raises(ServiceError, match="no effect on raw logits"):
        client.predict(views(1), lse=True)
