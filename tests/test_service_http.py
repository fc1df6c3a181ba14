"""The endpoints over real HTTP: answers, options, limits, conditions, keys, and 40 ways to be wrong."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import math
import random
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save
from toy_service_models import (
    CLASSES,
    POISON,
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

from services.answers import log_probs, top_k
from services.app import create_app
from services.settings import Settings
from services.status import Status
from services.wire import pack_images, unpack_metadata, unpack_tensors
from teacher_cache.errors import SpecError

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}
PNG = {"Content-Type": "image/png"}
DIGEST = ToyTeacher.fingerprint


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A service with small limits and no key."""
    limits = {"max_images": 20, "max_body_bytes": 10_000, "max_pixels": 5_000, "queue_images": 100}
    with serving(toy_served(open_gate(ToyTeacher())), **limits) as client:
        yield client


def require_problem(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """The answer must be that problem, and tell nothing of the machine or the body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert {"type", "title", "detail", "field", "rule", "value", "hint", "request_id"} <= problem.keys()
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert len(answer.content) < 1500
    for secret in ("Traceback", "/secret", ".py", "site-packages"):
        assert secret not in answer.text
    for word in words:
        assert word in problem["detail"]
    return problem


def ask(client: httpx.Client, images_BCHW: torch.Tensor, **options: object) -> dict[str, torch.Tensor]:
    """A safetensors prediction that must succeed."""
    answer = client.post(PREDICT, content=pack_images(images_BCHW), headers=TENSORS, params=options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/safetensors"
    return unpack_tensors(answer.content)


# ---------------------------------------------------------------- probes and cards


def test_the_probes_answer(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "live"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_the_card_says_what_is_taken_and_offered(client: httpx.Client) -> None:
    answer = client.get("/v1/teachers/toy")
    card = answer.json()
    assert answer.headers["etag"] == f'"{DIGEST}"'
    assert card["digest"] == DIGEST
    assert card["class_names"] == [f"class {number}" for number in range(CLASSES)]
    assert card["input"]["shape"] == [8, 8, 3]
    assert card["input"]["dtype"] == "uint8"
    assert card["fields"]["feature:pixels"] == {"shape": [3, 8, 8], "pool": "none"}
    assert card["micro_batch"] == 8
    assert card["outputs"] == ["logits", "logprobs", "probs", "topk", "gather"]
    assert card["limits"]["images"] == 20
    assert client.get("/v1/teachers").json() == {"teachers": [card]}


def test_a_known_card_is_not_sent_again(client: httpx.Client) -> None:
    same = client.get("/v1/teachers/toy", headers={"If-None-Match": f'"0", W/"{DIGEST}"'})
    assert (same.status_code, same.content) == (304, b"")
    assert client.get("/v1/teachers/toy", headers={"If-None-Match": '"0"'}).status_code == 200


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("count", [1, 8, 19])
def test_logits_are_the_teachers(client: httpx.Client, count: int) -> None:
    images = views(count, count)
    found = ask(client, images)
    assert sorted(found) == ["status", "values"]
    assert found["status"].tolist() == [Status.COMPUTED] * count
    assert torch.equal(found["values"], toy_logits(images))


def test_temperature_applies_to_probabilities(client: httpx.Client) -> None:
    images = views(3)
    expected = torch.log_softmax(toy_logits(images) / 2.5, 1)
    found = ask(client, images, output="logprobs", temperature=2.5)["values"]
    torch.testing.assert_close(found, expected)
    probabilities = ask(client, images, output="probs", temperature=2.5)["values"]
    torch.testing.assert_close(probabilities, expected.exp())


@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("k", [1, 4, CLASSES])
def test_top_k_is_ordered_by_value_then_class_and_its_mass_is_one(
    client: httpx.Client, k: int, temperature: float
) -> None:
    images = views(6)
    images[0, 0, 0, :CLASSES] = torch.tensor([8, 20, 8, 20, 8, 20, 8], dtype=torch.uint8)
    found = ask(client, images, output="topk", k=k, temperature=temperature)
    everything = torch.log_softmax(toy_logits(images) / temperature, 1)
    expected = everything.sort(dim=1, descending=True, stable=True)
    assert found["indices"].shape == (6, k)
    assert torch.equal(found["indices"].long(), expected.indices[:, :k])
    assert found["indices"][0].tolist() == [1, 3, 5, 0, 2, 4, 6][:k]
    torch.testing.assert_close(found["values"], expected.values[:, :k])
    mass = found["values"].exp().sum(1) + found["tail_logmass"].exp()
    torch.testing.assert_close(mass, torch.ones(6))
    if k == CLASSES:
        assert found["tail_logmass"].eq(-math.inf).all()


@given(
    st.floats(0.01, 1000), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=9)
)
@example(0.01, [3e38, 1e38])
def test_probabilities_are_never_nan(temperature: float, logits: list[float]) -> None:
    found = log_probs(torch.tensor([logits]), temperature)
    assert not found.isnan().any()
    assert abs(float(found.exp().sum()) - 1) < 1e-5


def test_equal_values_stand_in_the_order_of_their_classes() -> None:
    values = (torch.arange(5000) % 3).float()[None]
    found = top_k(values, 5000)["indices"][0].tolist()
    assert found == [*range(2, 5000, 3), *range(1, 5000, 3), *range(0, 5000, 3)]


def test_features_come_raw_beside_the_transformed_logits(client: httpx.Client) -> None:
    images = views(9)
    found = ask(client, images, fields="feature:pixels,logits", output="probs", temperature=3)
    assert torch.equal(found["feature:pixels"], images.float())
    torch.testing.assert_close(found["values"].sum(1), torch.ones(9))
    alone = ask(client, images, fields="feature:pixels")
    assert sorted(alone) == ["feature:pixels", "status"]


def test_a_safetensors_answer_says_what_it_is(client: httpx.Client) -> None:
    options = {"output": "probs", "temperature": 2}
    answer = client.post(PREDICT, content=pack_images(views(1)), headers=TENSORS, params=options)
    assert unpack_metadata(answer.content) == {
        "teacher": "toy",
        "digest": DIGEST,
        "output": "probs",
        "temperature": "2.0",
        "resized": "false",
        "encodings": "{}",
        "dtype": "f32",
        "policy": "{}",
        "numerics": '{"precision": "fp32", "channels_last": false, "threads": 1, "device": "cpu", "micro_batch": 8}',
    }


@pytest.mark.parametrize(
    ("sent", "accept", "expected"),
    [
        (TENSORS, "application/json", "application/json"),
        (TENSORS, "*/*", "application/safetensors"),
        (PNG, "*/*", "application/json"),
        (PNG, "text/html, application/safetensors;q=0.9", "application/safetensors"),
    ],
)
def test_the_kind_of_answer(client: httpx.Client, sent: dict[str, str], accept: str, expected: str) -> None:
    content = picture("PNG") if sent is PNG else pack_images(views(1))
    answer = client.post(PREDICT, content=content, headers={**sent, "Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == expected


def test_json_names_the_classes_and_has_no_nan(client: httpx.Client) -> None:
    answer = client.post(f"{PREDICT}?output=topk&k=7", content=picture("PNG"), headers=PNG).json()
    assert answer["digest"] == DIGEST
    assert answer["names"][0] == [f"class {number}" for number in answer["indices"][0]]
    assert answer["tail_logmass"] == [None]
    assert sum(math.exp(value) for value in answer["values"][0]) == pytest.approx(1)
    plain = client.post(PREDICT, content=picture("PNG"), headers=PNG).json()
    assert plain.keys() == {"teacher", "digest", "output", "temperature", "resized", "status", "encodings", "values"}


# ---------------------------------------------------------------- encoded images


MODES = {"PNG": ["RGB", "L", "RGBA", "P"], "WEBP": ["RGB", "L", "RGBA", "P"], "JPEG": ["RGB", "L", "CMYK"]}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_pictures_of_every_mode_become_the_teachers_pixels(client: httpx.Client, kind: str, mode: str) -> None:
    data = picture(kind, mode=mode)
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    answer = client.post(PREDICT, content=data, headers={"Content-Type": f"image/{kind.lower()}"}).json()
    assert answer["resized"] is False
    assert answer["values"] == toy_logits(pixels).tolist()


def test_a_palette_with_transparency_loses_it(client: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("P", (8, 8), 3).save(buffer, "PNG", transparency=b"\x10\x20\x30\x40")
    assert client.post(PREDICT, content=buffer.getvalue(), headers=PNG).status_code == 200


@pytest.mark.parametrize("size", [(16, 16), (9, 31), (40, 12), (3, 5)])
def test_other_sizes_are_resized_and_say_so(client: httpx.Client, size: tuple[int, int]) -> None:
    from torchvision.transforms.v2 import functional

    data = picture("PNG", size)
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected = functional.center_crop(functional.resize(pixels, [8], antialias=True), [8, 8])
    answer = client.post(PREDICT, content=data, headers=PNG).json()
    assert answer["resized"] is True
    assert answer["values"] == toy_logits(expected[None]).tolist()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=60)
def test_resizing_always_covers_the_input(tall: int, wide: int, height: int, width: int) -> None:
    from services.images import decode
    from services.pixels import PixelBudget

    buffer = io.BytesIO()
    Image.new("L", (wide, tall), 200).save(buffer, "PNG")
    found, _ = decode(buffer.getvalue(), "image/png", (1, height, width), PixelBudget(10**6))
    assert found.shape == (1, 1, height, width)
    # A zero would be padding: the crop would be larger than what was resized.
    assert found.eq(200).all()


# ---------------------------------------------------------------- everything that is wrong


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def animation() -> bytes:
    """A PNG of two frames."""
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def deep() -> bytes:
    """A PNG of 16 bits a channel."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = pack_images(views(1))
ONE = np.zeros((1, 8, 8, 3), np.uint8)
BODIES: dict[str, tuple[int, bytes, str]] = {
    "JSON": (415, json.dumps({"images": [1]}).encode(), "application/json"),
    "multipart": (415, b"--x--", "multipart/form-data; boundary=x"),
    "no content type": (415, IMAGES, ""),
    "GIF": (415, b"GIF89a", "image/gif"),
    "empty tensors": (422, b"", "application/safetensors"),
    "truncated tensors": (422, IMAGES[:-1], "application/safetensors"),
    "lying header length": (422, (10**6).to_bytes(8, "little") + IMAGES[8:], "application/safetensors"),
    "wrong dtype": (422, save({"images": ONE.astype(np.float32)}), "application/safetensors"),
    "wrong shape": (422, save({"images": ONE[:, :7]}), "application/safetensors"),
    "channels first": (422, save({"images": ONE.transpose(0, 3, 1, 2).copy()}), "application/safetensors"),
    "zero images": (422, save({"images": ONE[:0]}), "application/safetensors"),
    "another name": (422, save({"pictures": ONE}), "application/safetensors"),
    "too many images": (413, pack_images(views(21)), "application/safetensors"),
    "too many bytes": (413, bytes(10_001), "application/safetensors"),
    "too many pixels": (413, picture("PNG", (2501, 2))[:9000], "image/png"),
    "bomb": (413, bomb(60_000, 60_000), "image/png"),
    "bomb of a warning": (413, bomb(10_000, 10_000), "image/png"),
    "strip that grows": (413, picture("PNG", (1, 700)), "image/png"),
    "empty picture": (422, b"", "image/png"),
    "text as a picture": (422, b"GET / HTTP/1.1", "image/webp"),
    "truncated JPEG": (422, picture("JPEG", (32, 32))[:-200], "image/jpeg"),
    "truncated PNG": (422, picture("PNG")[:60], "image/png"),
    "PNG named JPEG": (422, picture("PNG"), "image/jpeg"),
    "no pixel data": (422, bomb(8, 8), "image/png"),
    "animation": (422, animation(), "image/png"),
    "16 bits": (422, deep(), "image/png"),
}


@pytest.mark.parametrize("name", BODIES)
def test_wrong_bodies(client: httpx.Client, name: str) -> None:
    status, content, media = BODIES[name]
    answer = client.post(PREDICT, content=content, headers={"Content-Type": media} if media else {})
    require_problem(answer, status)


OPTIONS = {
    "temprature=2": "temperature",
    "dtype=f64": "dtype",
    "dtype=f16&dtype=f16": "dtype",
    "lse=true": "lse",
    "lse=maybe&output=probs": "lse",
    "output=gather&k=2": "k",
    "output=loggits": "output",
    "output=topk&k=0": "k",
    "output=topk&k=8": "k",
    "output=topk&k=-1": "k",
    "output=topk&k=two": "k",
    "output=topk&k=99999999999999999999999": "k",
    "k=3": "k",
    "temperature=2": "temperature",
    "output=probs&temperature=0": "temperature",
    "output=probs&temperature=-1": "temperature",
    "output=probs&temperature=nan": "temperature",
    "output=probs&temperature=inf": "temperature",
    "output=probs&temperature=1e999": "temperature",
    "output=probs&temperature=": "temperature",
    "output=probs&output=logits": "output",
    "fields=": "fields",
    "fields=feature:none": "fields",
    "fields=logits,logits": "fields",
    "fields=feature:pixels&output=probs": "output",
}


@pytest.mark.parametrize("query", OPTIONS)
def test_wrong_options_are_named(client: httpx.Client, query: str) -> None:
    answer = client.post(f"{PREDICT}?{query}", content=IMAGES, headers=TENSORS)
    require_problem(answer, 400, OPTIONS[query])


def test_features_in_json_are_refused(client: httpx.Client) -> None:
    answer = client.post(f"{PREDICT}?fields=feature:pixels", content=picture("PNG"), headers=PNG)
    require_problem(answer, 400, "safetensors")


@pytest.mark.parametrize(
    ("status", "header", "value"),
    [
        (412, "If-Match", '"0123"'),
        (412, "If-Match", f'W/"{DIGEST}"'),
        (400, "If-Match", DIGEST),
        (400, "If-Match", ""),
        (400, "X-Deadline-Ms", "soon"),
        (400, "X-Deadline-Ms", "0"),
        (400, "X-Deadline-Ms", "-5"),
        (400, "X-Deadline-Ms", "1e3"),
        (400, "X-Deadline-Ms", "9" * 30),
    ],
)
def test_wrong_headers(client: httpx.Client, status: int, header: str, value: str) -> None:
    answer = client.post(PREDICT, content=IMAGES, headers={**TENSORS, header: value})
    require_problem(answer, status, header)


@pytest.mark.parametrize("value", ["*", f'"{DIGEST}"', f'"0", "{DIGEST}"'])
def test_the_right_digest_is_let_through(client: httpx.Client, value: str) -> None:
    assert client.post(PREDICT, content=IMAGES, headers={**TENSORS, "If-Match": value}).status_code == 200


def test_unknown_places_and_methods(client: httpx.Client) -> None:
    require_problem(client.get("/nowhere"), 404)
    require_problem(client.get("/v1/teachers/"), 404)
    require_problem(client.get("/v1/teachers/other"), 404, "toy")
    require_problem(client.post("/v1/teachers/other/predict", content=IMAGES, headers=TENSORS), 404)
    answer = client.get(PREDICT)
    require_problem(answer, 405, "GET")
    assert answer.headers["allow"] == "POST"


def test_a_body_of_unknown_length_is_stopped_where_it_grows_too_long(client: httpx.Client) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield bytes(4096)
            time.sleep(0.005)

    require_problem(client.post(PREDICT, content=chunks(), headers=TENSORS), 413, "10000")


def test_a_body_in_chunks_is_taken(client: httpx.Client) -> None:
    answer = client.post(PREDICT, content=iter([IMAGES[:50], IMAGES[50:]]), headers=TENSORS)
    assert torch.equal(unpack_tensors(answer.content)["values"], toy_logits(views(1)))


@given(st.binary(max_size=400), st.sampled_from(["application/safetensors", "image/png", "image/jpeg", "image/webp"]))
@settings(max_examples=60)
def test_noise_is_never_our_fault(client: httpx.Client, content: bytes, media: str) -> None:
    answer = client.post(PREDICT, content=content, headers={"Content-Type": media})
    require_problem(answer, 422)


@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP"]))
@settings(max_examples=80)
def test_damaged_pictures_are_answered_or_refused(client: httpx.Client, place: int, byte: int, kind: str) -> None:
    data = bytearray(picture(kind, (12, 12)))
    data[place % len(data)] = byte
    media = {"Content-Type": f"image/{kind.lower()}"}
    answer = client.post(PREDICT, content=bytes(data), headers=media)
    if answer.status_code != 200:
        require_problem(answer, answer.status_code)
        assert answer.status_code in (413, 422)


def test_request_ids_are_echoed_or_made(client: httpx.Client) -> None:
    assert client.get("/livez", headers={"X-Request-Id": "my-1.a_B"}).headers["x-request-id"] == "my-1.a_B"
    made = []
    for _ in range(2):
        # A teacher's own code may do this.
        random.seed(1)
        made.append(client.get("/livez", headers={"X-Request-Id": "a b<"}).headers["x-request-id"])
    assert made[0] != made[1]
    assert "<" not in made[0]


# ---------------------------------------------------------------- keys


KEY = "correct-horse"
PLACES = ["/v1/teachers", "/v1/teachers/toy", "/nowhere", "/openapi.json", "/livez/", "/docs", "/%2Flivez"]


@pytest.fixture(scope="module")
def closed() -> Iterator[httpx.Client]:
    """A service with a key."""
    with serving(toy_served(open_gate(ToyTeacher())), api_key=KEY) as client:
        yield client


@pytest.mark.parametrize(
    "given_",
    ["", "Bearer", "Bearer wrong", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer é"],
)
def test_without_the_key_only_the_probes_answer(closed: httpx.Client, given_: str) -> None:
    headers = {"Authorization": given_.encode("latin-1")} if given_ else {}
    for place in PLACES:
        answer = closed.get(place, headers=headers)
        problem = require_problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in answer.text
        assert problem["value"] == "(hidden)"
    require_problem(closed.post(f"{PREDICT}?nonsense=1", content=b"", headers=headers), 401)
    assert closed.get("/livez", headers=headers).status_code == 200
    assert closed.get("/readyz", headers=headers).status_code == 200


def test_the_key_opens(closed: httpx.Client) -> None:
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {KEY}"}
        assert closed.get("/v1/teachers", headers=headers).status_code == 200
        answer = closed.post(PREDICT, content=IMAGES, headers={**TENSORS, **headers})
        assert answer.status_code == 200


# ---------------------------------------------------------------- capacity, deadlines, failures


def test_a_full_queue_refuses_and_readyz_says_so() -> None:
    teacher = ToyTeacher()
    served = toy_served(teacher)
    with serving(served, max_images=8, queue_images=8) as client:
        answers: list[httpx.Response] = []

        def call(seed: int) -> None:
            content = pack_images(views(8, seed))
            answers.append(client.post(PREDICT, content=content, headers=TENSORS))

        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(2)]
        threads[0].start()
        assert teacher.entered.acquire(timeout=20)
        threads[1].start()
        wait_until(lambda: client.get("/readyz").status_code == 503)
        require_problem(client.get("/readyz"), 503, "full queue")
        refused = client.post(PREDICT, content=IMAGES, headers=TENSORS)
        require_problem(refused, 503, "queue")
        assert int(refused.headers["retry-after"]) >= 1
        require_refused_before_its_body(client)
        # The event loop is free while the model is not.
        assert client.get("/livez").elapsed.total_seconds() < 1
        teacher.gate.set()
        [thread.join() for thread in threads]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert client.get("/readyz").status_code == 200


def require_refused_before_its_body(client: httpx.Client) -> None:
    """What will be refused need not be read; the connection goes on behind it."""
    with contextlib.closing(http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=10)) as link:
        link.putrequest("POST", PREDICT)
        for name, value in {**TENSORS, "Content-Length": str(len(IMAGES))}.items():
            link.putheader(name, value)
        link.endheaders()
        answer = link.getresponse()
        assert answer.status == 503
        assert json.loads(answer.read())["field"] == "queue"
        link.sock.sendall(IMAGES)
        link.request("GET", "/livez")
        assert link.getresponse().status == 200


