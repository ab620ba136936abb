"""Live: words in at every change, the newest pictures out."""

from __future__ import annotations

import asyncio
import json
import random
import re
from types import TracebackType
from typing import Self, Unpack
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from fewstep_client.connection import MAX_SILENCE_S, PASSING, Connection, Lost, Request, TokenSource, Wish
from fewstep_client.errors import LiveClosed
from fewstep_client.events import Closed, Frame, LiveEvent, Reconnecting
from fewstep_client.fields import LiveFields
from fewstep_client.inbox import Inbox

SUBPROTOCOL = "fewstep.live.v1"
AUTH_PREFIX = "fewstep.auth."
MAX_FRAME_BYTES = 64 * 2**20  # a PNG of 1024² is larger than what `websockets` takes by itself
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 10.0
CLOSE_TIMEOUT_S = 2.0

# Close codes of docs/live-protocol.md
NORMAL, TOO_BIG, AUTH, IDLE = 1000, 1009, 4401, 4408
FINAL_CODES = frozenset({1002, 1003, 1007, 1008})


class AsyncLive:
    """A live connection that comes back by itself, and an iterator over what it tells.

        async with AsyncLive("http://127.0.0.1:8000") as live:
            live.generate("a red apple on a blue background")
            async for event in live:
                if isinstance(event, FinalFrame):
                    show(event.data)

    A picture counts as shown, and is acknowledged, when the next event is asked for: a slow loop gets fewer pictures,
    and the newest. After a reconnect the newest request is sent again, unless all of its pictures came, refined ones
    included. `Closed` is the last event.

    With `key` it connects as that API key. `token` is asked for a live token whenever it connects and before the old
    one ends; `origin` is then the page's origin that the tokens are for. What `token` raises is tried again if it is
    an OSError, an `httpx.HTTPError` or a FewstepError; anything else comes out of the iterator.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        token: TokenSource | None = None,
        origin: str | None = None,
    ) -> None:
        if key is not None and token is not None:
            raise ValueError("key and token: only one of them says who this is")
        if key is not None:
            check_credential("key", key)
        self._url, self._origin = live_url(base_url), origin
        self._key, self._token = key, token
        self._wish, self._inbox, self._seq = Wish(), Inbox(), 0
        self._running: asyncio.Task[None] | None = None
        self._is_closing, self._end = False, Closed(NORMAL, "closed by this client")
        self._shown: tuple[int, Connection] | None = None

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(self._finish)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes for good; unfinished work is cancelled by the service."""
        if self._running is None or self._running.done():
            return
        self._is_closing = True
        self._running.cancel()
        await asyncio.wait([self._running])

    def generate(self, prompt: str, **fields: Unpack[LiveFields]) -> int:
        """Asks for a picture, which replaces every request before it. Returns its `seq`. Raises LiveClosed."""
        self._check_open()
        self._seq += 1
        self._wish.replace(Request(self._seq, {"prompt": prompt, **fields}))
        return self._seq

    def cancel(self) -> None:
        """Takes back whatever is not drawn yet. Raises LiveClosed."""
        self._check_open()
        self._wish.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LiveEvent:
        self._acknowledge()
        item = await self._inbox.take()
        if item is None:
            await self._raise_mistake()
            raise StopAsyncIteration
        event, connection = item
        if isinstance(event, Frame) and connection is not None:
            self._shown = event.frame, connection
        return event

    def _acknowledge(self) -> None:
        if self._shown is not None:
            frame, connection = self._shown
            connection.acknowledge(frame)
            self._shown = None

    def _check_open(self) -> None:
        if self._running is None:
            raise LiveClosed("the connection isn't open yet: `async with AsyncLive(…) as live`")
        if self._running.done():
            raise LiveClosed(f"the connection is closed: {self._end.reason or f'code {self._end.code}'}")

    def _finish(self, running: asyncio.Task[None]) -> None:
        if running.cancelled() or running.exception() is None:
            self._inbox.put(self._end)
        self._inbox.close()

    async def _raise_mistake(self) -> None:
        if self._running is not None and not self._running.cancelled():
            await self._running

    # The connection

    async def _run(self) -> None:
        failures = 0
        while True:
            lost = await self._connect()
            if self._is_closing:  # a task group that fails at the moment of a cancellation swallows it
                return
            failures = 0 if lost.was_ready else failures + 1
            if lost.code == TOO_BIG:
                self._wish.newest = None  # it would end the next connection, too
            if self._is_over(lost):
                self._end = Closed(lost.code, lost.reason)
                return
            await self._pause(lost, failures)

    async def _connect(self) -> Lost:
        """One connection, until it is lost."""
        try:
            async with connect(
                self._url,
                subprotocols=await self._choose_subprotocols(),
                origin=Origin(self._origin) if self._origin else None,
                compression=None,  # pictures are compressed already
                max_size=MAX_FRAME_BYTES,
                open_timeout=MAX_SILENCE_S,
                close_timeout=CLOSE_TIMEOUT_S,
            ) as socket:
                return await Connection(socket, self._wish, self._inbox, self._token).serve()
        except InvalidStatus as error:
            status = error.response.status_code
            is_final = 400 <= status < 500 and status not in (408, 429)
            return Lost(None, f"the handshake was refused with HTTP {status}", is_final=is_final)
        except PASSING as error:
            return Lost(None, f"{type(error).__name__}: {error}")

    async def _choose_subprotocols(self) -> list[Subprotocol]:
        credential = await self._token() if self._token else self._key
        if credential is None:
            return [Subprotocol(SUBPROTOCOL)]
        check_credential("token", credential)
        return [Subprotocol(SUBPROTOCOL), Subprotocol(AUTH_PREFIX + credential)]

    def _is_over(self, lost: Lost) -> bool:
        """A token that ended on an open connection is worth a fresh one; a refused one isn't."""
        if lost.code == AUTH:
            return self._token is None or not lost.was_ready
        return lost.is_final or lost.code in FINAL_CODES

    async def _pause(self, lost: Lost, failures: int) -> None:
        if lost.code == IDLE and not self._wish.is_unmet:
            self._inbox.put(Reconnecting(lost.code, lost.reason, None))
            while not self._wish.is_unmet:
                self._wish.changed.clear()
                await self._wish.changed.wait()
            return
        delay_s = max(backoff_s(failures), wished_delay_s(lost.reason))
        self._inbox.put(Reconnecting(lost.code, lost.reason, delay_s))
        await asyncio.sleep(delay_s)


