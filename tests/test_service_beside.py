"""Small work is done on the event loop, all other beside it; what comes of it is the same."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save
from toy_service_models import ToyTeacher, open_gate, picture, serving, toy_logits, toy_served, views

from services.beside import SMALL, beside
from services.upload import size_of
from services.wire import MEDIA_TYPE, pack_images, unpack_tensors

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": MEDIA_TYPE}


@pytest.mark.parametrize(
    ("size", "as_json", "here"),
    [
        (0, False, True),
        (SMALL, False, True),
        (SMALL + 1, False, False),
        (math.inf, False, False),
        (SMALL // 8, True, True),
        (SMALL // 8 + 1, True, False),
    ],
)
def test_by_its_size(size: float, as_json: bool, here: bool) -> None:
    def fail() -> None:
        raise KeyError("as it is")

    async def both() -> None:
        assert (await beside(threading.get_ident, size, as_json=as_json) == threading.get_ident()) is here
        with pytest.raises(KeyError, match="as it is"):
            await beside(fail, size, as_json=as_json)

    asyncio.run(both())


def files(count: int) -> bytes:
    """A body with files in it, whose header does not spell out what it has."""
    data = [picture("PNG", seed=seed) for seed in range(count)]
    stops = torch.tensor([0, *torch.tensor([len(one) for one in data]).cumsum(0).tolist()])
    body = save({"blob": torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8), "offsets": stops})
    length = int.from_bytes(body[:8], "little")
    header = body[8 : 8 + length].rstrip().replace(b'"blob"', b'"\\u0062lob"')
    return len(header).to_bytes(8, "little") + header + body[8 + length :]


def test_files_are_never_small() -> None:
    assert size_of(files(2), MEDIA_TYPE) == size_of(picture("PNG"), "image/png") == math.inf
    assert size_of(pack_images(views(2)), MEDIA_TYPE) < SMALL
    assert size_of(pack_images(views(SMALL // 192 + 1)), MEDIA_TYPE) == math.inf
    assert size_of(b"\x08" + bytes(7) + b"nonsense", MEDIA_TYPE) == 16


def test_a_crowd_of_tensors_is_not_small() -> None:
    few, crowd = (save({str(number): torch.empty(0) for number in range(count)}) for count in (4, 400))
    assert len(crowd) < SMALL
    assert (size_of(few, MEDIA_TYPE), size_of(crowd, MEDIA_TYPE)) == (len(few), math.inf)


@pytest.fixture
def where(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The name of the thread in which each step of a question was last done."""
    seen: dict[str, str] = {}

    def watch(place: str) -> None:
        module, _, name = place.rpartition(".")
        work: Callable[..., Any] = getattr(__import__(module, fromlist=[name]), name)

        def watched(*given: Any, **named: Any) -> Any:
            seen[name] = threading.current_thread().name
            return work(*given, **named)

        monkeypatch.setattr(place, watched)

    for place in ("predicting.uploaded", "asking.plan_images", "answering.assembled", "predicting.respond"):
        watch(f"services.{place}")
    return seen


@pytest.mark.parametrize("count", [1, 200])
@pytest.mark.parametrize("accept", [MEDIA_TYPE, "application/json"])
def test_every_step_of_a_question(count: int, accept: str, where: dict[str, str]) -> None:
    sent_BCHW = views(count)
    with serving(toy_served(open_gate(ToyTeacher()))) as client:
        answer = client.post(
            f"{PREDICT}?output=logits", content=pack_images(sent_BCHW), headers=TENSORS | {"Accept": accept}
        )
    found = unpack_tensors(answer.content)["values"] if accept == MEDIA_TYPE else answer.json()["values"]
    assert torch.equal(torch.as_tensor(found), toy_logits(sent_BCHW))
    # 200 images are large; their answers of 7 classes are large as text.
    pooled = {step for step, thread in where.items() if thread.startswith("asyncio_")}
    large = {"uploaded", "plan_images"} | (set() if accept == MEDIA_TYPE else {"respond"})
    assert pooled == (large if count == 200 else set())
    assert len(where) == 4


def test_files(where: dict[str, str]) -> None:
    with serving(toy_served(open_gate(ToyTeacher()))) as client:
        answer = client.post(PREDICT, content=files(2), headers=TENSORS)
    assert answer.status_code == 200, answer.text
    assert {step for step, thread in where.items() if thread.startswith("asyncio_")} == {"uploaded"}
