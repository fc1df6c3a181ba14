"""JSON answers, written a few rows at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json
from toy_service_models import CLASSES, ToyTeacher, toy_served

from services import answers
from services.options import PredictOptions, resolve
from services.schemas import Predictions


@given(st.integers(1, 9), st.sampled_from(["logits", "probs", "topk"]), st.integers(1, 30))
def test_rows_that_are_written_apart_are_the_document_of_the_schema(count: int, output: str, at_once: int) -> None:
    served = toy_served(ToyTeacher())
    options = PredictOptions(output=output, k=3) if output == "topk" else PredictOptions(output=output)  # type: ignore[arg-type]
    wanted = resolve(options, dict(served.field_shapes), tensors=False)
    logits_BC = torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(count))
    logits_BC[0, 0] = -math.inf
    tensors = answers.transform({"logits": logits_BC}, wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "_AT_ONCE", at_once)
        written = b"".join(answers.as_json(tensors, served, wanted, resized=True))
    found = Predictions.model_validate_json(written)
    assert found.model_dump_json(exclude_none=True).encode() == written
    plain = json.loads(written)
    assert plain["digest"] == served.digest
    for name, value in tensors.items():
        assert plain[name] == json.loads(to_json(value.tolist(), inf_nan_mode="null"))
    if output == "topk":
        assert plain["names"] == [[f"class {index}" for index in row] for row in plain["indices"]]


def test_no_call_writes_more_than_a_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is at work, no other thread is."""
    sizes: list[int] = []

    def counted(value: object, **options: object) -> bytes:
        sizes.append(sum(map(len, value)) if isinstance(value, list) else 1)
        return to_json(value, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(answers, "to_json", counted)
    served = toy_served(ToyTeacher())
    wanted = resolve(PredictOptions(), dict(served.field_shapes), tensors=False)
    written = b"".join(answers.as_json({"values": torch.rand(200, 1000)}, served, wanted, resized=False))
    assert len(json.loads(written)["values"]) == 200
    assert max(sizes) <= answers._AT_ONCE
