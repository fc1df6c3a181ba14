"""What a prediction may be asked for: query parameters, closed and checked."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from services.schemas import MAX_TEMPERATURE, MIN_TEMPERATURE, CacheUse, Output

DEFAULT_K = 5


class PredictOptions(BaseModel):
    """The query as it was written; an unknown option is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Output = Field(default="logits", description="what is made of the logits")
    k: int | None = Field(default=None, ge=1, description=f"classes of a `topk` answer; {DEFAULT_K} if absent")
    temperature: float = Field(
        default=1.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, allow_inf_nan=False, description="T of the softmax"
    )
    fields: str = Field(default="logits", description="comma separated; features need a safetensors answer")
    cache: CacheUse = Field(
        default="prefer", description="`only` computes nothing, `refresh` computes anew, `bypass` keeps nothing"
    )
    strict: bool = Field(default=False, description="an item without an answer leaves the others without one, too")


@dataclass(frozen=True)
class Wanted:
    """Options that fit a teacher."""

    output: Output
    k: int
    """1..C for `topk`, else 0."""
    temperature: float
    fields: tuple[str, ...]
    rounding: float | None = None
    """Step of every floating value of the answer; the key's policy sets it, not the query."""


class OptionError(ValueError):
    """An option does not fit; `field`, `rule`, `value` and `hint` as everywhere."""

    def __init__(self, field: str, rule: str, value: object, hint: str) -> None:
        self.field, self.rule, self.value, self.hint = field, rule, value, hint
        super().__init__(field, rule, value, hint)


def resolve(options: PredictOptions, offered: dict[str, tuple[int, ...]], tensors: bool) -> Wanted:
    """Fits the options to a teacher.

    Args:
        options: as asked.
        offered: shape of one row of each field.
        tensors: whether the answer is safetensors, the only kind that carries features.

    Raises:
        OptionError: an option is out of range, or would have no effect.
    """
    fields = tuple(name.strip() for name in options.fields.split(","))
    for name in fields:
        if name not in offered:
            raise OptionError("fields", "must be offered by this teacher", name, f"It has: {', '.join(offered)}.")
    if len(set(fields)) != len(fields):
        raise OptionError("fields", "must name each field once", options.fields, "Remove the repetition.")
    if not tensors and fields != ("logits",):
        hint = "Send `Accept: application/safetensors`."
        raise OptionError("fields", "features are answered as safetensors only", options.fields, hint)
    if options.output != "logits" and "logits" not in fields:
        raise OptionError("output", "needs the field logits", options.output, "Add it to `fields`.")
    # Refused, not ignored: raw logits have no temperature, and someone who sets one believes otherwise.
    if options.output == "logits" and "temperature" in options.model_fields_set:
        hint = "Ask for output=logprobs, probs or topk."
        raise OptionError("temperature", "has no effect on raw logits", options.temperature, hint)
    return Wanted(options.output, _k(options, offered), options.temperature, fields)


def _k(options: PredictOptions, offered: dict[str, tuple[int, ...]]) -> int:
    if options.output != "topk":
        if options.k is not None:
            raise OptionError("k", "belongs to output=topk", options.k, "Ask for output=topk.")
        return 0
    (classes,) = offered["logits"]
    if options.k is not None and options.k > classes:
        raise OptionError("k", f"must be in 1..{classes}, the number of classes", options.k, "Lower it.")
    return options.k or min(DEFAULT_K, classes)
