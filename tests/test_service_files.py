"""Many encoded files in one body: each answered or broken by itself, within limits that hold for all together."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_service_http import animation, bomb, deep, require_problem
from toy_service_models import POISON, ToyTeacher, open_gate, picture, serving, toy_logits, toy_served, views

from services.async_client import AsyncTeacherClient
from services.client import TeacherClient
from services.images import decode, media_type_of_file
from services.picture_files import grouped
from services.pixels import PixelBudget
from services.schemas import LimitsCard
from services.settings import Settings
from services.status import Status
from services.upload import decoded
from services.wire import pack_images, pack_tensors, unpack_tensors
from teacher_cache.errors import ServiceError, TeacherError

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}
FILES = [picture("PNG", seed=1), picture("WEBP", (12, 9), seed=2), picture("JPEG", (8, 8), seed=3)]
KINDS = ["image/png", "image/webp", "image/jpeg"]
TEACHER = open_gate(ToyTeacher())


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """A service that takes 20 images and 5,000 pixels."""
    with serving(toy_served(TEACHER), max_images=20, max_pixels=5000, max_body_bytes=40_000) as client:
        yield client


def body(files: list[bytes], **more: torch.Tensor) -> bytes:
    offsets = torch.tensor([0, *map(len, files)]).cumsum(0)
    blob = torch.tensor(list(b"".join(files)), dtype=torch.uint8)
    return pack_tensors({"blob": blob, "offsets": offsets, **more})


def post(http: httpx.Client, content: bytes, accept: str = "*/*", **options: Any) -> httpx.Response:
    return http.post(PREDICT, content=content, headers={**TENSORS, "Accept": accept}, params=options)


def pixels(data: bytes, kind: str) -> torch.Tensor:
    """A file as it would be alone."""
    return decode(data, kind, (3, 8, 8), PixelBudget(10**6))[0]


def test_files_of_each_kind_are_answered_as_each_would_be_alone(http: httpx.Client) -> None:
    found = unpack_tensors(post(http, body(FILES)).content)
    alone = torch.cat([pixels(*pair) for pair in zip(FILES, KINDS, strict=True)])
    assert torch.equal(found["values"], toy_logits(alone))
    assert found["resized"].tolist() == [0, 1, 0]
    assert found["resized"].dtype == torch.uint8
    shown = post(http, body(FILES), "application/json", output="gather").json()
    assert shown["field"] == "classes"
    classes = torch.tensor([[1], [2], [3]])
    shown = post(http, body(FILES, classes=classes), "application/json", output="gather").json()
    assert shown["resized"] == [False, True, False]
    assert shown["indices"] == [[1], [2], [3]]


BROKEN = {
    "empty": b"",
    "text": b"GIF89a, or so it says",
    "a GIF": picture("GIF"),
    "cut": picture("PNG")[:60],
    "an animation": animation(),
    "16 bits": deep(),
    "no pixels": bomb(8, 8),
    "RIFF that is no WebP": b"RIFF\x04\x00\x00\x00WAVE",
    "a PNG behind a blank": b" " + picture("PNG"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_spoils_no_other(http: httpx.Client, name: str) -> None:
    files = [FILES[0], BROKEN[name], FILES[2]]
    before, counted = len(TEACHER.batches), http.get("/v1/usage").json()["images"]
    found = unpack_tensors(post(http, body(files)).content)
    assert found["status"].tolist() == [Status.COMPUTED, Status.BROKEN, Status.COMPUTED]
    assert http.get("/v1/usage").json()["images"] == counted + 2, "what cannot be answered costs nothing"
    assert torch.equal(found["values"][2], toy_logits(pixels(FILES[2], KINDS[2]))[0])
    assert found["values"][1].isnan().all()
    # It is black in the batch, so that the others lie where they would.
    assert not TEACHER.batches[before][1].any()
    shown = post(http, body(files), "application/json").json()
    assert (shown["status"][1], shown["values"][1]) == ("broken", None)
    require_problem(post(http, body(files), strict=True), 422, "item 1 is broken")
    require_problem(post(http, body([BROKEN[name]])), 422, "item 0 is broken")


def test_the_poison_of_one_file_is_its_own(http: httpx.Client) -> None:
    poison = torch.full((3, 8, 8), POISON, dtype=torch.uint8)

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(poison.permute(1, 2, 0))).save(buffer, "PNG")
    found = unpack_tensors(post(http, body([buffer.getvalue(), b"", FILES[0]])).content)
    assert found["status"].tolist() == [Status.FAILED, Status.BROKEN, Status.COMPUTED]


N = len(FILES[0])
ONE = torch.tensor(list(FILES[0]), dtype=torch.uint8)
LIES: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
    "not from 0": (ONE, torch.tensor([1, N])),
    "short of the end": (ONE, torch.tensor([0, N - 1])),
    "beyond the end": (ONE, torch.tensor([0, N + 1])),
    "backwards": (ONE, torch.tensor([0, N, N - 5, N])),
    "below zero": (ONE, torch.tensor([0, -5, N])),
    "a difference that overflows": (ONE, torch.tensor([0, 2**63 - 1, -2, N])),
    "far": (ONE, torch.tensor([0, 2**62, N])),
    "of no file": (ONE[:0], torch.tensor([0])),
    "none": (ONE, torch.zeros(0, dtype=torch.int64)),
    "of 32 bits": (ONE, torch.tensor([0, N], dtype=torch.int32)),
    "in two rows": (ONE, torch.tensor([[0, N]])),
    "a blob of numbers": (ONE.int(), torch.tensor([0, N])),
    "a blob of rows": (ONE[None], torch.tensor([0, 1])),
}


@pytest.mark.parametrize("name", LIES)
def test_offsets_that_do_not_divide_the_blob_are_refused(http: httpx.Client, name: str) -> None:
    blob, offsets = LIES[name]
    problem = require_problem(post(http, pack_tensors({"blob": blob, "offsets": offsets})), 422)
    assert problem["field"] in ("blob", "offsets")


@pytest.mark.parametrize("names", [("blob",), ("offsets",), ("blob", "offsets", "images"), ("blob", "offsets", "x")])
def test_other_tensors_are_refused(http: httpx.Client, names: tuple[str, ...]) -> None:
    known = {"blob": ONE, "offsets": torch.tensor([0, N])}
    tensors = {name: known.get(name, views(1).permute(0, 2, 3, 1)) for name in names}
    assert require_problem(post(http, pack_tensors(tensors)), 422)["field"] == "body"


def test_all_files_together_are_within_the_limits(http: httpx.Client) -> None:
    require_problem(post(http, body([b""] * 21)), 413, "images")
    assert post(http, body([FILES[0]] * 20)).status_code == 200
    large = picture("JPEG", (50, 50))
    assert post(http, body([large, large])).status_code == 200
    require_problem(post(http, body([large, FILES[0], large])), 413, "5064")
    require_problem(post(http, body([FILES[0], bomb(60_000, 60_000)])), 413, "pixels")


def test_what_is_resized_counts_together_too() -> None:
    """A strip of 1 × 20 pixels becomes 8 × 160: twenty of them are small before, and 25,600 pixels after."""
    strip = picture("PNG", (1, 20))
    served, limits = toy_served(TEACHER), Settings(max_pixels=5000)
    assert len(decoded([strip] * 3, served, limits).views_BCHW) == 3
    with pytest.raises(Exception, match="5120"):
        decoded([strip] * 4, served, limits)
    # What any picture may become is free: otherwise not even a full request of small ones could be sent.
    assert not decoded([picture("PNG", (4, 12))] * 50, served, limits).broken


@pytest.mark.parametrize(("data", "kind"), list(zip(FILES, KINDS, strict=True)))
def test_a_kind_is_told_by_the_very_beginning(data: bytes, kind: str) -> None:
    assert media_type_of_file(data) == kind
    for other in (b" " + data, data[1:], data[:2], b"", b"RIFF\x04\0\0\0WAVE" + data, b"RIFF\n\n\n\nWAVEWEBP"):
        assert media_type_of_file(other) is None
    assert media_type_of_file(b"RIFF\n\n\n\nWEBP") == "image/webp"


@given(st.binary(max_size=40))
def test_noise_has_no_kind_that_it_is_not(data: bytes) -> None:
    kind = media_type_of_file(data)
    assert kind is None or data[:4] in (b"\x89PNG", b"RIFF") or data[:3] == b"\xff\xd8\xff"


@given(st.lists(st.binary(max_size=12), max_size=4), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6))
def test_any_offsets_are_answered_or_refused(http: httpx.Client, files: list[bytes], offsets: list[int]) -> None:
    blob = torch.tensor(list(b"".join(files)), dtype=torch.uint8)
    answer = post(http, pack_tensors({"blob": blob, "offsets": torch.tensor(offsets, dtype=torch.int64)}))
    require_problem(answer, 413 if len(offsets) > 21 else 422)


# ---------------------------------------------------------------- clients


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    for name, data in zip(("a.png", "b.webp", "c.jpg"), FILES, strict=True):
        (tmp_path / name).write_bytes(data)
    return [tmp_path / name for name in ("a.png", "b.webp", "c.jpg")]


def test_clients_send_files_in_one_request(http: httpx.Client, paths: list[Path]) -> None:
    before = len(TEACHER.batches)
    with TeacherClient(f"{http.base_url}/toy") as client:
        found = client.predict_files(paths, output="topk", k=2, dtype="f16", lse=True)
    assert len(TEACHER.batches) == before + 1
    assert found.resized == (False, True, False)
    assert found.values is not None
    assert (found.values.dtype, tuple(found.values.shape)) == (torch.float16, (3, 2))

    async def ask() -> Any:
        async with AsyncTeacherClient(f"{http.base_url}/toy") as client:
            return await client.predict_files(paths, output="topk", k=2, dtype="f16", lse=True)

    again = asyncio.run(ask())
    assert torch.equal(again.values, found.values)
    assert again.resized == found.resized


def test_a_broken_file_is_named_or_left_out(http: httpx.Client, paths: list[Path]) -> None:
    paths[1].write_bytes(b"nothing")
    with TeacherClient(f"{http.base_url}/toy") as client:
        with pytest.raises(ServiceError, match="item 1 is broken"):
            client.predict_files(paths)
        assert client.predict_files(paths, strict=False).status[1] is Status.BROKEN
        with pytest.raises(TeacherError, match="at least one"):
            client.predict_files([])
        with pytest.raises(TeacherError, match="must end in"):
            client.predict_files([*paths, "x.gif"])
        (paths[0].parent / "empty.png").write_bytes(b"")
        with pytest.raises(ServiceError, match="item 0 is broken"):
            client.predict_files([paths[0].parent / "empty.png"])


def test_files_are_shared_out_among_requests_that_fit(paths: list[Path]) -> None:
    def sizes(**limits: int) -> list[int]:
        most = {"images": 100, "body_bytes": 10**6, "pixels": 10**6, **limits}
        return [len(group) for group in grouped(paths * 3, LimitsCard(**most))]  # type: ignore[arg-type]

    assert sizes() == [9]
    assert sizes(images=4) == [4, 4, 1]
    # 64, 108 and 64 pixels.
    assert sizes(pixels=172) == [2, 2, 2, 2, 1]
    assert sizes(pixels=10) == [1] * 9
    assert sum(sizes(body_bytes=4096 + len(FILES[0]) + len(FILES[1]) + 16)) == 9
    assert sizes(body_bytes=4096 + len(FILES[0]) + len(FILES[1]) + 16)[0] == 2
    paths[0].write_bytes(b"no picture")
    assert sizes(pixels=172) == [4, 3, 2]


def test_images_beside_files_stay_what_they_were(http: httpx.Client) -> None:
    found = unpack_tensors(post(http, pack_images(views(2))).content)
    assert "resized" not in found