def check_credential(name: str, credential: str) -> None:
    """Raises ValueError without the credential in it, which may be a secret with a typing error."""
    if not re.fullmatch(r"[\w.~+-]+", credential, re.ASCII):
        raise ValueError(f"{name}: letters, digits and . _ ~ + - are allowed in it, and it may not be empty")


def live_url(base_url: str) -> str:
    """`ws://host/v1/live` of `http://host`. Raises ValueError."""
    parts = urlsplit(base_url)
    scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}.get(parts.scheme)
    if scheme is None or not parts.netloc:
        raise ValueError(f"base_url: {base_url!r} is not allowed; it looks like http://127.0.0.1:8000")
    path = parts.path.rstrip("/").removesuffix("/v1/live")
    return urlunsplit((scheme, parts.netloc, f"{path}/v1/live", "", ""))


def backoff_s(failures: int) -> float:
    """Doubling, with jitter so that many clients don't come back at once."""
    longest_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(failures, 10))
    return longest_s * random.uniform(0.5, 1.0)


def wished_delay_s(reason: str) -> float:
    """A server that goes away, or is full, closes with a reason like `{"reconnect_in_ms": 1000}`."""
    try:
        return float(json.loads(reason)["reconnect_in_ms"]) / 1000
    except (ValueError, KeyError, TypeError):
        return 0.0
