"""One socket of the live protocol, from its first frame to its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, WebSocketException

from fewstep_client.errors import FewstepError
from fewstep_client.events import (
    Authenticated,
    Cancelled,
    Error,
    FinalFrame,
    Ready,
    ServerEvent,
    Superseded,
    read_event,
)
from fewstep_client.inbox import Inbox

# A server answers every request at once, if only with `queued`: longer silence means a dead connection.
MAX_SILENCE_S = 8.0
REFRESH_SHARE = 0.7  # of a token's time, after which the next one is fetched
REFRESH_RETRY_S = 2.0

TokenSource = Callable[[], Awaitable[str]]
# What passes by itself; anything else that a token source raises is a mistake in it.
PASSING = (OSError, WebSocketException, httpx.HTTPError, FewstepError)


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a connection is over. `code` is None where it never stood; `is_final`: trying again changes nothing."""

    code: int | None
    reason: str
    was_ready: bool = False
    is_final: bool = False


@dataclass(slots=True)
class Request:
    """What was asked for, and how many pictures of it are still to come."""

    seq: int
    fields: dict[str, Any]
    num_missing: int = 1
    num_refined_missing: int = 0

    def begin(self) -> dict[str, Any]:
        """The message that asks for it, on a connection that has drawn nothing of it."""
        self.num_missing = self.fields.get("num_images") or 1
        self.num_refined_missing = self.num_missing if self.fields.get("refine") else 0
        return {"type": "generate", "seq": self.seq, **self.fields}

    def count(self, frame: FinalFrame) -> None:
        if frame.refined:
            self.num_refined_missing -= 1
        else:
            self.num_missing -= 1


class Wish:
    """What the caller wants by now: its newest request, until that has ended."""

    def __init__(self) -> None:
        self.newest: Request | None = None
        self.must_cancel = False
        self.changed = asyncio.Event()

    def replace(self, request: Request) -> None:
        self.newest = request
        self.changed.set()

    def cancel(self) -> None:
        self.newest, self.must_cancel = None, True
        self.changed.set()

    @property
    def is_unmet(self) -> bool:
        """Something must be drawn for it; a better picture that has not come is no reason to connect again."""
        return self.newest is not None and self.newest.num_missing > 0

    def note(self, event: ServerEvent) -> None:
        """The newest request may have ended by it."""
        if self.newest is None:
            return
        match event:
            case FinalFrame(seq=self.newest.seq):
                self.newest.count(event)
                if self.newest.num_missing + self.newest.num_refined_missing <= 0:
                    self.newest = None
            case Superseded(seq=self.newest.seq) | Cancelled(seq=self.newest.seq) | Error(seq=self.newest.seq):
                self.newest = None


class Connection:
    """Sends what the caller wishes, as soon as the socket takes it; fills the inbox."""

    def __init__(self, socket: ClientConnection, wish: Wish, inbox: Inbox, token: TokenSource | None) -> None:
        self._socket, self._wish, self._inbox, self._token = socket, wish, inbox, token
        self._tasks = asyncio.TaskGroup()
        self._heard = asyncio.Event()
        self._is_ready = False
        self._sent_seq = -1
        self._unsent_ack: int | None = None

    async def serve(self) -> Lost:
        """Returns when it is over."""
        reason = ""
        try:
            async with self._tasks:
                self._tasks.create_task(self._expect_answer())
                self._tasks.create_task(self._receive_forever())
        except BaseExceptionGroup as group:
            error = group.exceptions[0]
            if isinstance(error, TimeoutError):
                reason = f"no answer for {MAX_SILENCE_S:g} s"
            elif not isinstance(error, ConnectionClosed):
                raise error from None
        return Lost(self._socket.close_code, reason or self._socket.close_reason or "", self._is_ready)

    def acknowledge(self, frame: int) -> None:
        """The frame and those before it were dealt with."""
        self._unsent_ack = frame
        self._wish.changed.set()

    async def _receive_forever(self) -> None:
        while True:
            event = read_event(await self._socket.recv())
            self._heard.set()
            if event is not None:
                self._take(event)

    def _take(self, event: ServerEvent) -> None:
        if isinstance(event, Ready):
            self._is_ready = True
            self._tasks.create_task(self._send_forever())
        if isinstance(event, Ready | Authenticated) and event.token_expires_in_s is not None:
            self._tasks.create_task(self._refresh_after(event.token_expires_in_s * REFRESH_SHARE))
        self._wish.note(event)
        self._inbox.put(event, self)

    async def _expect_answer(self) -> None:
        self._heard.clear()
        async with asyncio.timeout(MAX_SILENCE_S):
            await self._heard.wait()

    async def _send_forever(self) -> None:
        while True:
            while message := self._next_message():
                await self._socket.send(json.dumps(message))
            await self._wish.changed.wait()
            self._wish.changed.clear()

    def _next_message(self) -> dict[str, Any] | None:
        """While the socket is backed up only the newest of each kind waits."""
        if self._unsent_ack is not None:
            frame, self._unsent_ack = self._unsent_ack, None
            return {"type": "ack", "frame": frame}
        if self._wish.must_cancel:
            self._wish.must_cancel = False
            return {"type": "cancel"}
        newest = self._wish.newest
        if newest is None or newest.seq == self._sent_seq:
            return None
        self._sent_seq = newest.seq
        self._tasks.create_task(self._expect_answer())
        return newest.begin()

    async def _refresh_after(self, delay_s: float) -> None:
        """Where no token comes in time, the server closes and the next connection asks again."""
        if self._token is None:
            return
        await asyncio.sleep(delay_s)
        while True:
            try:
                token = await self._token()
                break
            except PASSING:
                await asyncio.sleep(REFRESH_RETRY_S)
        await self._socket.send(json.dumps({"type": "auth", "token": token}))
