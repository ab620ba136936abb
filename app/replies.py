"""The one reader of this gateway's reply stream; fans events out to those who wait for them."""

from __future__ import annotations

import asyncio
import bisect
import logging
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from app.tasks import raise_if_cancelled
from broker.errors import BrokerUnavailable, RequestNotFound
from broker.messages import (
    Cancelled,
    Completed,
    Expired,
    Failed,
    JobError,
    LoggedEvent,
    Preview,
    Superseded,
    TerminalEvent,
)
from broker.redis_broker import RedisBroker

BLOCK_MS = 1000
KEEP_INTERVAL_S = 10.0
GATEWAY_TTL_S = 60.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0

log = logging.getLogger(__name__)


def as_ending(logged: LoggedEvent) -> TerminalEvent | None:
    """The event, if it is a request's last."""
    match logged.event:
        case Completed() | Failed() | Superseded() | Cancelled() | Expired():
            return logged.event
        case _:
            return None


class Subscription:
    """What one waiter has not read yet of one request: states and the ending always, of previews the newest per image.

    Bounded, because a request has few states. Events come out in the order of their numbers and each once, whether
    they arrived by the stream, by the log or by both.
    """

    def __init__(self, request_id: str, after: int = 0) -> None:
        self.request_id = request_id
        self.last_seq = after
        self.heard_at = asyncio.get_running_loop().time()
        self._pending: list[LoggedEvent] = []
        self._arrived = asyncio.Event()

    def put(self, logged: LoggedEvent) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        if logged.seq <= self.last_seq or any(waiting.seq == logged.seq for waiting in self._pending):
            return
        bisect.insort(self._pending, logged, key=lambda waiting: waiting.seq)
        self._drop_stale_previews()
        self._arrived.set()

    async def next(self) -> LoggedEvent:
        """The next event, waiting for it if need be."""
        while not self._pending:
            self._arrived.clear()
            await self._arrived.wait()
        logged = self._pending.pop(0)
        self.last_seq = logged.seq
        return logged

    async def __aiter__(self) -> AsyncIterator[LoggedEvent]:
        """All events up to the ending."""
        while True:
            logged = await self.next()
            yield logged
            if as_ending(logged):
                return

    async def wait_for_ending(self) -> TerminalEvent:
        while True:
            if ending := as_ending(await self.next()):
                return ending

    def _drop_stale_previews(self) -> None:
        newest = {
            logged.event.picture.index: logged.seq for logged in self._pending if isinstance(logged.event, Preview)
        }
        self._pending = [
            logged
            for logged in self._pending
            if not isinstance(logged.event, Preview) or newest[logged.event.picture.index] == logged.seq
        ]


class Replies:
    """Reads the reply stream of `gateway_id` in one task, however many requests are under way.

    After a gap (Redis was away) every open subscription is attached again, which brings the log of what was missed.
    So are, from time to time, subscriptions that heard nothing, in case the stream was trimmed before it was read.
    `observe` sees every event once, subscribed or not.
    """

    def __init__(self, broker: RedisBroker, gateway_id: str, observe: Callable[[LoggedEvent], None]) -> None:
        self.gateway_id = gateway_id
        self._broker = broker
        self._observe = observe
        self._subscriptions: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._num_tasks = 0

    @contextmanager
    def follow(self, request_id: str, after: int = 0) -> Iterator[Subscription]:
        """Everything about a request that this gateway submits from now on."""
        subscription = Subscription(request_id, after)
        self._subscriptions[request_id].add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions[request_id].discard(subscription)
            if not self._subscriptions[request_id]:
                del self._subscriptions[request_id]

    @asynccontextmanager
    async def attach(self, request_id: str, after: int = 0) -> AsyncIterator[Subscription]:
        """Everything about a request that exists already, its log first, from number `after` + 1."""
        with self.follow(request_id, after) as subscription:
            for logged in await self._broker.attach(request_id, self.gateway_id):
                subscription.put(logged)
            yield subscription

    @property
    def is_reading(self) -> bool:
        """Whether both background tasks are at work."""
        return self._num_tasks == 2

    async def read_forever(self) -> None:
        with self._counted():
            await self._read()

    async def keep_alive_forever(self) -> None:
        with self._counted():
            await self._keep_alive()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_tasks += 1
        try:
            yield
        finally:
            self._num_tasks -= 1

    async def _read(self) -> None:
        after, pause_s = "0", 0.0
        while True:
            raise_if_cancelled()
            try:
                after, events = await self._broker.read_replies(self.gateway_id, after, BLOCK_MS)
                if pause_s:
                    log.info("Redis is back; attaching %d open requests again", len(self._subscriptions))
                    await self._attach_again(list(self._subscriptions))
            except BrokerUnavailable as error:
                if not pause_s:
                    log.warning("lost Redis, trying again: %s", error)
                pause_s = min(MAX_PAUSE_S, pause_s * 2) or FIRST_PAUSE_S
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                continue
            pause_s = 0.0
            for logged in events:
                self._deliver(logged)

    async def _keep_alive(self) -> None:
        while True:
            try:
                await self._broker.keep_gateway(self.gateway_id, GATEWAY_TTL_S)
                await self._attach_again(self._silent())
            except BrokerUnavailable:
                log.debug("can't renew the reply stream while Redis is away")
            raise_if_cancelled()
            await asyncio.sleep(KEEP_INTERVAL_S)

    def _deliver(self, logged: LoggedEvent) -> None:
        self._observe(logged)
        for subscription in self._subscriptions.get(logged.event.request_id, ()):
            subscription.put(logged)

    def _silent(self) -> list[str]:
        since = asyncio.get_running_loop().time() - KEEP_INTERVAL_S
        return [
            request_id
            for request_id, subscriptions in self._subscriptions.items()
            if any(subscription.heard_at < since for subscription in subscriptions)
        ]

    async def _attach_again(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            for logged in await self._read_log(request_id):
                for subscription in self._subscriptions.get(request_id, ()):
                    subscription.put(logged)

    async def _read_log(self, request_id: str) -> tuple[LoggedEvent, ...]:
        try:
            return await self._broker.attach(request_id, self.gateway_id)
        except RequestNotFound:
            last = max((waiter.last_seq for waiter in self._subscriptions.get(request_id, ())), default=0)
            error = JobError("request_lost", "the request was lost while Redis was away", is_retryable=True)
            return (LoggedEvent(last + 1, Failed(request_id, error)),)
