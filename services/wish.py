"""What a client may wish for in an answer, and on which conditions: the same words for every kind of question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from services import wire
from services.schemas import CacheUse, Dtype, Output
from services.transport import Asked


class Wishes(TypedDict, total=False):
    """The keywords of `predict` and its like; what each means, and is where it is not given, `Wish` says."""

    output: Output
    k: int | None
    temperature: float | None
    fields: Sequence[str]
    dtype: Dtype | None
    lse: bool
    digest: str | None
    deadline_ms: int | None
    request_id: str | None
    cache: CacheUse
    strict: bool


@dataclass(frozen=True)
class Wish:
    """What is to be made of the answer, and on which conditions."""

    output: Output = "logits"
    """What is made of the logits."""
    k: int | None = None
    """How many classes of a `topk`."""
    temperature: float | None = None
    """Of the softmax; not for raw logits. 1 where None."""
    fields: Sequence[str] = ("logits",)
    """`logits` and features of the card."""
    dtype: Dtype | None = None
    """What the service narrows floating tensors to, to the nearest value; float32 where None."""
    lse: bool = False
    """Whether the log-sum-exp of the raw logits comes, too; not for raw logits themselves."""
    digest: str | None = None
    """Refuse to answer if the teacher is not this one."""
    deadline_ms: int | None = None
    """How long the answer is of use."""
    request_id: str | None = None
    """Names the question in the service's log, however often it is tried."""
    cache: CacheUse = "prefer"
    """What the service may do: `prefer` takes what its cache and its journal have, with the error of the cache's
    encoding; `only` computes nothing; `bypass` gives the teacher's own values; `refresh` keeps these anew."""
    strict: bool = True
    """Whether one item without an answer leaves the others without one; otherwise `status` tells."""

    def ask(self, body: bytes, media_type: str, path: str = "/predict") -> Asked:
        """The request that carries a body."""
        options = {
            "output": self.output,
            "k": self.k,
            "temperature": self.temperature,
            "fields": ",".join(self.fields),
            "dtype": self.dtype,
            # Not where it is off: an older service does not know it.
            "lse": self.lse or None,
            # A lookup answers nothing.
            "cache": self.cache if path == "/predict" else None,
            "strict": self.strict if path == "/predict" else None,
        }
        headers = {
            "Accept": wire.MEDIA_TYPE,
            "Content-Type": media_type,
            "If-Match": None if self.digest is None else f'"{self.digest}"',
            "X-Deadline-Ms": None if self.deadline_ms is None else str(self.deadline_ms),
            "X-Request-Id": self.request_id,
        }
        given = {name: value for name, value in headers.items() if value is not None}
        chosen = {name: value for name, value in options.items() if value is not None}
        return Asked("POST", path, body, given, chosen)
