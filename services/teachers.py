"""A teacher with all that the service must know about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from services.device_process import Load, ProcessTeacher
from services.library import Library
from services.policy import Policy
from services.same_teacher import key_of
from services.schemas import OUTPUTS, DatasetCard, FieldCard, InputCard, LimitsCard, NumericsCard, TeacherCard
from services.settings import Settings
from teacher_cache.addition import Addition
from teacher_cache.errors import CacheNotFoundError, TeacherError
from teacher_cache.manifest import read_manifest
from teacher_cache.plan import first_views, fitted, load_here, open_parts, probe
from teacher_cache.spec import BuildSpec, FieldSpec, NormalizeSpec, base_of
from teacher_cache.storage.root import open_root
from teacher_cache.teachers import Teacher, resolve_device


@dataclass(frozen=True)
class ServedTeacher:
    """One teacher as it is offered."""

    name: str
    """The last part of its URL."""
    teacher: Teacher
    """Called in one thread only."""
    view_shape: tuple[int, int, int]
    """(C, H, W) of one uint8 input."""
    micro_batch: int
    """Rows of every forward pass, the tail padded with zeros: what gives the bits of a precompute job."""
    class_names: tuple[str, ...] | None
    field_shapes: Mapping[str, tuple[int, ...]]
    """Of one row, float32."""
    pools: Mapping[str, str]
    """How each field is pooled: `none` or `mean`."""
    normalize: NormalizeSpec | None = None
    precision: str = "fp32"
    channels_last: bool = False
    threads: int = 1
    """torch threads of the thread that runs it; more or fewer can change a logit's last bit."""
    device: str = "cpu"
    example_CHW: Tensor | None = field(default=None, repr=False, compare=False)
    """A view that it is warmed with, uint8; None warms it with zeros."""
    library: Library | None = None
    """The samples that may be named, and the cache of their answers."""

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.threads < 1 or len(self.view_shape) != 3:
            raise ValueError(f"impossible: {self.micro_batch=} {self.threads=} {self.view_shape=}")

    @property
    def view_bytes(self) -> int:
        """Of one uint8 input."""
        return math.prod(self.view_shape)

    @property
    def pinned(self) -> bool:
        """Whether its inputs wait in memory that a GPU fetches without a copy on the way."""
        return self.device == "cuda" and not isinstance(self.teacher, ProcessTeacher)

    @property
    def digest(self) -> str:
        """The teacher's fingerprint."""
        return self.teacher.fingerprint

    @property
    def classes(self) -> int:
        """How many; 0 where it has no logits, and so no classes."""
        return self.field_shapes.get("logits", (0,))[0]

    @property
    def numerics(self) -> NumericsCard:
        """What decides the last bit of an answer."""
        return NumericsCard(
            precision=self.precision, channels_last=self.channels_last, threads=self.threads, device=self.device
        )

    @property
    def answers_key(self) -> str:
        """What a kept answer is good for."""
        return key_of(self.digest, self.numerics, self.micro_batch)

    def card(self, settings: Settings, policy: Policy, dataset: DatasetCard | None = None) -> TeacherCard:
        """What `GET /v1/teachers/{name}` answers to a key: what it may have, and its limits.

        Args:
            settings: the server's limits.
            policy: the key's.
            dataset: what may be named, if anything may.
        """
        channels, height, width = self.view_shape
        offered = OUTPUTS if "logits" in self.field_shapes else ("logits",)
        outputs = tuple(name for name in offered if policy.outputs is None or name in policy.outputs)
        features = policy.outputs is None or "features" in policy.outputs
        fields = [name for name in self.field_shapes if (outputs if name == "logits" else features)]
        return TeacherCard(
            name=self.name,
            digest=self.digest,
            class_names=self.class_names,
            input=InputCard(
                shape=(height, width, channels),
                mean=self.normalize.mean if self.normalize else None,
                std=self.normalize.std if self.normalize else None,
            ),
            outputs=outputs,
            fields={name: FieldCard(shape=self.field_shapes[name], pool=self.pools[name]) for name in fields},
            micro_batch=self.micro_batch,
            numerics=self.numerics,
            dataset=_allowed(dataset, policy, fields),
            limits=LimitsCard(
                images=settings.max_images,
                body_bytes=settings.max_body_bytes,
                pixels=settings.max_pixels,
                **policy.model_dump(exclude={"teachers", "outputs"}),
            ),
        )


