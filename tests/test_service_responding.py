"""JSON answers, written a few rows at a time."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json
from toy_service_models import CLASSES, ToyTeacher, toy_served

from services import responding
from services.answers import top_k
from services.large_response import SLICE
from services.schemas import Predictions
from services.status import Answer, Status

STATUS = st.lists(
    st.sampled_from([Status.CACHED, Status.COMPUTED, Status.FAILED, Status.BROKEN]), min_size=1, max_size=9
)
ABOUT: dict[str, Any] = {
    "teacher": "toy",
    "digest": "0" * 64,
    "temperature": 1.0,
    "resized": False,
    "rounding": None,
    "encodings": {"logits": "dense_f16"},
}


def written(answer: Answer, output: str) -> bytes:
    """The whole document."""
    return b"".join(responding.pieces_of(answer, toy_served(ToyTeacher()), {**ABOUT, "output": output}))


@given(STATUS, st.booleans(), st.integers(1, 30))
def test_rows_that_are_written_apart_are_the_document_of_the_schema(
    status: list[Status], sorted_: bool, at_once: int
) -> None:
    logits_BC = torch.randn(len(status), CLASSES, generator=torch.Generator().manual_seed(len(status)))
    logits_BC[0, 0] = -math.inf
    tensors = top_k(logits_BC, 3) if sorted_ else {"values": logits_BC}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responding, "_AT_ONCE", at_once)
        document = written(Answer(tensors, status, {}, {}), "topk" if sorted_ else "logits")
    assert Predictions.model_validate_json(document).model_dump_json(exclude_none=True).encode() == document
    plain = json.loads(document)
    for name, value in tensors.items():
        rows = json.loads(to_json(value.tolist(), inf_nan_mode="null"))
        assert plain[name] == [row if one.answered else None for row, one in zip(rows, status, strict=True)]
    if sorted_:
        assert [row and [f"class {index}" for index in row] for row in plain["indices"]] == plain["names"]


def test_where_nothing_is_answered_there_are_nulls() -> None:
    plain = json.loads(written(Answer({}, [Status.FAILED, Status.BROKEN], {}, {}), "logits"))
    assert plain["values"] == [None, None]
    assert plain["status"] == ["failed", "broken"]


def test_no_call_writes_more_than_a_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is at work, no other thread is."""
    sizes: list[int] = []

    def counted(value: Any, **options: Any) -> bytes:
        sizes.append(sum(map(len, value)) if isinstance(value, list) and isinstance(value[0], list) else 1)
        return to_json(value, **options)

    monkeypatch.setattr(responding, "to_json", counted)
    document = written(Answer({"values": torch.rand(2000, 100)}, [Status.COMPUTED] * 2000, {}, {}), "logits")
    assert len(json.loads(document)["values"]) == 2000
    assert responding._AT_ONCE // 2 <= max(sizes) <= responding._AT_ONCE


def test_few_rows_are_no_write_of_their_own() -> None:
    """A thousand writes of 20 kB would take the event loop longer than eighty of 256 kB."""
    answer = Answer({"values": torch.rand(2000, 100)}, [Status.COMPUTED] * 2000, {}, {})
    about = {**ABOUT, "output": "logits"}
    sizes = [len(piece) for piece in responding.pieces_of(answer, toy_served(ToyTeacher()), about)]
    assert len(sizes) > 3
    assert max(sizes) <= SLICE
    assert min(sizes[:-1]) > 0.9 * SLICE
