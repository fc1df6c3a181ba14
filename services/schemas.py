"""The JSON bodies that the service answers. Legend: B images, C classes, K kept classes, H×W pixels."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Output = Literal["logits", "logprobs", "probs", "topk"]
OUTPUTS: tuple[Output, ...] = ("logits", "logprobs", "probs", "topk")
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1000.0


class Body(BaseModel):
    """Base of all answers. A newer server's extra members are ignored by an older client."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")


class Probe(Body):
    """`/livez` and `/readyz`."""

    status: str


class InputCard(Body):
    """What `images` must be, and what is done to it before the network."""

    dtype: Literal["uint8"] = "uint8"
    layout: Literal["NHWC"] = "NHWC"
    shape: tuple[int, int, int]
    """(H, W, C) of one image."""
    scale: str = "x / 255, then (x - mean) / std for each channel"
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


class FieldCard(Body):
    """One output of the teacher."""

    shape: tuple[int, ...]
    """Of one image; values are float32."""
    pool: str


class NumericsCard(Body):
    """What decides the last bit of an answer."""

    precision: str
    channels_last: bool
    threads: int
    device: str


class LimitsCard(Body):
    """What one request may ask for."""

    images: int
    body_bytes: int
    pixels: int
    temperature: tuple[float, float] = (MIN_TEMPERATURE, MAX_TEMPERATURE)


class TeacherCard(Body):
    """`GET /v1/teachers/{name}`; its digest is the ETag."""

    name: str
    digest: str
    """The teacher's fingerprint: weights, architecture, preprocessing, precision, fields."""
    class_names: tuple[str, ...] | None
    input: InputCard
    outputs: tuple[Output, ...]
    fields: dict[str, FieldCard]
    micro_batch: int
    """Rows of one forward pass; a request of exactly so many has the bits of a precompute job."""
    numerics: NumericsCard
    limits: LimitsCard


class TeacherList(Body):
    """`GET /v1/teachers`."""

    teachers: tuple[TeacherCard, ...]


class Predictions(Body):
    """A JSON answer; a number that is not finite is null."""

    teacher: str
    digest: str
    output: Output
    temperature: float
    resized: bool
    """Whether the image was resized and cropped to the teacher's input."""
    values: list[list[float | None]]
    """[B, C], or [B, K] log-probabilities, sorted down, for `topk`."""
    indices: list[list[int]] | None = None
    """[B, K] class numbers; equal values stand in the order of their classes."""
    tail_logmass: list[float | None] | None = None
    """[B] log of the probability left out; null where nothing is."""
    names: list[list[str]] | None = None
    """[B, K] class names, where they are known."""
