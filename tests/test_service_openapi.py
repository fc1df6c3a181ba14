"""The OpenAPI document, and whatever schemathesis makes of it: no 5xx, and every answer is as the document says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from toy_service_models import ToyTeacher, colour_spec, picture, running, toy_served, views, wait_until

from services import keys
from services.app import create_app
from services.images import FORMATS
from services.policy import Policy
from services.settings import Settings
from services.state_folder import StateFolder
from services.teachers import open_served
from services.wire import MEDIA_TYPE, pack_images
from teacher_cache.build import build


def not_our_fault(context: Any, response: Any, case: Any) -> bool | None:
    """No 5xx, unless the client gave us too little time."""
    if response.status_code == 504 and "X-Deadline-Ms" in case.headers:
        return None
    return not_a_server_error(context, response, case)


def refused(context: Any, response: Any, case: Any) -> bool | None:
    """What the document does not allow is not answered; which of several faults is named is our choice."""
    return None if 400 <= response.status_code < 500 else negative_data_rejection(context, response, case)


CHECKS = [
    not_our_fault,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    unsupported_method,
    ignored_auth,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Any]]:
    """URL and a key of a service with keys and small limits, and its app."""
    folder = StateFolder(tmp_path_factory.mktemp("openapi") / "state")
    key = keys.add(folder, "alice", Policy())
    limits = {"max_body_bytes": 10_000, "max_images": 20, "max_pixels": 5_000}
    spec = colour_spec(folder.path / "colour", "cache")
    build(spec, "serial")
    app = create_app({"colour": open_served(spec)}, Settings(state=folder.path, **limits))
    with running(app) as url:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        yield url, key, app


@pytest.fixture(scope="module")
def document(server: tuple[str, str, Any]) -> Any:
    """The document as schemathesis reads it, with bodies that reach the model, and some that do not."""
    url, key, _ = server
    good = [pack_images(views(1)), pack_images(views(9)), pack_images(views(21))]
    schemathesis.openapi.media_type(MEDIA_TYPE, st.sampled_from(good) | st.binary(max_size=200))
    for media_type, kind in FORMATS.items():
        pictures = [picture(kind), picture(kind, (30, 9)), picture(kind)[:-9], picture(kind, (100, 60))]
        schemathesis.openapi.media_type(media_type, st.sampled_from(pictures) | st.binary(max_size=200))
    return schemathesis.openapi.from_url(f"{url}/openapi.json", headers={"Authorization": f"Bearer {key}"})


def operations(document: Any) -> dict[str, Any]:
    """By method and path."""
    return {found.ok().label: found.ok() for found in document.get_all_operations()}


OPERATIONS = [
    "GET /livez",
    "GET /readyz",
    "GET /v1/load",
    "GET /v1/teachers",
    "GET /v1/teachers/{name}",
    "GET /v1/usage",
    "GET /v2",
    "GET /v2/health/live",
    "GET /v2/health/ready",
    "GET /v2/models/{name}",
    "GET /v2/models/{name}/ready",
    "POST /v1/teachers/{name}/lookup",
    "POST /v1/teachers/{name}/predict",
    "POST /v2/models/{name}/infer",
]


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
# Without a parameter that can be wrong there is nothing to refuse.
CASES = [(label, POSITIVE) for label in OPERATIONS] + [(label, NEGATIVE) for label in OPERATIONS if "{name}" in label]


def test_all_operations_are_tried(document: Any) -> None:
    assert sorted(operations(document)) == OPERATIONS


@pytest.mark.parametrize(("label", "mode"), CASES)
def test_no_request_makes_it_fail_and_every_answer_is_as_described(
    server: tuple[str, str, Any], document: Any, label: str, mode: Any
) -> None:
    _, key, app = server
    operation = operations(document)[label]

    # The predictions have most to get wrong.
    @settings(max_examples=settings().max_examples // (1 if "predict" in label else 4))
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if "name" in case.path_parameters and data.draw(st.integers(0, 5)):
            # The document does not say who is served, because a key may know of some teachers only.
            case.path_parameters["name"] = "colour"
        checks = CHECKS if mode is POSITIVE else [*CHECKS, refused]
        case.call_and_validate(checks=checks, headers={"Authorization": f"Bearer {key}"})

    tried()
    assert httpx.get(f"{server[0]}/readyz").status_code == 200
    assert app.state.service.batchers["colour"].waiting == 0


def test_the_document_says_who_may_come_in_what_is_taken_and_how_refusals_look(server: tuple[str, str, Any]) -> None:
    url, key, app = server
    found = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {key}"}).json()
    assert found["security"] == [{"key": []}]
    assert found["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert found["paths"]["/livez"]["get"]["security"] == []
    predict = found["paths"]["/v1/teachers/{name}/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"application/json", MEDIA_TYPE, *FORMATS}
    lookup = found["paths"]["/v1/teachers/{name}/lookup"]["post"]
    assert set(lookup["requestBody"]["content"]) == {"application/json"}
    assert set(predict["responses"]["200"]["content"]) == {MEDIA_TYPE, "application/json"}
    assert {"401", "403", "412", "429", "504"} <= set(predict["responses"])
    for path, operations in found["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                assert int(status) < 400 or set(response["content"]) == {"application/problem+json"}, path
    assert found == app.openapi()
    assert "colour" not in str(found["paths"])


def test_a_service_without_keys_says_so() -> None:
    found = create_app({"toy": toy_served(ToyTeacher())}, Settings()).openapi()
    assert "security" not in found
    assert "401" not in found["paths"]["/v1/teachers"]["get"]["responses"]
