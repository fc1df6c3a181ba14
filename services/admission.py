"""Whether a request may have what it asks for: its key's policy and budgets, before any compute."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

from fastapi import Request
from torch import Tensor

from services.books import Books
from services.identity import Caller
from services.policy import Asked, require_allowed
from services.problems import Problem
from services.usage import OverBudget, Ticket
from services.visit import Visit


def visit_of(request: Request) -> Visit:
    """What the gate has found out about this request."""
    visit: Visit = request.scope["state"]["visit"]
    return visit


def caller_of(request: Request) -> Caller:
    """Who asks; the gate lets nobody else through to a route that calls this."""
    caller = visit_of(request).caller
    assert caller is not None, "the probes have no caller"
    return caller


def require(books: Books, visit: Visit, asked: Asked) -> None:
    """Holds what is known of a request against its key's policy, and notes which limit it breaks.

    Raises:
        Problem: 403, naming the limit.
    """
    if visit.caller is None:
        return
    try:
        require_allowed(visit.caller.policy, asked, books.now)
    except Problem as problem:
        visit.limit = problem.field
        raise


async def admit(
    request: Request, books: Books, asked: Asked, images: int, digests: Callable[[], tuple[bytes, ...]]
) -> tuple[bytes, ...]:
    """The one door before compute: a request that is parsed may go on, and what it costs is set aside.

    The gate settles when the answer leaves, and gives back when none does; `Books.reduce` makes it less.

    Args:
        request: its visit is filled in.
        books: where its key's budgets are.
        asked: all that it asks for.
        images: how many.
        digests: of each, alike where they are; called in another thread, where the policy counts them.

    Returns:
        The digests, where they were needed.

    Raises:
        Problem: 403 for what the key may never have, 429 with Retry-After for a budget that will have room again.
    """
    visit, caller = visit_of(request), caller_of(request)
    visit.teacher, visit.images, visit.outputs = asked.teacher, images, asked.outputs
    require(books, visit, asked)
    counted = caller.policy.distinct_images is not None
    found = await asyncio.to_thread(digests) if counted else tuple[bytes, ...]()
    try:
        await books.reserve(visit, Ticket(caller.name, caller.policy, images, frozenset(found)))
    except OverBudget as over:
        visit.limit = over.limit
        value = f"{images} asked, {over.left}"
        if over.retry_after is None:
            hint = "Waiting does not help: ask for fewer, or for another key."
            raise Problem(403, over.limit, over.rule, value, hint) from None
        hint = "Wait as long as Retry-After says; GET /v1/usage shows what is left."
        headers = {"Retry-After": str(over.retry_after)}
        raise Problem(429, over.limit, over.rule, value, hint, headers) from None
    return found


def image_digests(views_BCHW: Tensor) -> tuple[bytes, ...]:
    """One for each image: of the pixels that the teacher would see, and of their shape."""
    person = "x".join(map(str, views_BCHW.shape[1:])).encode()[:16]
    rows = views_BCHW.contiguous().numpy()
    return tuple(hashlib.blake2b(row.tobytes(), digest_size=16, person=person).digest() for row in rows)
