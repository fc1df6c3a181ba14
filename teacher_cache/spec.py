"""The build's configuration: what may be written in a YAML file, and nothing else.

Every model forbids unknown keys and refuses bad values with a `SpecError` that names the field, the rule, the
value and the nearest known key. A spec is plain data: it travels to workers and into the manifest as JSON.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from teacher_cache.errors import SpecError
from teacher_cache.service_spec import REMOTE_ONLY, ServiceSpec


class Strict(BaseModel):
    """Frozen, closed, and strict about unknown keys: the base of every configuration model."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TakeSpec(Strict):
    """A seeded subset by identity: the same samples whatever order the source lists them in."""

    count: int = Field(gt=0, description="how many samples to keep")
    seed: int = Field(default=0, ge=0, description="another seed keeps another subset")


class DigitsSource(Strict):
    """scikit-learn's digits: 1,797 greyscale images of 8×8."""

    kind: Literal["digits"]
    split: Literal["train", "test", "all"] = "all"
    take: TakeSpec | None = None


class FolderSource(Strict):
    """One folder for each class; the class names are the folders' names, sorted."""

    kind: Literal["folder"]
    path: str
    channels: Literal[1, 3] | None = Field(default=None, description="bring every image to grey or RGB")
    take: TakeSpec | None = None


class ParquetSource(Strict):
    """Columns `image` {bytes, path} and `label`: the layout of Hugging Face data sets."""

    kind: Literal["parquet"]
    path: str | tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    channels: Literal[1, 3] | None = Field(default=None, description="bring every image to grey or RGB")
    take: TakeSpec | None = None


class TorchvisionSource(Strict):
    """Any class of `torchvision.datasets` whose items are (image, label)."""

    kind: Literal["torchvision"]
    dataset: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    channels: Literal[1, 3] | None = Field(default=None, description="bring every image to grey or RGB")
    take: TakeSpec | None = None


class NumpySource(Strict):
    """Two `.npy` files: images uint8 [N, H, W] or [N, H, W, C], and integer labels [N]."""

    kind: Literal["numpy"]
    images: str
    labels: str | None = None
    class_names: tuple[str, ...] | None = None
    take: TakeSpec | None = None


SourceSpec = Annotated[
    DigitsSource | FolderSource | ParquetSource | TorchvisionSource | NumpySource, Field(discriminator="kind")
]


