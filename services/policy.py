"""What one key may ask: a policy, and the one function that says no. What it may spend is counted in `usage`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from services.options import Wanted
from services.problems import Problem
from services.schemas import MAX_TEMPERATURE, MIN_TEMPERATURE, Output
from teacher_cache.errors import SpecError
from teacher_cache.spec import Strict

Answer = Literal[Output, "features"]
"""What a policy can allow: a form of the logits, or the fields beside them."""
Temperature = Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, allow_inf_nan=False)]
_WHOLE_ROWS = ("logits", "logprobs", "probs")


class Span(Strict):
    """Temperatures from `low` to `high`, both allowed."""

    low: Temperature
    high: Temperature

    @model_validator(mode="after")
    def _ordered(self) -> Span:
        if self.low > self.high:
            raise SpecError("temperatures", "must have low ≤ high", f"{self.low} > {self.high}", "Swap them.")
        return self


class Policy(Strict):
    """The limits of one key; None is no limit.

    A temperature is a matter of the softmax, so `temperatures` does not touch raw logits and features.

    Raises:
        SpecError: a limit that the others make void.
    """

    teachers: tuple[str, ...] | None = Field(default=None, description="names in the URL")
    by_id_only: bool = Field(default=False, description="a closed set of questions: no images are taken")
    outputs: tuple[Answer, ...] | None = Field(default=None, description="forms of answers")
    largest_k: int | None = Field(default=None, ge=1, description="of `topk`, and classes of `gather`")
    temperatures: tuple[Temperature, ...] | Span | None = Field(default=None, description="a list, or low and high")
    rounding: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="step, in the units of what is answered; every floating value is a multiple of it",
    )
    images_per_second: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="a second's worth may come at once"
    )
    images_per_day: int | None = Field(default=None, ge=0, description="from 00:00 to 24:00 UTC")
    distinct_images: int | None = Field(default=None, ge=0, description="in a lifetime, by their pixels")
    datasets: tuple[str, ...] | None = Field(default=None, description="that may be asked by sample key")
    expires: AwareDatetime | None = Field(default=None, description="first moment at which nothing is answered")

    @model_validator(mode="after")
    def _effective(self) -> Policy:
        open_ = [name for name in _WHOLE_ROWS if self.outputs is None or name in self.outputs]
        if self.largest_k is not None and open_:
            rule = f"has no effect while whole rows may be had ({', '.join(open_)})"
            raise SpecError("largest_k", rule, self.largest_k, "Set outputs=[topk, gather], or one of them.")
        if self.images_per_second is not None and self.images_per_second < 1e-6:
            hint = "Leave outputs empty, or revoke the key."
            raise SpecError("images_per_second", "must be at least 0.000001", self.images_per_second, hint)
        return self


@dataclass(frozen=True)
class Asked:
    """As much of a request as is known; what is None is not judged yet."""

    teacher: str | None = None
    outputs: tuple[Answer, ...] = ()
    k: int | None = None
    temperature: float | None = None
    uploaded: bool = False
    """Whether it brings images of its own, and does not name samples of a data set."""
    dataset: str | None = None
    unplanned_view: int | None = None
    """A view beyond those that the configuration plans, where one is asked for."""

    @classmethod
    def predict(cls, teacher: str, wanted: Wanted, *, uploaded: bool = True, dataset: str | None = None) -> Asked:
        """What a prediction asks for, once its options and its body are parsed."""
        outputs: list[Answer] = [wanted.output] if "logits" in wanted.fields else []
        if wanted.lse:
            # With it a log-probability gives its logit back.
            outputs.append("logits")
        if set(wanted.fields) - {"logits"}:
            outputs.append("features")
        soft = "logits" in wanted.fields and wanted.output != "logits"
        k = wanted.k if wanted.output in ("topk", "gather") else None
        return cls(teacher, tuple(outputs), k, wanted.temperature if soft else None, uploaded, dataset)


def require_allowed(policy: Policy, asked: Asked, now: datetime) -> None:
    """The one place where a policy is enforced; called again as more of a request is known.

    Raises:
        Problem: 403, whose `field` is the limit's name in the policy.
    """
    for limit, rule, value, hint in _broken(policy, asked, now):
        raise Problem(403, limit, rule, value, hint)


def _broken(policy: Policy, asked: Asked, now: datetime) -> Iterator[tuple[str, str, object, str]]:
    card = "The teacher's card lists what this key may ask."
    if policy.expires is not None and now >= policy.expires:
        yield "expires", "is over for this key", policy.expires.isoformat(), "Ask for a new key."
    if policy.teachers is not None and asked.teacher is not None and asked.teacher not in policy.teachers:
        hint = "GET /v1/teachers lists those of this key."
        yield "teachers", "must be one that this key may ask", asked.teacher, hint
    if policy.by_id_only and asked.uploaded:
        yield "by_id_only", "lets this key ask by sample key only", "uploaded images", "Name samples instead."
    if policy.by_id_only and asked.unplanned_view is not None:
        yield "by_id_only", "lets this key ask for planned views only", f"view {asked.unplanned_view}", card
    for output in asked.outputs:
        if policy.outputs is not None and output not in policy.outputs:
            yield "outputs", f"are {', '.join(policy.outputs) or 'none'} for this key", output, card
    if policy.largest_k is not None and asked.k is not None and asked.k > policy.largest_k:
        yield "largest_k", f"is {policy.largest_k} for this key", asked.k, "Ask for no more classes than that."
    if asked.temperature is not None and not _among(asked.temperature, policy.temperatures):
        yield "temperatures", f"are {_shown(policy.temperatures)} for this key", asked.temperature, card
    if policy.datasets is not None and asked.dataset is not None and asked.dataset not in policy.datasets:
        yield "datasets", f"are {', '.join(policy.datasets) or 'none'} for this key", asked.dataset, card


def _among(temperature: float, allowed: tuple[float, ...] | Span | None) -> bool:
    if isinstance(allowed, Span):
        return allowed.low <= temperature <= allowed.high
    return allowed is None or temperature in allowed


def _shown(allowed: tuple[float, ...] | Span | None) -> str:
    if isinstance(allowed, Span):
        return f"from {allowed.low} to {allowed.high}"
    return ", ".join(map(str, allowed or ())) or "none"
