"""What an object store refuses: whether it helps to ask again, and what to say."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from teacher_cache.errors import BuildError, StorageError

PERMISSIONS = "s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket"
_NO_BUCKET = "the bucket does not exist", "Create it, or correct its name"
_FORBIDDEN = (
    "access is forbidden",
    f"The credentials need {PERMISSIONS} there (without the last, a missing file looks forbidden too)",
)
_KEYS = "the credentials are not accepted", "Correct AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_SESSION_TOKEN"
_NO_KEYS = "no credentials are given", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_BUSY = "the store asks for fewer requests", "Wait, or let fewer builders work at once"
_REGION = "the bucket is in another region", "Set AWS_DEFAULT_REGION"
_UNREACHABLE = "the endpoint cannot be reached", "Is the server up, and AWS_ENDPOINT_URL right?"
_SLOW = "the endpoint does not answer in time", "Look at the network and at the server"
_LOST = "the connection breaks", "Look at the network and at the server"
_ABSENT = "there is no such file", "Is AWS_ENDPOINT_URL that of an object store?"
_REASONS = {
    "NoSuchKey": _ABSENT,
    "404": _ABSENT,
    "NoSuchBucket": _NO_BUCKET,
    "AccessDenied": _FORBIDDEN,
    "403": _FORBIDDEN,
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "ExpiredToken": _KEYS,
    "InvalidToken": _KEYS,
    "NoCredentialsError": _NO_KEYS,
    "PartialCredentialsError": _NO_KEYS,
    "ProfileNotFound": ("AWS_PROFILE names no profile", "Correct it"),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "Set it"),
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "503": _BUSY,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "EntityTooLarge": ("the file is too large for one request", "Make the shards smaller (store.shard_rows)"),
    "EndpointConnectionError": _UNREACHABLE,
    "ConnectTimeoutError": _UNREACHABLE,
    "HTTPClientError": _UNREACHABLE,
    "ValueError": _UNREACHABLE,
    "ReadTimeoutError": _SLOW,
    "TimeoutError": _SLOW,
    "FSTimeoutError": _SLOW,
}
"""What an error means to whoever runs a build, and what to do about it."""
_AGAIN = {"BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown"}
"""Errors that are the client's by their number, and pass."""
_FINAL = {"NotImplemented", "501"}
"""Errors that are the server's by their number, and do not pass."""


class AbsentError(BuildError):
    """The store answers that there is no such file. Whoever asked may know better what that means."""


class PresentError(BuildError):
    """The store answers that a condition does not hold: the file is there."""


class TornError(Exception):
    """What arrived is not what was written."""


_KINDS = {
    "NoSuchKey": AbsentError,
    # Without a text, as to a HEAD: of a bucket that does not exist it says the same.
    "404": AbsentError,
    "PreconditionFailed": PresentError,
    "412": PresentError,
}


@dataclass(frozen=True)
class Fault:
    """Why a request failed."""

    code: str
    """As the store names it, or the name of the exception. Never the store's own text: that may quote a key."""
    transient: bool
    """Whether the same request may succeed a little later."""
    answered: bool = False
    """Whether the store itself said so."""

    @classmethod
    def of(cls, error: BaseException) -> Fault | None:
        """The fault behind an exception of s3fs; None where it is about something else."""
        from aiohttp import ClientError as HTTPError
        from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, HTTPClientError
        from botocore.parsers import ResponseParserError

        cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
        if isinstance(cause, ClientError):
            status = int(cause.response["ResponseMetadata"].get("HTTPStatusCode", 0))
            code = str(cause.response["Error"].get("Code", status))
            again = (status >= 500 and code not in _FINAL) or status == 429 or code in _AGAIN
            return cls(code, again, answered=True)
        name = type(cause).__name__
        if name == "FlexibleChecksumError":
            return cls(TornError.__name__, True)
        network = HTTPClientError, EndpointConnectionError, HTTPError
        passing = ResponseParserError, asyncio.IncompleteReadError, ConnectionError, TimeoutError, TornError
        if isinstance(cause, (*network, *passing)):
            return cls(name, True)
        return cls(name, False) if isinstance(cause, BotoCoreError) else None

    def refusal(self, place: str, root: str, rule: str, tries: int) -> BuildError:
        """What to say of a file that the store refuses."""
        default = ("the store refuses", "Correct that") if self.answered else _LOST
        reason, todo = _REASONS.get(self.code, default)
        often = f", {tries} times" if tries > 1 else ""
        hint = f"{todo}; then run the same command again: it goes on. Nothing that is committed is damaged."
        kind = _KINDS.get(self.code, StorageError) if self.answered else StorageError
        return kind(place, f"{rule}: {reason} ({self.code}{often})", root, hint)