class ViewSpec(Strict):
    """Either a recipe of native operations or the user's own callable, and how many views of each sample."""

    recipe: tuple[dict[str, dict[str, Any]], ...] | None = None
    callable: str | None = Field(default=None, description="module:attribute, uint8 [C, H, W] in and out")
    seed: int = Field(default=0, ge=0, lt=2**64)
    count: int = Field(default=1, gt=0, lt=2**32)

    @field_validator("recipe", mode="before")
    @classmethod
    def _bare_names_have_no_parameters(cls, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return value
        return tuple({item: {}} if isinstance(item, str) else item for item in value)

    @model_validator(mode="after")
    def _one_of_two(self) -> ViewSpec:
        if (self.recipe is None) == (self.callable is None):
            raise ValueError("give exactly one of `recipe` and `callable`")
        return self


class NormalizeSpec(Strict):
    """Per-channel mean and standard deviation of pixels scaled to 0..1, as torchvision's Normalize."""

    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> NormalizeSpec:
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError("mean and std need one value for each channel, every std above 0")
        return self


class DenseF32(Strict):
    """Values as they are: 4 bytes a number."""

    kind: Literal["dense_f32"]


class DenseF16(Strict):
    """Values rounded to half precision: 2 bytes a number, refused when one overflows."""

    kind: Literal["dense_f16"]


class DenseBF16(Strict):
    """Values rounded to bfloat16: 2 bytes a number, the range of float32, 8 bits of precision."""

    kind: Literal["dense_bf16"]


class DenseU8(Strict):
    """One byte a logit: steps below the row's maximum, of a fixed size or of the row's own."""

    kind: Literal["dense_u8"]
    mode: Literal["fixed", "row"] = Field(default="fixed", description="`row`: 255 steps span each row's range")
    step: float = Field(default=0.125, gt=0, le=1, description="nats for one level, where the step is fixed")

    @model_validator(mode="after")
    def _fits(self) -> DenseU8:
        if self.mode == "row" and "step" in self.model_fields_set and self.step != DenseU8.model_fields["step"].default:
            raise ValueError("`step` has no meaning with `mode: row`, where each row has its own")
        return self


class DenseU4(Strict):
    """Half a byte a logit: fifteen steps span each row's range."""

    kind: Literal["dense_u4"]


Tail = Literal["uniform", "prior", "ghost", "renormalise"]
"""How the classes that a sparse encoding leaves out share their mass."""


class TopK(Strict):
    """The k largest logits, and the log-mass of what was left out."""

    kind: Literal["top_k"]
    k: int = Field(gt=0)
    values: Literal["f16", "u8"] = Field(default="f16", description="`u8`: 256 levels, fine near the maximum")
    ids: Literal["whole", "packed"] = Field(default="whole", description="`packed`: as few bits as the classes need")
    tail: Tail = Field(default="uniform", description="how the classes left out share their mass")

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Caches of before these choices must keep their identity.
        later = {name: TopK.model_fields[name].default for name in ("values", "ids", "tail")}
        return {name: value for name, value in handler(self).items() if value != later.get(name, ...)}


class Nucleus(Strict):
    """The smallest set of classes that holds a share of the mass: few where the teacher is sure, more where not."""

    kind: Literal["nucleus"]
    mass: float = Field(gt=0, le=1, description="at T = 1; the set is the smallest that holds it")
    cap: int = Field(gt=0, description="classes that a row may have at most")
    values: Literal["f16", "u8"] = Field(default="f16", description="`u8`: 256 levels, fine near the maximum")


class FeatureHead(Strict):
    """What the teacher's last linear layer reads, a byte a number, and that layer once: logits at any temperature."""

    kind: Literal["feature_head"]
    head: str | None = Field(default=None, description="the nn.Linear that answers; the last one where not given")
    width: int | None = Field(default=None, gt=0, description="of its input; found when planning")


class U8Channel(Strict):
    """One byte a number, with a range for each channel from calibration: features only."""

    kind: Literal["u8_channel"]


class SampledK(Strict):
    """k classes drawn by their probability, weighted so that the teacher's distribution is their expectation."""

    kind: Literal["sampled_k"]
    k: int = Field(gt=0)
    temperature: float = Field(default=1.0, gt=0, description="at which they are drawn; no other may be used")
    scheme: Literal["threshold", "replacement"] = Field(default="threshold", description="`replacement` is a baseline")


AnyEncoding = DenseF32 | DenseF16 | DenseBF16 | DenseU8 | DenseU4 | TopK | SampledK | Nucleus | FeatureHead | U8Channel
EncodingSpec = Annotated[AnyEncoding, Field(discriminator="kind")]


class Auto(Strict):
    """The smallest encoding whose error on the user's own rows stays below a bound; chosen when planning."""

    kind: Literal["auto"] = "auto"
    max_kl: float = Field(gt=0, description="mean KL(teacher ‖ decoded) in nats, at every temperature below")
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0, 4.0), min_length=1)
    max_bytes: int | None = Field(default=None, gt=0, description="of a row")


ChosenEncoding = Annotated[AnyEncoding | Auto, Field(discriminator="kind")]

HEAD_INPUT = "logits:head"
"""The name under which a teacher answers what its head reads, beside its fields."""
LOGITS_ONLY = ("top_k", "dense_u8", "dense_u4", "sampled_k", "nucleus", "feature_head", "auto")


def base_of(field: str) -> str:
    """A field without its label: `logits@small` is another encoding of `logits`."""
    return field.partition("@")[0]


def is_logits(field: str) -> bool:
    """Whether a field holds logits, under a label or not."""
    return base_of(field) == "logits"


def nodes_of(field: str) -> tuple[str, ...]:
    """The nodes of a model that a field is made of: two of `flow:<a>,<b>`, none of logits."""
    kind, _, nodes = base_of(field).partition(":")
    return tuple(nodes.split(",")) if kind == "flow" else (nodes,) if nodes else ()


