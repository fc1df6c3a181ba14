"""What can go wrong between a builder and a service: an ASGI wrapper that does it on purpose, and keeps the books."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Fate = Literal["answer", "drop", "cut", "late", "429", "503", "500", "502"]
"""`drop`: the connection ends before anything is computed. `cut`: in the middle of the answer. `late`: after it."""
FATES: tuple[Fate, ...] = ("drop", "cut", "late", "429", "503", "500", "502")


@dataclass
class Faulty:
    """Lets a service answer, or not; counts predictions by the question that they are of."""

    app: ASGIApp
    fate: Callable[[int], Fate] = lambda _number: "answer"
    """Of the n-th prediction that arrives."""
    delay: float = 0.0
    """Seconds before each prediction."""
    late: float = 1.0
    """Seconds that a late answer is late."""
    computed: Counter[str] = field(default_factory=Counter)
    """Whole answers of the service, by `X-Request-Id`."""
    delivered: Counter[str] = field(default_factory=Counter)
    """Of them those that were sent whole to whoever asked and was still there."""
    fates: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self._lock, self._arrived, self.inside = threading.Lock(), 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not scope["path"].endswith("/predict"):
            await self.app(scope, receive, send)
            return
        with self._lock:
            fate = self.fate(self._arrived)
            self._arrived += 1
            self.fates[fate] += 1
            self.inside += 1
            self.most_at_once = max(self.most_at_once, self.inside)
        try:
            await self._meet(fate, scope, receive, send)
        finally:
            with self._lock:
                self.inside -= 1

    async def _meet(self, fate: Fate, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(self.delay)
        if fate == "drop":
            await _begin(send, 200, 1000)
            raise ConnectionError("on purpose")
        if fate in ("429", "503", "500", "502"):
            while (await receive()).get("more_body"):
                pass
            parts = {"field": "toy", "rule": "must fail", "value": fate, "hint": "Wait."}
            body = b"" if fate == "502" else json.dumps(parts).encode()
            await _begin(send, int(fate), len(body))
            await send({"type": "http.response.body", "body": body})
            return
        name = dict(scope["headers"]).get(b"x-request-id", b"").decode()
        start, body = await self._collect(scope, receive)
        if start["status"] != 200:
            await send(start)
            await send({"type": "http.response.body", "body": body})
            return
        self.computed[name] += 1
        if fate == "late":
            await asyncio.sleep(self.late)
        await _begin(send, 200, len(body))
        if fate == "cut":
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            raise ConnectionError("on purpose")
        await send({"type": "http.response.body", "body": body})
        self.delivered[name] += 1

    async def _collect(self, scope: Scope, receive: Receive) -> tuple[Message, bytes]:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, keep)
        return messages[0], b"".join(message.get("body", b"") for message in messages[1:])


async def _begin(send: Send, status: int, length: int) -> None:
    headers = [(b"content-length", str(length).encode()), (b"retry-after", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": headers})


def seeded(seed: int, share: float, kinds: tuple[Fate, ...] = FATES) -> Callable[[int], Fate]:
    """A share of all predictions fails, in ways and at places that the seed decides."""
    rng = random.Random(seed)
    return lambda _number: rng.choice(kinds) if rng.random() < share else "answer"
