"""What a build's configuration may say of a teacher behind a URL, or of one that a service has asked before.

None of it decides a byte; none of it is stored.
"""

from __future__ import annotations

from decimal import Decimal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Closed(BaseModel):
    # As `spec.Strict`, which is made of these.
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetSpec(_Closed):
    """The most that a build may ask for, counted in its journal before a request leaves."""

    max_requests: int | None = Field(default=None, gt=0, description="answered, or perhaps answered and lost")
    max_images: int | None = Field(default=None, gt=0, description="in them, with the black ones that fill up")
    max_spend: Decimal | None = Field(default=None, gt=0, description="in the unit of price_per_image")
    price_per_image: Decimal | None = Field(default=None, gt=0, description="what the service charges for one image")

    @model_validator(mode="after")
    def _priced(self) -> BudgetSpec:
        if self.max_spend is not None and self.price_per_image is None:
            raise ValueError("max_spend needs price_per_image")
        return self

    @property
    def images(self) -> int | None:
        """The images that both bounds allow; None where there is no bound."""
        bounds = [] if self.max_images is None else [self.max_images]
        if self.max_spend is not None and self.price_per_image is not None:
            bounds.append(int(self.max_spend // self.price_per_image))
        return min(bounds, default=None)


class ServiceSpec(_Closed):
    """Where else the teacher is, how it is asked, and what may be spent."""

    api_key: str | None = Field(default=None, exclude=True, description="for http(s) teachers; never stored")
    replicas: tuple[str, ...] = Field(default=(), exclude=True, description="further URLs of the same teacher")
    concurrency: int = Field(default=4, gt=0, le=256, exclude=True, description="requests in flight of one worker")
    timeout: float = Field(default=120.0, gt=0, exclude=True, description="seconds that one request may take")
    patience: float = Field(
        default=900.0,
        ge=0,
        exclude=True,
        description="seconds that a question may wait in all, between its tries",
    )
    journal: str | None = Field(
        default=None,
        exclude=True,
        description="folder of the paid answers, kept; default: CACHE.journal, until sealed. Of a teacher here: folder "
        "of the answers that a service has computed",
    )
    budget: BudgetSpec = Field(default=BudgetSpec(), exclude=True)

    @field_validator("replicas")
    @classmethod
    def _urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"replica {url!r} must be http(s)://host:port/<teacher>")
        return value

    @field_validator("journal")
    @classmethod
    def _folder(cls, value: str | None) -> str | None:
        if value is not None and (not value or "://" in value):
            raise ValueError("must be a folder of this machine")
        return value


REMOTE_ONLY = ("replicas", "concurrency", "timeout", "patience", "budget")
"""Keys that a teacher in this process has no use for."""