def test_a_deadline_that_passes_is_504_and_its_work_is_dropped() -> None:
    teacher = ToyTeacher()
    with serving(toy_served(teacher)) as client:
        first = threading.Thread(target=client.post, args=(PREDICT,), kwargs={"content": IMAGES, "headers": TENSORS})
        first.start()
        assert teacher.entered.acquire(timeout=20)
        content = pack_images(views(2, 5))
        late = client.post(PREDICT, content=content, headers={**TENSORS, "X-Deadline-Ms": "50"})
        require_problem(late, 504, "X-Deadline-Ms")
        teacher.gate.set()
        first.join()
        kept = client.post(PREDICT, content=content, headers={**TENSORS, "X-Deadline-Ms": "20000"})
        assert kept.status_code == 200
    assert len(teacher.batches) == 2


def test_work_of_a_client_that_hangs_up_is_dropped() -> None:
    teacher = ToyTeacher()
    with serving(toy_served(teacher)) as client:
        first = threading.Thread(target=client.post, args=(PREDICT,), kwargs={"content": IMAGES, "headers": TENSORS})
        first.start()
        assert teacher.entered.acquire(timeout=20)
        with pytest.raises(httpx.ReadTimeout):
            client.post(PREDICT, content=pack_images(views(3, 5)), headers=TENSORS, timeout=0.2)
        time.sleep(0.2)
        teacher.gate.set()
        first.join()
        assert torch.equal(ask(client, views(2, 6))["values"], toy_logits(views(2, 6)))
    assert len(teacher.batches) == 2


