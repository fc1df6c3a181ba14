"""Configurations of training runs: what may be written in a YAML file for `fit` and `compare`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from student_train.term_specs import ObjectiveSpec
from student_train.view_order import ViewOrder
from teacher_cache.proof import Tolerance
from teacher_cache.spec import NormalizeSpec, SourceSpec, Strict, ViewSpec


def _here(path: str) -> str:
    if "://" in path:
        raise ValueError("must be a folder of this machine")
    return path


Here = Annotated[str, AfterValidator(_here)]
"""A folder that cannot be in an object store."""


class StudentSpec(Strict):
    """A model by name; the data says how many classes and channels it has.

    Ours are `small_cnn`, `resnet20_cifar`, `resnet56_cifar`, `resnet18`, `vgg16` and `densenet121`. `timm:<name>` and
    `torchvision:<name>` are classifiers of those packages, without weights, the latter for 3 channels.
    `module:attribute` is called with `classes` and `channels`.
    """

    model: str
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="of the model itself, such as `width`; they win over what the data says"
    )


def _default(spec: type[Strict], name: str) -> Any:
    return spec.model_fields[name].default


class TrainSpec(Strict):
    """The optimiser, its schedule and the batches."""

    epochs: int = Field(gt=0)
    batch_size: int = Field(default=128, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0, description="for sgd; adamw wants about a hundredth of the default")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd only; Nesterov's form")
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["cosine", "constant", "step", "one_cycle"] = "cosine"
    milestones: tuple[float, ...] = Field(default=(0.5, 0.75), description="`step`: shares of the run, 0..1")
    step_factor: float = Field(default=0.1, gt=0, lt=1, description="`step`: what the rate is multiplied by there")
    warmup: float = Field(default=0.0, ge=0, lt=1, description="share of the run in which the rate rises from 0")
    clip_norm: float | None = Field(default=None, gt=0, description="longest gradient, of all weights together")
    accumulate: int = Field(
        default=1, gt=0, description="batches whose gradients make one step, each counting the same"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="by autocast")
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="share that a running average of the weights keeps at each step"
    )
    compile: bool = Field(default=False, description="the student's forward pass by torch.compile")
    deterministic: bool = Field(default=False, description="refuse operations that give other bits on every run")
    drop_last: bool = True
    check_views: int | None = Field(
        default=None, ge=0, description="views of each batch that are proven, where they are the teacher's"
    )
    views_per_decode: int = Field(default=1, gt=0, description="views of one row in a batch, from one decoding")
    view_order: ViewOrder = Field(
        default="epoch", description="all rows show the same view, or each goes through them: `cycle`, `random`"
    )
    workers: int = Field(default=0, ge=0, description="processes that prepare batches")
    threads: int | None = Field(default=None, gt=0, description="torch threads; tiny students run fastest with 1")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _of_its_schedule(self) -> TrainSpec:
        told = {name for name in ("milestones", "step_factor") if getattr(self, name) != _default(type(self), name)}
        if told and self.schedule != "step":
            raise ValueError(f"`{min(told)}` is for `schedule: step`")
        return self

    @model_validator(mode="after")
    def _of_its_optimizer(self) -> TrainSpec:
        if self.optimizer == "adamw" and self.momentum != _default(type(self), "momentum"):
            raise ValueError("`momentum` is for `optimizer: sgd`")
        return self

    @field_validator("milestones")
    @classmethod
    def _in_order(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if sorted(set(milestones)) != list(milestones) or any(not 0 < place < 1 for place in milestones):
            raise ValueError("must rise, each above 0 and below 1")
        return milestones


class DataSpec(Strict):
    """A cache, or a labelled source with its views where there is no teacher to learn from."""

    cache: str | None = None
    source: SourceSpec | None = Field(default=None, description="with `cache`: where the data set is now")
    maps: Here | None = Field(default=None, description="a folder in which a Parquet cache's shards are kept decoded")
    copies: Here | None = Field(default=None, description="a folder in which the files of a cache at s3:// are kept")
    views: ViewSpec | None = Field(default=None, description="with `cache`: the student's own, not the teacher's")
    first_views: int | None = Field(default=None, gt=0, description="use only so many of the cached views")
    size: int | tuple[int, int] | None = Field(default=None, description="the student's own input size")
    tolerance: Tolerance = Field(default="exact", description="`rounding`: views may be one level of 255 away")

    @model_validator(mode="after")
    def _fits(self) -> DataSpec:
        if self.cache is None and (self.source is None or self.views is None):
            raise ValueError("give either `cache`, or `source` and `views`")
        if (self.cache is None or self.views is not None) and (self.size is not None or self.tolerance != "exact"):
            raise ValueError("`size` and `tolerance` are for the views that the teacher saw: leave out `views`")
        for name, value in (("maps", self.maps), ("copies", self.copies), ("first_views", self.first_views)):
            if value is not None and self.cache is None:
                raise ValueError(f"`{name}` is for a cache")
        if self.size is not None and min(self.size if isinstance(self.size, tuple) else (self.size,)) < 1:
            raise ValueError("`size` must be above 0")
        return self


class EvaluateSpec(Strict):
    """Labelled data to measure on: a source with a recipe without randomness, or a cache of one such view.

    With a cache the student is also held against the teacher whose answers it has.
    """

    cache: str | None = None
    source: SourceSpec | None = Field(default=None, description="with `cache`: where the data set is now")
    views: ViewSpec | None = None
    teacher: str = Field(default="logits", description="with `cache`: the field that the student is held against")

    @model_validator(mode="after")
    def _fits(self) -> EvaluateSpec:
        if (self.cache is None) != (self.views is not None) or (self.cache is None and self.source is None):
            raise ValueError("give either `cache`, or `source` and `views`")
        if self.cache is None and self.teacher != _default(type(self), "teacher"):
            raise ValueError("`teacher` is for a cache")
        return self


class ValidationSpec(Strict):
    """A part of the training rows that is not trained on, for every choice that is made.

    Without `views` it is shown as the evaluation data is.
    """

    share: float = Field(gt=0, lt=1, description="about so many of the rows, chosen by their keys")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the choice; the same for every arm and seed")
    views: ViewSpec | None = Field(default=None, description="without randomness; where not given, as in `evaluate`")


class RunSpec(Strict):
    """What `fit` and `compare` share."""

    run: Here = Field(description="the folder for checkpoints, metrics and results")
    data: DataSpec
    student: StudentSpec
    normalize: NormalizeSpec | None = Field(default=None, description="the recipe's `normalize` where not given")
    train: TrainSpec
    tensorboard: bool = Field(default=False, description="metrics also for TensorBoard, below `run`")
    evaluate: EvaluateSpec
    validation: ValidationSpec | None = Field(
        default=None, description="measured after every epoch; the evaluation data is then measured after the last one"
    )


class FitSpec(RunSpec):
    """One run of one student."""

    objective: ObjectiveSpec
    seed: int = Field(default=0, ge=0, lt=2**32)


class ArmSpec(Strict):
    """One way of training that is compared: an objective, and data where it is not the run's."""

    objective: ObjectiveSpec
    data: DataSpec | None = Field(default=None, description="the run's `data` where not given")
    normalize: NormalizeSpec | None = Field(default=None, description="the run's where not given")

    @model_validator(mode="before")
    @classmethod
    def _bare_objective(cls, value: Any) -> Any:
        return {"objective": value} if isinstance(value, list | tuple) else value


ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]{0,63}$")]
"""Also the name of a folder, and in a picture."""


class CompareSpec(RunSpec):
    """Several arms, each with every seed; equal seeds share initial weights and order."""

    arms: dict[ArmName, ArmSpec] = Field(min_length=2, description="the first is what others are held against")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(default=(0, 1, 2), min_length=2)

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("must be different: a seed that is named twice is one run, and no second one")
        return seeds
