"""Bodies of the Open Inference Protocol: JSON, and behind it the tensors that are sent in binary."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator
from torch import Tensor

from services.naming import members
from services.problems import Problem
from services.tensor_body import Buffer

_TYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8")}
FILES = "BYTES"
_HINT = "See GET /v2/models/<name> for what it takes."

Name = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Dimension = Annotated[StrictInt, Field(ge=1, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SentParameters(_Part):
    """Of a tensor that is sent."""

    binary_data_size: Annotated[StrictInt, Field(ge=0)] | None = None
    """Bytes behind the JSON."""


class Sent(_Part):
    """A tensor of the request."""

    name: Name
    shape: tuple[Dimension, ...] = Field(min_length=1, max_length=8)
    datatype: StrictStr
    parameters: SentParameters = SentParameters()
    data: list[Any] | None = None


class RequestedParameters(_Part):
    """Of a tensor of the answer."""

    binary_data: StrictBool | None = None


class Requested(_Part):
    """A tensor of the answer."""

    name: Name
    parameters: RequestedParameters = RequestedParameters()


class Inference(_Part):
    """The JSON of a request."""

    id: Annotated[StrictStr, Field(max_length=128)] | None = None
    model_name: StrictStr | None = None
    parameters: dict[Name, StrictBool | StrictInt | float | StrictStr] = Field(default={}, max_length=32)
    inputs: tuple[Sent, ...] = Field(min_length=1, max_length=8)
    outputs: tuple[Requested, ...] = Field(default=(), max_length=64)

    @model_validator(mode="after")
    def _once(self) -> Inference:
        if len({one.name for one in self.outputs}) < len(self.outputs):
            raise ValueError("outputs must each be named once")
        return self


def cut(data: Buffer, header: str | None) -> tuple[memoryview, memoryview]:
    """A body to its JSON and what lies behind it.

    Args:
        data: the body.
        header: the length of the JSON, as the request's header has it; None where all of the body is JSON.

    Raises:
        Problem: 400, the header is no length, or not of a part of this body.
    """
    if header is None:
        return memoryview(data), memoryview(b"")
    # Not isdigit() alone: ² is a digit, too.
    length = int(header) if header.isascii() and header.isdigit() and len(header) < 16 else -1
    if not 0 < length <= len(data):
        rule = "must be how many bytes of the body are JSON"
        raise Problem(400, "Inference-Header-Content-Length", rule, header, "Leave it out where all of them are.")
    return memoryview(data)[:length], memoryview(data)[length:]


def parse_inference(text: memoryview) -> Inference:
    """JSON to a request; raises a 400 `Problem` where it is none."""
    try:
        return Inference.model_validate(json.loads(bytes(text).decode(), object_pairs_hook=members))
    except RecursionError:
        raise Problem(400, "body", "must be an inference request", "one that is nested too deeply", _HINT) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Only of the schema: what else stands in the body is its sender's content.
        path = ".".join(str(part) for part in first["loc"][:1] if part in Inference.model_fields)
        raise Problem(
            400, path or "body", str(first["msg"]).removeprefix("Value error, "), "another value", _HINT
        ) from None
    except ValueError:
        raise Problem(400, "body", "must be JSON", f"{len(text)} bytes that are none", _HINT) from None


def tensors_of(asked: Inference, behind: memoryview, most_files: int) -> dict[str, Tensor | list[bytes]]:
    """The tensors of a request by name; of encoded files (BYTES) a list.

    Args:
        asked: the JSON.
        behind: what lies behind it.
        most_files: in one tensor.

    Raises:
        Problem: 413 for too many files, 422 where sizes, shapes and types do not fit.
    """
    sizes = [sent.parameters.binary_data_size for sent in asked.inputs]
    if sum(size or 0 for size in sizes) != len(behind):
        rule = "must sum to the bytes behind the JSON"
        raise Problem(422, "binary_data_size", rule, f"{len(behind)} of them", _HINT)
    found: dict[str, Tensor | list[bytes]] = {}
    start = 0
    for sent, size in zip(asked.inputs, sizes, strict=True):
        if sent.name in found or (sent.data is None) == (size is None):
            rule = "must each be there once, with `data` or in binary"
            raise Problem(422, "inputs", rule, sent.name, _HINT)
        raw = None if size is None else behind[start : start + size]
        start += size or 0
        if sent.datatype == FILES:
            found[sent.name] = _files(sent, raw, most_files)
        else:
            found[sent.name] = _numbers(sent, raw)
    return found


def _numbers(sent: Sent, raw: memoryview | None) -> Tensor:
    dtype = _TYPES.get(sent.datatype)
    if dtype is None:
        raise Problem(422, sent.name, f"must be {', '.join([*_TYPES, FILES])}", sent.datatype, _HINT)
    if raw is None:
        array = _of_json(sent, dtype)
    elif len(raw) == math.prod(sent.shape) * dtype.itemsize:
        array = np.frombuffer(raw, dtype)
    else:
        raise Problem(422, sent.name, f"must have the bytes of its shape {list(sent.shape)}", len(raw), _HINT)
    # A copy: torch wants memory that may be written to.
    return torch.from_numpy(array.reshape(sent.shape).astype(dtype.newbyteorder("=")))


def _of_json(sent: Sent, dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    rows, bounds = sent.data or [], np.iinfo(dtype)
    rule = f"must be integers that {sent.datatype} holds, of shape {list(sent.shape)}, flat or nested"
    if isinstance(rows[0] if rows else None, list):
        for size in sent.shape[1:]:
            if not all(isinstance(row, list) and len(row) == size for row in rows):
                raise Problem(422, sent.name, rule, "rows of other lengths", _HINT)
            rows = list(chain.from_iterable(rows))
    # Looked at one by one before NumPy sees them: it would make room for the longest text, once for each item.
    if len(rows) != math.prod(sent.shape) or any(type(one) is not int for one in rows):
        raise Problem(422, sent.name, rule, "others", _HINT)
    if min(rows) < bounds.min or max(rows) > bounds.max:
        raise Problem(422, sent.name, rule, "numbers beyond it", _HINT)
    return np.array(rows, dtype)


def _files(sent: Sent, raw: memoryview | None, most: int) -> list[bytes]:
    """Files in a row, each behind its length in four bytes."""
    count = math.prod(sent.shape)
    if raw is None:
        raise Problem(422, sent.name, "must be sent in binary where it is BYTES", "JSON", "JSON carries no bytes.")
    if count > most:
        raise Problem(413, sent.name, f"must hold at most {most}", count, "Send several requests.")
    files, place = [], 0
    for _ in range(count):
        length = int.from_bytes(raw[place : place + 4], "little")
        if place + 4 + length > len(raw):
            break
        files.append(bytes(raw[place + 4 : place + 4 + length]))
        place += 4 + length
    if len(files) != count or place != len(raw):
        rule = f"must be {count} files, each behind its length in four bytes"
        raise Problem(422, sent.name, rule, f"{len(raw)} bytes that are none", _HINT)
    return files


def flag(parameters: Mapping[str, object], name: str) -> bool:
    """A parameter that is yes or no; no where it is not there; raises a 400 `Problem` where it is neither."""
    found = parameters.get(name, False)
    if not isinstance(found, bool):
        raise Problem(400, name, "must be true or false", found, _HINT)
    return found
