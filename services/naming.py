"""Questions by name: samples of the served data set and numbers of their views, in place of images."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from services.problems import Problem
from services.tensor_body import Buffer

MEDIA_TYPE = "application/json"
_LONGEST_KEY = 4096

Key = Annotated[StrictStr, Field(min_length=1, max_length=_LONGEST_KEY)]
View = Annotated[StrictInt, Field(ge=0, lt=2**32)]
Class = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Digest = Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{16}$")]


class Named(BaseModel):
    """The body of a question by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Key, ...] = Field(min_length=1, description="of samples, as the data set names them")
    views: View | tuple[View, ...] = Field(default=0, description="one number for all, or one for each key")
    digests: tuple[Digest, ...] | None = Field(
        default=None, description="64-bit pixel digests that the views must have, in hexadecimal, one for each key"
    )
    classes: tuple[tuple[Class, ...], ...] | None = Field(
        default=None, description="of `output=gather`: class numbers, as many for each key"
    )
    whole: StrictBool = Field(
        default=False, description="the keys are one micro-batch of a build: its bits are wanted, fillings too"
    )

    @model_validator(mode="after")
    def _fits(self) -> Named:
        if isinstance(self.views, tuple) and len(self.views) != len(self.keys):
            raise ValueError(f"views must be one number, or one for each of the {len(self.keys)} keys")
        if self.digests is not None and len(self.digests) != len(self.keys):
            raise ValueError(f"digests must be one for each of the {len(self.keys)} keys")
        if self.whole and len(set(self.view_of_each)) > 1:
            raise ValueError("whole needs one view for all keys")
        if self.classes is not None and len(set(map(len, self.classes))) > 1:
            raise ValueError("classes must be as many for each key")
        if self.whole and self.classes is not None:
            raise ValueError("whole has no effect beside classes: its bits are those of whole rows")
        return self

    @property
    def view_of_each(self) -> tuple[int, ...]:
        """One for each key."""
        return self.views if isinstance(self.views, tuple) else (self.views,) * len(self.keys)


def parse_named(data: Buffer, most: int) -> Named:
    """A body to a question.

    Args:
        data: JSON.
        most: keys in one request.

    Raises:
        Problem: 422 where it is not such a question, 413 for too many keys.
    """
    hint = 'For example {"keys": ["0", "1"], "views": 3}.'
    try:
        # Twice the same member would be the last one in silence.
        found = json.loads(bytes(data).decode(), object_pairs_hook=members)
        named = Named.model_validate(found)
    except RecursionError:
        raise Problem(422, "body", "must be a JSON object", "one that is nested too deeply", hint) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Only of the schema: a key of the body is its sender's content.
        path = ".".join(str(part) for part in first["loc"][:1] if part in Named.model_fields)
        rule = str(first["msg"]).removeprefix("Value error, ")
        raise Problem(422, path or "body", rule, "another value", hint) from None
    except ValueError:
        raise Problem(422, "body", "must be a JSON object", f"{len(data)} bytes that are none", hint) from None
    if len(named.keys) > most:
        raise Problem(413, "keys", f"must be at most {most}", len(named.keys), "Send several requests.")
    return named


def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that has no member twice; raises `ValueError`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a member stands there twice")
    return found