def test_a_poison_fails_alone_and_tells_nothing() -> None:
    teacher = ToyTeacher()
    with serving(toy_served(teacher)) as client:
        asked = [views(1, seed) for seed in range(5)]
        asked[3][0, 0, 0, 0] = POISON
        answers: dict[int, httpx.Response] = {}

        def call(number: int) -> None:
            answers[number] = client.post(PREDICT, content=pack_images(asked[number]), headers=TENSORS)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(5)]
        threads[0].start()
        assert teacher.entered.acquire(timeout=20)
        [thread.start() for thread in threads[1:]]
        wait_until(lambda: len(client._transport._pool.connections) >= 5)  # type: ignore[attr-defined]
        time.sleep(0.2)
        teacher.gate.set()
        [thread.join() for thread in threads]
    require_problem(answers.pop(3), 500, "teacher")
    for number, answer in answers.items():
        assert torch.equal(unpack_tensors(answer.content)["values"], toy_logits(asked[number]))
    assert int((teacher.batches[1] != 0).flatten(1).any(1).sum()) == 4


def test_an_internal_error_tells_nothing(monkeypatch: pytest.MonkeyPatch, client: httpx.Client) -> None:
    def fails(*_arguments: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr("services.predicting.respond", fails)
    require_problem(client.post(PREDICT, content=IMAGES, headers=TENSORS), 500)
    monkeypatch.undo()
    assert client.post(PREDICT, content=IMAGES, headers=TENSORS).status_code == 200


# ---------------------------------------------------------------- settings


def test_an_open_door_to_the_network_is_refused() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org", ""):
        with pytest.raises(SpecError, match="api_key") as refused:
            Settings(host=host)
        assert refused.value.value == host
        assert Settings(host=host, api_key=KEY).host == host  # type: ignore[arg-type]
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert Settings(host=host).host == host


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "new\nline"])
def test_a_key_that_no_header_can_carry_is_refused_and_hidden(key: str) -> None:
    with pytest.raises(SpecError, match="api_key") as refused:
        Settings(api_key=key)  # type: ignore[arg-type]
    assert refused.value.value == "(hidden)"


