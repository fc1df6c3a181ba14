"""What a server allows: every limit, and who may reach it."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, SecretStr, field_validator, model_validator

from teacher_cache.errors import SpecError
from teacher_cache.spec import Strict


class Settings(Strict):
    """One server's settings; impossible ones are refused at birth.

    Raises:
        SpecError: an address beyond loopback without keys, or limits that contradict each other.
    """

    host: str = Field(default="127.0.0.1", description="address to bind")
    port: int = Field(default=8000, ge=0, lt=2**16, description="0 takes a free one")
    api_key: SecretStr | None = Field(default=None, description="bearer key; None leaves loopback open")
    state: Path | None = Field(default=None, description="folder of keys, usage and audit, on a disk of this machine")
    max_body_bytes: int = Field(default=64 * 2**20, gt=0, description="bytes of one request's body")
    max_images: int = Field(default=1024, gt=0, description="images in one request")
    max_pixels: int = Field(default=2**25, gt=0, description="width × height, of all files of one request together")
    body_seconds: float = Field(default=60.0, gt=0, le=3600, description="for one request's whole body to arrive")
    queue_images: int = Field(default=4096, gt=0, description="images that may wait for one teacher")
    queue_bytes: int = Field(default=2**28, gt=0, description="of them, as the teacher sees them")
    queue_seconds: float = Field(
        default=10.0, gt=0, le=600, description="that a request may wait before its work begins, as far as can be told"
    )
    from_cache: bool = Field(default=True, description="answer from the configuration's cache what it holds")
    journal: Path | None = Field(default=None, description="folder in which computed answers are kept for a build")
    journal_bytes: int = Field(default=2**30, gt=0, description="of the journal; beyond them nothing more is kept")
    apart: bool = Field(
        default=True, description="whether each device's models run in a process of their own, not beside HTTP"
    )
    page: bool = Field(default=True, description="whether there is a page for people at `/`")
    drain_seconds: float = Field(
        default=1.0, ge=0, le=600, description="from SIGTERM (readyz turns 503) to the closed door"
    )

    admin_port: int | None = Field(
        default=None, ge=0, lt=2**16, description="metrics, drain and keys, on loopback; 0 takes a free one"
    )

    @field_validator("api_key")
    @classmethod
    def _can_be_sent(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not (key.get_secret_value().isascii() and _visible(key.get_secret_value())):
            hint = "Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'."
            raise SpecError("api_key", "must be one or more visible ASCII characters", "(hidden)", hint)
        return key

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.api_key is None and self.state is None and not is_loopback(self.host):
            hint = "Set TEACHER_API_KEY, give a --state folder with keys, or bind 127.0.0.1."
            raise SpecError("host", "needs an api_key unless it is a loopback address", self.host, hint)
        if self.admin_port is not None and self.admin_port == self.port != 0:
            hint = "Choose another; 0 takes a free one."
            raise SpecError("admin_port", "must not be the port of the service", self.admin_port, hint)
        if self.queue_images < self.max_images:
            rule = f"must hold one request of max_images ({self.max_images})"
            raise SpecError("queue_images", rule, self.queue_images, "Raise it, or lower max_images.")
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address; a name other than `localhost` is not trusted."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _visible(key: str) -> bool:
    return bool(key) and key.isprintable() and " " not in key
