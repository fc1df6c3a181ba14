"""The Open Inference Protocol: what recorded clients of other servers send is answered, by the same rules as ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
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
    serving,
    toy_logits,
    toy_served,
    views,
    wait_until,
)

from services import keys
from services.app import create_app
from services.policy import Policy
from services.settings import Settings
from services.state_folder import StateFolder

INFER = "/v2/models/toy/infer"
LENGTH = "Inference-Header-Content-Length"
TEACHER = open_gate(ToyTeacher())


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with serving(toy_served(TEACHER), max_images=20, max_pixels=5000) as client:
        yield client


def pixels(count: int) -> bytes:
    """Of `views`, as they travel."""
    return np.ascontiguousarray(views(count).permute(0, 2, 3, 1).numpy()).tobytes()


def post(http: httpx.Client, head: object, behind: bytes = b"", **headers: str) -> httpx.Response:
    """A request, in binary where something lies behind the JSON."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    if behind:
        headers = {LENGTH: str(len(text)), "Content-Type": "application/octet-stream", **headers}
    return http.post(INFER, content=text + behind, headers=headers)


def read(answer: httpx.Response) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of an answer, in binary or not."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get(LENGTH, len(answer.content)))
    head, place = json.loads(answer.content[:length]), length
    found = {}
    for output in head["outputs"]:
        dtype = {"FP32": "<f4", "INT32": "<i4", "UINT8": "u1"}[output["datatype"]]
        if "data" in output:
            array = np.array(output["data"], dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            array = np.frombuffer(answer.content[place : place + size], dtype)
            place += size
        found[output["name"]] = array.reshape(output["shape"])
    assert place == len(answer.content)
    return found


def refused(answer: httpx.Response, status: int, word: str) -> None:
    """The problem says so, also in the member that clients of this protocol read."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["content-length"]) == len(answer.content)
    problem = answer.json()
    assert problem["error"] == problem["detail"]
    assert word in problem["error"]
    assert len(answer.content) < 2000


def sent(name: str = "images", shape: tuple[int, ...] = (3, 8, 8, 3), kind: str = "UINT8", size: int = 576) -> Any:
    return {"name": name, "shape": shape, "datatype": kind, "parameters": {"binary_data_size": size}}


# ---------------------------------------------------------------- what clients send, as recorded

BINARY = (
    b'{"inputs":[{"name":"images","shape":[3,8,8,3],"datatype":"UINT8","parameters":{"binary_data_size":576}}],'
    b'"parameters":{"binary_data_output":true}}'
)
"""tritonclient 2.73, `infer("toy", [images])`."""
GATHER = (
    b'{"id":"7","inputs":[{"name":"images","shape":[3,8,8,3],"datatype":"UINT8","parameters":{"binary_data_size":576}},'
    b'{"name":"classes","shape":[3,1],"datatype":"INT64","parameters":{"binary_data_size":24}}],'
    b'"outputs":[{"name":"values","parameters":{"binary_data":true}},'
    b'{"name":"indices","parameters":{"binary_data":false}}],"parameters":{"output":"gather","temperature":2.0}}'
)
"""The same, with classes, two outputs and parameters of its own."""


def test_the_bytes_of_a_triton_client_are_answered_in_binary(http: httpx.Client) -> None:
    answer = post(http, BINARY, pixels(3))
    found = read(answer)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert list(found) == ["logits", "status"]
    assert np.array_equal(found["logits"], toy_logits(views(3)).numpy())
    assert found["status"].tolist() == [2, 2, 2]
    head = json.loads(answer.content[: int(answer.headers[LENGTH])])
    assert (head["model_name"], head["id"]) == ("toy", answer.headers["x-request-id"])
    assert head["parameters"] == {"digest": ToyTeacher.fingerprint, "output": "logits", "temperature": 1.0}


def test_classes_are_gathered_and_each_output_comes_as_it_is_wanted(http: httpx.Client) -> None:
    classes = np.array([[6], [0], [3]], "<i8")
    answer = post(http, GATHER, pixels(3) + classes.tobytes())
    found = read(answer)
    expected = torch.log_softmax(toy_logits(views(3)) / 2, 1).gather(1, torch.from_numpy(classes))
    torch.testing.assert_close(torch.from_numpy(found["values"].copy()), expected)
    assert found["indices"].tolist() == classes.tolist()
    head = json.loads(answer.content[: int(answer.headers[LENGTH])])
    assert head["id"] == "7"
    assert "data" in head["outputs"][1]


@pytest.mark.parametrize("nested", [True, False])
def test_json_alone_is_enough(http: httpx.Client, nested: bool) -> None:
    """As KServe's client sends it: with an id and the model's name."""
    array = views(2).permute(0, 2, 3, 1)
    data = array.tolist() if nested else array.flatten().tolist()
    tensor = {"name": "images", "shape": [2, 8, 8, 3], "datatype": "UINT8", "data": data}
    answer = post(http, {"id": "a", "model_name": "toy", "inputs": [tensor]})
    assert answer.headers["content-type"] == "application/json"
    assert np.array_equal(read(answer)["logits"], toy_logits(views(2)).numpy())


def test_files_travel_as_bytes(http: httpx.Client) -> None:
    files = [picture("PNG", seed=1), picture("JPEG", (9, 20), seed=2)]
    behind = b"".join(len(one).to_bytes(4, "little") + one for one in files)
    head = {"inputs": [sent(shape=(2,), kind="BYTES", size=len(behind))], "parameters": {"output": "topk", "k": 2}}
    found = read(post(http, head, behind))
    assert list(found) == ["values", "indices", "tail_logmass", "status", "resized"]
    assert found["resized"].tolist() == [0, 1]
    more = behind + b"more"
    head = {"inputs": [sent(shape=(2,), kind="BYTES", size=len(more))]}
    refused(post(http, head, more), 422, "its length in four bytes")
    broken = files[0][:40]
    behind = len(broken).to_bytes(4, "little") + broken
    head = {"inputs": [sent(shape=(1, 1), kind="BYTES", size=len(behind))]}
    refused(post(http, head, behind), 422, "item 0 is broken")
    two = behind + len(files[0]).to_bytes(4, "little") + files[0]
    head = {"inputs": [sent(shape=(2,), kind="BYTES", size=len(two))], "parameters": {"strict": False}}
    refused(post(http, {"inputs": head["inputs"]}, two), 422, "item 0 is broken")
    found = read(post(http, head, two))
    assert found["status"].tolist() == [5, 2]
    assert np.isnan(found["logits"][0]).all()


@pytest.mark.parametrize("output", ["logits", "logprobs", "probs", "topk", "gather"])
@pytest.mark.parametrize("lse", [False, True])
def test_every_output_has_the_names_that_may_be_wanted(http: httpx.Client, output: str, lse: bool) -> None:
    inputs, behind = [sent()], pixels(3)
    if output == "gather":
        inputs, behind = [sent(), sent("classes", (3, 1), "INT32", 12)], behind + bytes(12)
    given = {"output": output, "fields": "logits,feature:pixels", "lse": lse} if output != "logits" else {}
    everything = read(post(http, {"inputs": inputs, "parameters": given}, behind))
    assert ("lse" in everything) == (lse and output != "logits")
    for name, value in everything.items():
        alone = read(post(http, {"inputs": inputs, "parameters": given, "outputs": [{"name": name}]}, behind))
        assert list(alone) == [name]
        assert np.array_equal(alone[name], value, equal_nan=True)
    before = len(TEACHER.batches)
    wrong = {"inputs": inputs, "parameters": given, "outputs": [{"name": "other"}]}
    refused(post(http, wrong, behind), 400, "outputs")
    assert len(TEACHER.batches) == before, "what nobody can have is not computed"


def test_features_are_asked_for_by_wanting_them(http: httpx.Client) -> None:
    found = read(post(http, {"inputs": [sent()], "outputs": [{"name": "feature:pixels"}]}, pixels(3)))
    assert np.array_equal(found["feature:pixels"], views(3).float().numpy())


def test_what_is_not_finite_is_null_in_json(http: httpx.Client) -> None:
    given = {"output": "topk", "k": CLASSES}
    answer = post(http, {"inputs": [sent()], "parameters": given, "outputs": [{"name": "tail_logmass"}]}, pixels(3))
    assert answer.json()["outputs"][0]["data"] == [None] * 3


# ---------------------------------------------------------------- what is said of servers and models


def test_the_server_and_its_models_are_described(http: httpx.Client) -> None:
    assert http.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json() == {"ready": True}
    assert http.get("/v2/models/toy/ready").json() == {"name": "toy", "ready": True}
    about = http.get("/v2/models/toy").json()
    assert about["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}]
    assert [one["name"] for one in about["outputs"]] == ["logits", "feature:pixels", "status"]
    assert about["outputs"][0]["shape"] == [-1, CLASSES]
    for path in ("/v2/models/other", "/v2/models/other/ready", "/v2/nowhere"):
        refused(http.get(path), 404, "")
    refused(http.get(INFER), 405, "GET")
    assert "error" not in http.get("/v1/teachers/other").json()


def test_a_server_that_is_not_warm_is_not_ready() -> None:
    app = create_app({"toy": toy_served(ToyTeacher(broken=True))}, Settings())
    with running(app) as url, httpx.Client(base_url=url) as client:
        assert client.get("/v2/health/live").status_code == 200
        refused(client.get("/v2/health/ready"), 503, "not warm")
        refused(client.get("/v2/models/toy/ready"), 503, "not warm")


def test_keys_limits_and_counts_are_those_of_every_route(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    key = keys.add(folder, "alice", Policy(outputs=("topk",), largest_k=2, images_per_day=4))
    app = create_app({"toy": toy_served(TEACHER)}, Settings(state=folder.path))
    with running(app) as url, httpx.Client(base_url=url) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/toy", "/v2/models/toy/ready"):
            refused(client.get(path), 401, "Authorization")
        refused(post(client, BINARY, pixels(3)), 401, "Authorization")
        allowed = {"Authorization": f"Bearer {key}"}
        client.headers.update(allowed)
        assert [one["name"] for one in client.get("/v2/models/toy").json()["outputs"]] == ["status"]
        refused(post(client, BINARY, pixels(3)), 403, "outputs")
        head = {"inputs": [sent()], "parameters": {"output": "topk", "k": 3}}
        refused(post(client, head, pixels(3)), 403, "largest_k")
        head["parameters"]["k"] = 2
        assert read(post(client, head, pixels(3)))["indices"].shape == (3, 2)
        assert client.get("/v1/usage").json()["images"] == 3
        refused(post(client, head, pixels(3)), 429, "images_per_day")
    lines = [json.loads(line) for line in (folder.path / "audit.jsonl").read_text().splitlines()]
    assert [line.get("route") for line in lines].count("/v2/models/{name}/infer") == 4


# ---------------------------------------------------------------- what is wrong

IMAGES = {"inputs": [sent()]}
JSON_ALONE = {"inputs": [{"name": "images", "shape": [1, 8, 8, 3], "datatype": "UINT8", "data": [0] * 192}]}
WRONG: dict[str, tuple[int, object, bytes, dict[str, str]]] = {
    "no JSON": (400, b"{", b"", {}),
    "bad UTF-8": (400, b'{"\xff": 1}', b"", {}),
    "a list": (400, [1], b"", {}),
    "too deep": (400, b"[" * 50_000, b"", {}),
    "a member twice": (400, b'{"inputs": [], "inputs": []}', b"", {}),
    "another member": (400, {**IMAGES, "more": 1}, pixels(3), {}),
    "no inputs": (400, {"inputs": []}, b"", {}),
    "another model": (400, {**IMAGES, "model_name": "other"}, pixels(3), {}),
    "an unknown parameter": (400, {**IMAGES, "parameters": {"kk": 1}}, pixels(3), {}),
    "a type of its own": (400, {**IMAGES, "parameters": {"dtype": "f16"}}, pixels(3), {}),
    "a parameter of another type": (400, {**IMAGES, "parameters": {"output": 3}}, pixels(3), {}),
    "a parameter that is a list": (400, {**IMAGES, "parameters": {"output": ["topk"]}}, pixels(3), {}),
    "binary or not": (400, {**IMAGES, "parameters": {"binary_data_output": 1}}, pixels(3), {}),
    "a classification": (
        400,
        {**IMAGES, "outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
        pixels(3),
        {},
    ),
    "an output twice": (400, {**IMAGES, "outputs": [{"name": "logits"}, {"name": "logits"}]}, pixels(3), {}),
    "no temperature for logits": (400, {**IMAGES, "parameters": {"temperature": 2.0}}, pixels(3), {}),
    "a length that is text": (400, IMAGES, pixels(3), {LENGTH: "many"}),
    "a length below zero": (400, IMAGES, pixels(3), {LENGTH: "-1"}),
    "a length of zero": (400, IMAGES, pixels(3), {LENGTH: "0"}),
    "a length beyond the body": (400, JSON_ALONE, b"", {LENGTH: "10000"}),
    "a length of a thousand digits": (400, IMAGES, pixels(3), {LENGTH: "9" * 1000}),
    "a form": (415, IMAGES, b"", {"Content-Type": "application/x-www-form-urlencoded"}),
    "multipart": (415, IMAGES, b"", {"Content-Type": "multipart/form-data; boundary=x"}),
    "another teacher": (412, IMAGES, pixels(3), {"If-Match": '"0"'}),
    "fewer bytes": (422, IMAGES, pixels(2), {}),
    "more bytes": (422, IMAGES, pixels(4), {}),
    "a size that lies": (422, {"inputs": [sent(size=577)]}, pixels(3) + b"1", {}),
    "a shape that lies": (422, {"inputs": [sent(shape=(2, 8, 8, 3))]}, pixels(3), {}),
    "a shape of a billion": (422, {"inputs": [sent(shape=(10**9, 8, 8, 3))]}, pixels(3), {}),
    "a shape that overflows": (422, {"inputs": [sent(shape=(2**62, 2**62, 8, 3))]}, pixels(3), {}),
    "a shape of zero": (400, {"inputs": [sent(shape=(0, 8, 8, 3), size=0)]}, b"", {}),
    "a shape below zero": (400, {"inputs": [sent(shape=(-3, -8, 8, 3))]}, pixels(3), {}),
    "a shape of many dimensions": (400, {"inputs": [sent(shape=(1,) * 99)]}, pixels(3), {}),
    "channels first": (422, {"inputs": [sent(shape=(3, 3, 8, 8))]}, pixels(3), {}),
    "floats": (422, {"inputs": [sent(shape=(3, 8, 8, 3), kind="FP32", size=2304)]}, bytes(2304), {}),
    "a type that nobody knows": (422, {"inputs": [sent(kind="X")]}, pixels(3), {}),
    "images of INT32": (422, {"inputs": [sent(kind="INT32", size=2304)]}, bytes(2304), {}),
    "another name": (422, {"inputs": [sent("pixels")]}, pixels(3), {}),
    "images twice": (422, {"inputs": [sent(), sent()]}, pixels(6), {}),
    "one tensor more": (422, {"inputs": [sent(), sent("more")]}, pixels(6), {}),
    "data and bytes": (422, {"inputs": [{**sent(), "data": [1]}]}, pixels(3), {}),
    "neither": (422, {"inputs": [{"name": "images", "shape": [1, 8, 8, 3], "datatype": "UINT8"}]}, b"", {}),
    "too many images": (413, {"inputs": [sent(shape=(21, 8, 8, 3), size=4032)]}, pixels(21), {}),
    "classes of BYTES": (
        422,
        {"inputs": [sent(), sent("classes", (1,), "BYTES", 5)]},
        pixels(3) + b"\1\0\0\0a",
        {},
    ),
    "classes for logits": (422, {"inputs": [sent(), sent("classes", (3, 1), "INT32", 12)]}, pixels(3) + bytes(12), {}),
    "files that are longer than they are": (422, {"inputs": [sent(shape=(1,), kind="BYTES", size=6)]}, b"\xff" * 6, {}),
    "files that end early": (422, {"inputs": [sent(shape=(2,), kind="BYTES", size=5)]}, b"\1\0\0\0a", {}),
    "bytes behind the files": (422, {"inputs": [sent(shape=(1,), kind="BYTES", size=9)]}, b"\1\0\0\0aaaaa", {}),
    "a billion files": (413, {"inputs": [sent(shape=(10**9,), kind="BYTES", size=4)]}, bytes(4), {}),
    "files in JSON": (
        422,
        {"inputs": [{"name": "images", "shape": [1], "datatype": "BYTES", "data": ["a"]}]},
        b"",
        {},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(http: httpx.Client, name: str) -> None:
    status, head, behind, headers = WRONG[name]
    refused(post(http, head, behind, **headers), status, LENGTH if status == 400 and LENGTH in headers else "")


def test_a_length_that_cuts_the_json_leaves_none(http: httpx.Client) -> None:
    refused(post(http, IMAGES, pixels(3), **{LENGTH: "20"}), 400, "JSON")
    assert post(http, JSON_ALONE, **{LENGTH: str(len(json.dumps(JSON_ALONE)))}).status_code == 200


def test_options_in_the_url_are_refused(http: httpx.Client) -> None:
    refused(http.post(f"{INFER}?output=topk", content=BINARY + pixels(3), headers={LENGTH: "10"}), 400, "output")


@pytest.mark.parametrize(
    "data",
    [
        [],
        [0] * 191,
        [0] * 193,
        [256] + [0] * 191,
        [-1] + [0] * 191,
        [10**400] + [0] * 191,
        [0.5] + [0] * 191,
        [True] + [0] * 191,
        [None] + [0] * 191,
        ["0" * 10_000] + ["0"] * 191,
        [[0] * 192],
        [[[[0] * 3] * 8] * 7 + [[[0] * 3] * 7]],
        [[[[0, 0], [0, 0, 0, 0]] + [[0] * 3] * 6] * 8],
        [{}] * 192,
    ],
    ids=lambda data: json.dumps(data)[:12],
)
def test_wrong_data(http: httpx.Client, data: list[object]) -> None:
    tensor = {"name": "images", "shape": [1, 8, 8, 3], "datatype": "UINT8", "data": data}
    refused(post(http, {"inputs": [tensor]}), 422, "images")


LENGTHS = st.one_of(st.none(), st.integers(-3, 300).map(str), st.text("0123456789²-+", max_size=4))


@given(st.binary(max_size=200), LENGTHS)
def test_noise_is_never_our_fault(http: httpx.Client, content: bytes, length: str | None) -> None:
    headers = [] if length is None else [(LENGTH.encode(), length.encode("latin-1"))]
    answer = http.post(INFER, content=content, headers=headers)
    assert 400 <= answer.status_code < 500
