"""The JSON bodies that the service answers. Legend: B images, C classes, K kept classes, H×W pixels."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

Output = Literal["logits", "logprobs", "probs", "topk", "gather"]
Dtype = Literal["f32", "f16", "bf16"]
CacheUse = Literal["prefer", "only", "refresh", "bypass"]
"""Cache and journal first; those alone; computed, and kept anew; computed, neither read nor kept."""
OUTPUTS: tuple[Output, ...] = ("logits", "logprobs", "probs", "topk", "gather")
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


class SpanCard(Body):
    """From `low` to `high`, both allowed."""

    low: float
    high: float


class LimitsCard(Body):
    """What one request may ask for: of this server, then of this key; there, None is no limit."""

    images: int
    body_bytes: int
    """JSON may have an eighth of them."""
    pixels: int
    """Of all encoded files of a request together."""
    temperature: tuple[float, float] = (MIN_TEMPERATURE, MAX_TEMPERATURE)
    by_id_only: bool = False
    """Images are not taken."""
    largest_k: int | None = None
    temperatures: tuple[float, ...] | SpanCard | None = None
    rounding: float | None = None
    """Every floating value of an answer is a multiple of it; so the values are not, bit for bit, the teacher's."""
    images_per_second: float | None = None
    images_per_day: int | None = None
    """From 00:00 to 24:00 UTC."""
    distinct_images: int | None = None
    datasets: tuple[str, ...] | None = None
    expires: datetime | None = None


class DatasetCard(Body):
    """The samples that may be named instead of sent."""

    name: str
    """As policies call it."""
    samples: int
    recipe: str
    """Fingerprint of the views."""
    cached_views: int
    """Planned views of the cache; 0 where there is none. A lookup tells what is there."""
    encodings: dict[str, str]
    """How the cache keeps the fields of this teacher."""


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
    dataset: DatasetCard | None = None
    limits: LimitsCard


class TeacherList(Body):
    """`GET /v1/teachers`."""

    teachers: tuple[TeacherCard, ...]


class UsageReport(Body):
    """`GET /v1/usage`: answered images only. What is left is None where there is no limit."""

    key: str
    requests: int
    images: int
    images_under_way: int
    """Asked for today and not answered yet; not left, until they fail."""
    day: str
    """In UTC."""
    images_today: int
    images_today_left: int | None
    images_per_second: float | None
    distinct_images: int | None
    """None where they are not limited, and so not counted."""
    distinct_images_left: int | None


class Lookup(Body):
    """`POST /v1/teachers/{name}/lookup`."""

    teacher: str
    digest: str
    status: tuple[str, ...]
    """For each key `cached`, `computable`, `unknown`, `broken` or `differs`."""


class TeacherLoad(Body):
    """How busy one teacher is, whoever asks it."""

    name: str
    images_waiting: int
    queue_images: int
    """How many may wait."""
    images_per_second: float
    batch_fill: float | None
    """Mean share of a batch's rows that were images; None where no batch has run."""


class LoadReport(Body):
    """`GET /v1/load`: of the teachers that this key may ask, now and over the last `seconds`."""

    seconds: int
    draining: bool
    """Whether the server is on its way out."""
    teachers: tuple[TeacherLoad, ...]


class Predictions(Body):
    """A JSON answer; a number that is not finite is null, and so is a whole row without an answer."""

    teacher: str
    digest: str
    output: Output
    temperature: float
    resized: bool | list[bool]
    """Whether the image was resized and cropped to the teacher's input; of several files, each."""
    rounding: float | None = None
    """Step of every number of `values`, `tail_logmass` and `lse`, where this key's answers are rounded."""
    status: list[str]
    """What became of each item: `cached`, `kept` and `computed` have values; `absent`, `unknown`, `broken`, `differs`
    and `failed` have none."""
    encodings: dict[str, str]
    """How the cache keeps the fields of which something was read."""
    values: list[list[float | None] | None]
    """[B, C], or [B, K] log-probabilities: sorted down for `topk`, as the classes were named for `gather`."""
    indices: list[list[int] | None] | None = None
    """[B, K] class numbers; equal values of a `topk` stand in the order of their classes."""
    tail_logmass: list[float | None] | None = None
    """[B] log of the probability left out; null where nothing is."""
    lse: list[float | None] | None = None
    """[B] log-sum-exp of the raw logits, where it was asked for."""
    names: list[list[str] | None] | None = None
    """[B, K] class names, where they are known."""
