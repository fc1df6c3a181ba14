"""The terms of an objective as a configuration writes them: the names and defaults of the terms themselves."""

from __future__ import annotations

from typing import Annotated, Any, Literal, assert_never

from pydantic import Field, field_validator

from student_train.ensemble_terms import EnsembleKD, HeadsKD
from student_train.feature_terms import AttentionTransfer, Feature, Relations, SimilarityPreserving
from student_train.flow_term import Flow
from student_train.objective import Objective, Term
from student_train.saliency_term import Saliency
from student_train.seed_term import SEED
from student_train.temperature_term import LearnedTemperatureKD
from student_train.terms import DIST, DKD, KD, NKD, CrossEntropy, LogitMSE
from student_train.weight import Schedule
from teacher_cache.errors import SpecError
from teacher_cache.spec import Strict

Positive = Annotated[float, Field(gt=0)]
WeightSpec = Positive | tuple[tuple[float, float], ...]
"""A number, or points (progress, weight) that it follows: `[[0, 1], [0.5, 1], [0.5, 0]]` ends half-way."""


class _Spec(Strict):
    weight: WeightSpec = 1.0

    @field_validator("weight")
    @classmethod
    def _is_schedule(cls, weight: WeightSpec) -> WeightSpec:
        try:
            return weight if not isinstance(weight, tuple) else Schedule(weight).points
        except SpecError as error:
            raise ValueError(error.rule) from error

    @property
    def told(self) -> dict[str, Any]:
        """The arguments of the term."""
        told = {name: getattr(self, name) for name in type(self).model_fields if name != "kind"}
        return told | {"weight": Schedule(self.weight) if isinstance(self.weight, tuple) else self.weight}


class CrossEntropySpec(_Spec):
    """Hard labels."""

    kind: Literal["cross_entropy"]
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class _OfLogits(_Spec):
    field: str = Field(default="logits", description="the cached field that holds the teacher's logits")


class KDSpec(_OfLogits):
    """Soft targets from the cache."""

    kind: Literal["kd"]
    temperature: Positive = 4.0
    standardise: bool = Field(default=False, description="both sides' logits to mean 0 and deviation 1 first")


class LogitMSESpec(_OfLogits):
    """Squared difference of centred logits."""

    kind: Literal["logit_mse"]


class DISTSpec(_OfLogits):
    """Correlation within rows and within classes."""

    kind: Literal["dist"]
    temperature: Positive = 1.0
    rows_weight: float = Field(default=1.0, ge=0)
    classes_weight: float = Field(default=1.0, ge=0)


class DKDSpec(_OfLogits):
    """Soft targets taken apart."""

    kind: Literal["dkd"]
    temperature: Positive = 4.0
    label_weight: float = Field(default=1.0, ge=0, description="the paper's α")
    others_weight: float = Field(default=8.0, ge=0, description="the paper's β")


class NKDSpec(_OfLogits):
    """Normalised soft targets."""

    kind: Literal["nkd"]
    temperature: Positive = 1.0
    others_weight: float = Field(default=1.5, ge=0, description="the paper's γ")


class LearnedTemperatureKDSpec(_OfLogits):
    """Soft targets at a temperature that is learned against the student."""

    kind: Literal["ctkd"]
    start: float = Field(default=1.0, ge=-10, le=10, description="θ at first: T = 1 + 20 · sigmoid(θ)")
    rise: float = Field(default=0.05, gt=0, le=1, description="share of the run until θ is trained in full")


class EnsembleKDSpec(_Spec):
    """Soft targets of several teachers together."""

    kind: Literal["ensemble_kd"]
    fields: tuple[str, ...] = Field(description="each teacher's logits")
    mean_of: Literal["probabilities", "logits", "votes"] = "probabilities"
    temperature: Positive = 4.0


class HeadsKDSpec(_Spec):
    """Soft targets of several teachers, each for a head of its own."""

    kind: Literal["heads_kd"]
    node: str = Field(description="a module of the student that puts out the logits of all heads")
    fields: tuple[str, ...] = Field(description="each teacher's logits, in the order of the heads")
    temperature: Positive = 4.0


class _OfFeatures(_Spec):
    node: str = Field(description="a module of the student")
    field: str = Field(description="the cached field that it is compared with")


class FeatureSpec(_OfFeatures):
    """Features and hints, through a projection where widths differ."""

    kind: Literal["feature"]
    distance: Literal["mse", "mae"] = "mse"
    kernel: Literal[1, 3] = Field(default=1, description="of the convolution between two maps")


class AttentionSpec(_OfFeatures):
    """Attention transfer."""

    kind: Literal["attention"]
    squared: bool = Field(default=True, description="false: the paper's own form")


class RelationsSpec(_OfFeatures):
    """Relational distillation: distances and angles."""

    kind: Literal["relations"]
    distance_weight: float = Field(default=25.0, ge=0)
    angle_weight: float = Field(default=50.0, ge=0)


class SimilaritySpec(_OfFeatures):
    """Similarity preserving; the paper's weight is 3000."""

    kind: Literal["similarity"]


class FlowSpec(_Spec):
    """Flow between two layers."""

    kind: Literal["flow"]
    nodes: tuple[str, str] = Field(description="two modules of the student that put out maps")
    field: str = Field(description="the cached `flow:<a>,<b>`")


class SaliencySpec(_Spec):
    """Gradients of the label's logit at the pixels."""

    kind: Literal["saliency"]
    field: str = Field(default="saliency", description="the cached gradients")


class SEEDSpec(_OfFeatures):
    """Similarities to the rows seen before."""

    kind: Literal["seed"]
    student_temperature: Positive = 0.2
    teacher_temperature: Positive = 0.01
    queue: int = Field(default=65_536, gt=0, description="rows that are compared with")


TermSpec = Annotated[
    CrossEntropySpec
    | KDSpec
    | LogitMSESpec
    | DISTSpec
    | DKDSpec
    | NKDSpec
    | LearnedTemperatureKDSpec
    | EnsembleKDSpec
    | HeadsKDSpec
    | FeatureSpec
    | AttentionSpec
    | RelationsSpec
    | SimilaritySpec
    | FlowSpec
    | SaliencySpec
    | SEEDSpec,
    Field(discriminator="kind"),
]
ObjectiveSpec = Annotated[tuple[TermSpec, ...], Field(min_length=1)]


def open_objective(terms: tuple[TermSpec, ...]) -> Objective:
    """The objective that a configuration describes."""
    return Objective([_open_term(term) for term in terms])


def _open_term(spec: TermSpec) -> Term:
    match spec:
        case CrossEntropySpec():
            return CrossEntropy(**spec.told)
        case KDSpec():
            return KD(**spec.told)
        case LogitMSESpec():
            return LogitMSE(**spec.told)
        case DISTSpec():
            return DIST(**spec.told)
        case DKDSpec():
            return DKD(**spec.told)
        case NKDSpec():
            return NKD(**spec.told)
        case LearnedTemperatureKDSpec():
            return LearnedTemperatureKD(**spec.told)
        case EnsembleKDSpec():
            return EnsembleKD(**spec.told)
        case HeadsKDSpec():
            return HeadsKD(**spec.told)
        case FeatureSpec():
            return Feature(**spec.told)
        case AttentionSpec():
            return AttentionTransfer(**spec.told)
        case RelationsSpec():
            return Relations(**spec.told)
        case SimilaritySpec():
            return SimilarityPreserving(**spec.told)
        case FlowSpec():
            return Flow(**spec.told)
        case SaliencySpec():
            return Saliency(**spec.told)
        case SEEDSpec():
            return SEED(**spec.told)
    assert_never(spec)