def test_the_key_is_not_shown() -> None:
    assert KEY not in repr(Settings(api_key=KEY))  # type: ignore[arg-type]


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SpecError, match="queue_images"):
        Settings(max_images=10, queue_images=9)
    with pytest.raises(SpecError, match="max_images"):
        create_app({"toy": toy_served(ToyTeacher(), micro_batch=8)}, Settings(max_images=7))
    with pytest.raises(SpecError, match="teachers"):
        create_app({}, Settings())


def test_a_hundred_identical_questions_at_once_are_one_forward_pass() -> None:
    """Each comes on a connection of its own, and gets its own answer."""
    teacher, body = ToyTeacher(), pack_images(views(3, 7))
    app = create_app({"toy": toy_served(teacher)}, Settings(queue_images=1024))
    with running(app) as base, ThreadPoolExecutor(100) as pool:
        batcher = app.state.service.batchers["toy"]
        wait_until(lambda: batcher.warm)
        asked = [pool.submit(httpx.post, base + PREDICT, content=body, headers=TENSORS, timeout=60) for _ in range(100)]
        wait_until(lambda: sum(len(one.waiters) for one in batcher._backlog._asked.values()) == 100, 60)
        teacher.gate.set()
        answers = [one.result(60) for one in asked]
    assert {answer.status_code for answer in answers} == {200}
    assert all(torch.equal(unpack_tensors(answer.content)["values"], toy_logits(views(3, 7))) for answer in answers)
    assert len(teacher.batches) == 1