def needs_label(field: str) -> bool:
    """Whether a field is made with the row's label: the gradient of that label's logit."""
    return base_of(field) == "saliency"


_NODES = {"logits": 0, "saliency": 0, "feature": 1, "attention": 1, "flow": 2}
"""Kinds of fields, and how many nodes each is made of."""
_UNPOOLED = {"attention": "map", "flow": "matrix", "saliency": "map of the input"}
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class FieldSpec(Strict):
    """One output of the teacher, and how it is kept."""

    pool: Literal["none", "mean"] = Field(default="none", description="`mean` averages [C, H, W] to [C]")
    encoding: ChosenEncoding = DenseF16(kind="dense_f16")

    @field_validator("encoding", mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "max_kl" in value and "kind" not in value:
            return {"kind": "auto", **value}
        return {"kind": value} if isinstance(value, str) else value

    @property
    def fixed(self) -> EncodingSpec:
        """The encoding, where it is not left to be chosen."""
        assert not isinstance(self.encoding, Auto), "planning has chosen"
        return self.encoding


def _logits_only() -> dict[str, FieldSpec]:
    return {"logits": FieldSpec()}


class TeacherSpec(ServiceSpec):
    """Which frozen model answers, on what, and what is kept of its answers."""

    name: str = Field(default="teacher", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    model: str = Field(description="torchvision:<name>, timm:<name>, module:attribute, FILE.pt2 or http(s)://…")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the constructor")
    weights: str | None = Field(default=None, description=".safetensors or .pt state dict")
    normalize: NormalizeSpec | None = Field(default=None, description="the recipe's `normalize` where not given")
    class_names: tuple[str, ...] | None = Field(default=None, description="the order of the teacher's head")
    fields: dict[str, FieldSpec] = Field(default_factory=_logits_only, min_length=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    micro_batch: int = Field(default=64, gt=0, description="rows in one forward pass; part of the identity")

    @field_validator("fields", mode="before")
    @classmethod
    def _bare_fields(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: ({} if field is None else field) for name, field in value.items()}
        return {name: {} for name in value} if isinstance(value, list | tuple) else value

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, value: dict[str, FieldSpec]) -> dict[str, FieldSpec]:
        for name, field in value.items():
            base, at, label = name.partition("@")
            kind, colon, _ = base.partition(":")
            nodes = nodes_of(base)
            if len(nodes) != _NODES.get(kind, -1) or not all(nodes) or bool(colon) != bool(nodes):
                known = "`logits`, `feature:<node>`, `attention:<node>`, `flow:<a>,<b>` and `saliency`"
                raise ValueError(f"field {name!r} is none of {known}")
            if at and not _LABEL.fullmatch(label):
                raise ValueError(f"field {name!r} needs a label of letters, digits, `_`, `.` and `-` behind its @")
            if at and field.encoding.kind in ("auto", "feature_head"):
                raise ValueError(f"field {name!r} has a label: `{field.encoding.kind}` is for `logits` alone")
            if kind in _UNPOOLED and field.pool != "none":
                raise ValueError(f"field {name!r} is a {_UNPOOLED[kind]} already: leave out `pool`")
            if kind == "saliency" and field.encoding.kind == "u8_channel":
                raise ValueError("`u8_channel` spends its levels on the few large numbers of a gradient: use dense_f16")
            if base != "logits" and field.encoding.kind in LOGITS_ONLY:
                raise ValueError(f"`{field.encoding.kind}` keeps logits only, and {name!r} is a feature")
            if base == "logits" and field.encoding.kind == "u8_channel":
                raise ValueError("`u8_channel` keeps features only: use dense_u8 for logits")
        return value

    @model_validator(mode="after")
    def _differentiable(self) -> TeacherSpec:
        if self.precision == "fp16" and any(map(needs_label, self.fields)):
            raise ValueError("`saliency` needs precision fp32 or bf16: small gradients vanish in fp16")
        return self

    @model_validator(mode="after")
    def _remote(self) -> TeacherSpec:
        given = next((name for name in REMOTE_ONLY if name in self.model_fields_set), None)
        if given is not None and "://" not in self.model:
            raise ValueError(f"`{given}` is for teachers behind a URL, and {self.model!r} is here")
        if self.model in self.replicas or len(set(self.replicas)) < len(self.replicas):
            raise ValueError("`replicas` names a URL twice; `model` is the first one")
        return self


class StoreSpec(Strict):
    """How rows lie on disk."""

    kind: Literal["zarr", "parquet"] = "zarr"
    shard_rows: int = Field(default=1024, gt=0, description="rows in one file: the unit of work and of commit")
    chunk_rows: int = Field(default=256, gt=0, description="rows under one checksum (Zarr)")

    @model_validator(mode="after")
    def _divides(self) -> StoreSpec:
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows ({self.shard_rows}) is not a multiple of chunk_rows ({self.chunk_rows})")
        return self


class ComputeSpec(Strict):
    """Where the work runs. `threads` can change the last bit of a logit, so it is part of the identity."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda)$")
    workers: int | None = Field(default=None, gt=0, description="default: one for each GPU, else each `threads` cores")
    threads: int = Field(default=1, gt=0, description="torch threads of one worker")
    views_per_decode: int = Field(default=4, gt=0, description="views made from one decoded image, in one shard's work")
    attempts: int = Field(default=3, gt=0, description="tries for a shard whose worker died")
    on_oom: Literal["fail", "halve"] = Field(
        default="fail", description="`halve` teacher.micro_batch until it fits the device, when a cache is begun"
    )


class FidelitySpec(Strict):
    """How many rows of each shard are decoded again and compared with the exact logits."""

    rows_per_shard: int = Field(default=32, ge=0)
    max_kl: float | None = Field(
        default=None, gt=0, description="mean KL in nats, at T = 1, 2 and 4; beyond it the build fails"
    )

    @model_validator(mode="after")
    def _measures(self) -> FidelitySpec:
        if self.max_kl is not None and self.rows_per_shard == 0:
            raise ValueError("`max_kl` needs rows to measure on: set rows_per_shard above 0")
        return self


class BuildSpec(Strict):
    """The whole of a build."""

    cache: str
    source: SourceSpec
    views: ViewSpec
    teacher: TeacherSpec
    store: StoreSpec = StoreSpec()
    compute: ComputeSpec = ComputeSpec()
    fidelity: FidelitySpec = FidelitySpec()


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], data: object, where: str) -> Model:
    """Validates plain data against a configuration model.

    Raises:
        SpecError: naming the first offending field, the rule, the value, and the nearest known key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(str(part) for part in first["loc"]) or "the configuration"
        hint = f"Correct it in {where}."
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), _known_keys(model), n=1)
            hint = (f"Did you mean `{near[0]}`? " if near else "Remove it. ") + hint
            raise SpecError(location, "is not a known key", first["input"], hint) from None
        raise SpecError(location, first["msg"].removeprefix("Value error, "), first["input"], hint) from None


def _known_keys(model: type[BaseModel]) -> list[str]:
    schema = model.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return sorted({key for part in parts for key in part.get("properties", {})})


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a YAML mapping and applies `dotted.key=value` overrides (values are YAML too).

    Raises:
        SpecError: the file is missing or is not a mapping, or an override has no `=`.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(str(path), "must be a readable YAML file", error, "Check the path and its syntax.") from None
    if not isinstance(data, dict):
        raise SpecError(str(path), "must hold a mapping", type(data).__name__, "See examples/digits.yaml.")
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise SpecError("--set", "must be KEY=VALUE", override, "For example --set store.kind=parquet.")
        try:
            _assign(data, key.split("."), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise SpecError("--set", "must be KEY=VALUE with a YAML value", override, str(error)) from None
    return data


def _assign(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SpecError("--set", f"`{key}` is not a mapping", inner, "Set it as a whole.")
        data = inner
    data[keys[-1]] = value


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> BuildSpec:
    """Reads a build's configuration.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value` strings that replace what the file says.
    """
    return parse(BuildSpec, read_yaml(path, overrides), str(path))
