"""The same without asyncio: each client keeps an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from fewstep_client.events import LiveEvent
from fewstep_client.fields import Fields, LiveFields, PictureFields
from fewstep_client.http import AsyncClient
from fewstep_client.live import AsyncLive
from fewstep_client.results import LiveToken, Picture, Preview

T = TypeVar("T")
SETTLE_S = 1.0


class _Threaded:
    """A loop in a thread, from construction to `close`. Use it as a context manager."""

    def __init__(self) -> None:
        self._loop, self._is_closed, self._lock = asyncio.new_event_loop(), False, threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fewstep-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Does nothing the second time."""
        if self._is_closed:
            return
        self._wait_for(self._end())
        with self._lock:  # no work is given to the loop after what ends it
            if self._is_closed:
                return
            self._is_closed = True
            settled = asyncio.run_coroutine_threadsafe(_settle(), self._loop)
        settled.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        raise NotImplementedError

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """What it returns; an interrupt here, as by Ctrl-C, cancels it there."""
        with self._lock:
            future = None if self._is_closed else asyncio.run_coroutine_threadsafe(work, self._loop)
        if future is None:  # a closed client waits for nothing: it only says that it is closed
            return asyncio.run(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


class Client(_Threaded):
    """`AsyncClient` for programs without asyncio. Threads may share it.

    with Client("http://127.0.0.1:8000", key="fs_…") as client:
        picture = client.generate("a red apple on a blue background", seed=7)
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        max_retries: int = 4,
        timeout_s: float = 75.0,
    ) -> None:
        self._client = AsyncClient(base_url, key=key, max_retries=max_retries, timeout_s=timeout_s)
        super().__init__()

    def generate(self, prompt: str, **fields: Unpack[PictureFields]) -> Picture:
        """Draws one picture."""
        return self._wait_for(self._client.generate(prompt, **fields))

    def stream(self, prompt: str, **fields: Unpack[Fields]) -> Iterator[Preview | Picture]:
        """The previews and then the pictures. Leaving early cancels the drawing."""
        items = self._client.stream(prompt, **fields)
        try:
            while (item := self._wait_for(_next(items))) is not None:
                yield item
        finally:
            self._wait_for(_close(items))

    def submit(self, prompt: str, *, idempotency_key: str | None = None, **fields: Unpack[Fields]) -> str:
        """Asks for pictures and returns the id of their generation at once."""
        return self._wait_for(self._client.submit(prompt, idempotency_key=idempotency_key, **fields))

    def wait(self, generation_id: str, *, timeout_s: float | None = None) -> tuple[Picture, ...]:
        """The pictures, once they are drawn. Raises NotDrawn, or TimeoutError after `timeout_s`."""
        return self._wait_for(self._client.wait(generation_id, timeout_s=timeout_s))

    def cancel(self, generation_id: str) -> str:
        """Cancels it and returns its state."""
        return self._wait_for(self._client.cancel(generation_id))

    def live_token(self, origin: str, **fields: Any) -> LiveToken:
        """A short-lived token for a page; the fields are those of `AsyncClient.live_token`."""
        return self._wait_for(self._client.live_token(origin, **fields))

    async def _end(self) -> None:
        await self._client.close()


class Live(_Threaded):
    """`AsyncLive` for programs without asyncio: iterate in one thread, call `generate` from any.

    with Live("http://127.0.0.1:8000") as live:
        live.generate("a red apple on a blue background")
        picture = next(event for event in live if isinstance(event, FinalFrame))
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        token: Callable[[], str] | None = None,
        origin: str | None = None,
    ) -> None:
        async def ask() -> str:
            assert token is not None
            return await asyncio.to_thread(token)

        self._live = AsyncLive(base_url, key=key, token=ask if token else None, origin=origin)
        super().__init__()
        self._wait_for(self._live.__aenter__())

    def generate(self, prompt: str, **fields: Unpack[LiveFields]) -> int:
        """Asks for a picture, which replaces every request before it. Returns its `seq`. Raises LiveClosed."""

        async def generate() -> int:
            return self._live.generate(prompt, **fields)

        return self._wait_for(generate())

    def cancel(self) -> None:
        """Takes back whatever is not drawn yet."""

        async def cancel() -> None:
            self._live.cancel()

        self._wait_for(cancel())

    def __iter__(self) -> Iterator[LiveEvent]:
        while (event := self._wait_for(_next(self._live))) is not None:
            yield event

    async def _end(self) -> None:
        await self._live.close()


async def _settle() -> None:
    """What other threads still wait for ends by itself, or is cancelled."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, unfinished = await asyncio.wait(others, timeout=SETTLE_S)
        for task in unfinished:
            task.cancel()
        await asyncio.wait(others)


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)


async def _close(items: AsyncGenerator[object, None]) -> None:
    await items.aclose()
