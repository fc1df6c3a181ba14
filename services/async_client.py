"""The client for programs that have an event loop, and the same rules."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Unpack

import httpx
from torch import Tensor

from services.picture_files import ask_file, ask_files
from services.prediction import (
    CARD,
    Prediction,
    ask_images,
    ask_named,
    read_card,
    read_lookup,
    read_prediction,
)
from services.retries import Patience, Retries
from services.schemas import TeacherCard
from services.transport import Address, Asked, client_options
from services.wish import Wish, Wishes

__all__ = ["AsyncTeacherClient"]


class AsyncTeacherClient:
    """One teacher of a service. Keeps its connections; for one event loop, and any number of its tasks.

    A question that breaks off or comes too late is asked again: it may then be answered, and counted, twice.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        attempts: int = 8,
        patience: float = 600.0,
        connections: int = 32,
    ) -> None:
        """Asks nothing yet; see `TeacherClient`.

        Args:
            url: `http://host:port/<teacher>`.
            api_key: bearer key; the variable TEACHER_API_KEY where None.
            timeout: seconds that one request may take.
            attempts: tries of one question in all.
            patience: seconds that one question may wait between its tries.
            connections: requests that may be under way at once; further ones wait for one of them.

        Raises:
            TeacherError: the URL names no teacher.
        """
        address = Address.of(url, api_key)
        self.url, self._root = url, address.root
        self._patience = Patience(attempts=attempts, seconds=patience)
        self._http = httpx.AsyncClient(**client_options(address, timeout, connections))

    async def __aenter__(self) -> AsyncTeacherClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def card(self) -> TeacherCard:
        """What the teacher takes and offers; raises `ServiceError`."""
        return read_card(self.url, await self._send(CARD))

    async def predict(
        self,
        images_BCHW: Tensor,
        *,
        classes_BK: Tensor | None = None,
        **wishes: Unpack[Wishes],
    ) -> Prediction:
        """Asks for a batch; arguments and errors are those of `TeacherClient.predict`."""
        return await self._predict(ask_images(images_BCHW, Wish(**wishes), classes_BK))

    async def predict_named(
        self,
        keys: Sequence[str],
        views: int | Sequence[int] = 0,
        *,
        digests: Sequence[int] | None = None,
        classes: Sequence[Sequence[int]] | None = None,
        **wishes: Unpack[Wishes],
    ) -> Prediction:
        """Asks for samples of the service's data set; see `TeacherClient.predict_named`."""
        asked = ask_named(keys, views, Wish(**wishes), digests=digests, classes=classes)
        return await self._predict(asked)

    async def lookup(self, keys: Sequence[str], views: int | Sequence[int] = 0) -> tuple[str, ...]:
        """What the service has; see `TeacherClient.lookup`."""
        return read_lookup(self.url, await self._send(ask_named(keys, views, Wish(), path="/lookup")))

    async def predict_file(
        self,
        path: str | Path,
        **wishes: Unpack[Wishes],
    ) -> Prediction:
        """Asks for one JPEG, PNG or WebP file; see `TeacherClient.predict_file`."""
        return await self._predict(await asyncio.to_thread(ask_file, path, Wish(**wishes)))

    async def predict_files(
        self,
        paths: Sequence[str | Path],
        **wishes: Unpack[Wishes],
    ) -> Prediction:
        """Asks for several such files in one request; see `TeacherClient.predict_files`."""
        return await self._predict(await asyncio.to_thread(ask_files, paths, Wish(**wishes)))

    async def stream(
        self,
        batches: Iterable[Tensor] | AsyncIterable[Tensor],
        *,
        concurrency: int = 8,
        **wishes: Unpack[Wishes],
    ) -> AsyncGenerator[Prediction, None]:
        """Asks for batch after batch, a few of them side by side, and gives the answers in the order of the batches.

        Args:
            batches: uint8 [B, C, H, W] each; taken as answers are, so an endless source is fine.
            concurrency: how many may be under way, or answered and not yet taken.
            wishes: as in `TeacherClient.predict`, for each batch.

        Raises:
            ValueError: `concurrency` is below 1.
            TeacherCacheError: as `predict` raises it, in the place of that answer; what is under way is cancelled.
        """
        if concurrency < 1:
            raise ValueError(f"impossible: {concurrency=}")
        wish = Wish(**wishes)
        under_way: deque[asyncio.Task[Prediction]] = deque()
        try:
            async for batch in _each(batches):
                under_way.append(asyncio.create_task(self._predict(ask_images(batch, wish))))
                if len(under_way) == concurrency:
                    yield await under_way.popleft()
            while under_way:
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _predict(self, asked: Asked) -> Prediction:
        return read_prediction(self.url, await self._send(asked))

    async def _send(self, asked: Asked) -> bytes:
        retries = Retries(self.url, self._patience)
        while True:
            try:
                answer = await self._http.request(
                    asked.method,
                    self._root + asked.path,
                    content=asked.body,
                    headers=asked.headers,
                    params=asked.options,
                )
                return answer.raise_for_status().content
            except httpx.HTTPError as error:
                seconds = retries.after(error)
            await asyncio.sleep(seconds)


async def _each(batches: Iterable[Tensor] | AsyncIterable[Tensor]) -> AsyncIterator[Tensor]:
    if isinstance(batches, AsyncIterable):
        async for batch in batches:
            yield batch
    else:
        for batch in batches:
            yield batch