def _allowed(dataset: DatasetCard | None, policy: Policy, fields: list[str]) -> DatasetCard | None:
    """What a key may know of a data set."""
    if dataset is None or (policy.datasets is not None and dataset.name not in policy.datasets):
        return None
    encodings = {field: name for field, name in dataset.encodings.items() if field in fields}
    return dataset.model_copy(update={"encodings": encodings})


def servable(spec: BuildSpec) -> BuildSpec:
    """A build's configuration as it is served: `logits` and `logits@small` are one answer, kept in two ways.

    Raises:
        TeacherError: a field cannot be served, or is pooled in two ways.
    """
    reasons = {"flow": "a request names its fields with commas between them", "saliency": "requests bring no labels"}
    for name in spec.teacher.fields:
        reason = reasons.get(base_of(name).partition(":")[0])
        if reason is not None:
            raise TeacherError(f"teacher.fields.{name}", f"cannot be served: {reason}", name, "Leave it out.")
    fields: dict[str, FieldSpec] = {}
    for name, given in spec.teacher.fields.items():
        known = fields.setdefault(base_of(name), FieldSpec(pool=given.pool))
        if known.pool != given.pool:
            hint = "Serve a configuration that has it once."
            raise TeacherError(f"teacher.fields.{name}", "must be pooled in one way to be served", given.pool, hint)
    return spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"fields": fields})})


def _built_before(spec: BuildSpec) -> list[Addition]:
    """What this teacher has answered of the configuration's cache: in micro-batches that may have been halved."""
    try:
        manifest = read_manifest(open_root(spec.cache))
    except CacheNotFoundError:
        return []
    return [item for item in manifest.additions if item.teacher == spec.teacher.name]


def open_served(spec: BuildSpec, *, from_cache: bool = True, load: Load = load_here) -> ServedTeacher:
    """The teacher of a build's configuration, probed once; its source gives the class names.

    Args:
        spec: the configuration.
        from_cache: whether what its cache holds may be answered from there.
        load: gives the teacher itself; `teachers_apart` has it in another process.

    Raises:
        RequestError: the source, the recipe or the teacher cannot be opened, or they do not fit.
        CacheError: the cache is not this configuration's, or cannot be trusted.
    """
    spec = servable(spec)
    opened = open_parts(spec, load)
    _, views = first_views(opened)
    _, channels, height, width = views.pixels_BCHW.shape
    shape = (channels, height, width)
    opened = fitted(opened, shape, _built_before(spec) if from_cache else [])
    spec = opened.spec
    shapes = probe(opened, shape)
    if len(shapes.get("logits", (1,))) != 1:
        rule = "must be [batch, classes] to be served"
        raise TeacherError("teacher.fields.logits", rule, shapes["logits"], "Serve another teacher.")
    return ServedTeacher(
        name=spec.teacher.name,
        teacher=opened.teacher,
        view_shape=shape,
        micro_batch=spec.teacher.micro_batch,
        class_names=spec.teacher.class_names or opened.source.class_names,
        field_shapes=dict(sorted(shapes.items())),
        pools={name: given.pool for name, given in spec.teacher.fields.items()},
        normalize=spec.teacher.normalize or opened.recipe.normalize,
        precision=spec.teacher.precision,
        channels_last=spec.teacher.channels_last,
        threads=spec.compute.threads,
        device=resolve_device(spec.compute.device),
        example_CHW=views.pixels_BCHW[0].cpu(),
        library=Library(opened, cached=from_cache),
    )
