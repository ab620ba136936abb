"""Waiting for a picture on behalf of a client that may leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request

from app.errors import ClientGone
from app.replies import Subscription
from broker.errors import BrokerError
from broker.messages import TerminalEvent
from broker.redis_broker import RedisBroker

log = logging.getLogger(__name__)


async def wait_for_ending(subscription: Subscription, request: Request, timeout_s: float) -> TerminalEvent | None:
    """The ending, or None after `timeout_s`. Raises ClientGone as soon as the client has left."""
    ending = asyncio.ensure_future(subscription.wait_for_ending())
    gone = asyncio.ensure_future(wait_until_gone(request))
    try:
        await asyncio.wait((ending, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            return ending.result()
        if gone.done():
            raise ClientGone("the client has left")
        return None
    finally:
        await _stop(ending)
        await _stop(gone)


async def wait_until_gone(request: Request) -> None:
    """Returns once the client has closed its connection. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stop(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait((task,))


@asynccontextmanager
async def cancelled_if_left(broker: RedisBroker, request_id: str) -> AsyncIterator[None]:
    """Cancels the request when its caller leaves before its end, or when the gateway shuts down under it."""
    try:
        yield
    except (ClientGone, asyncio.CancelledError, GeneratorExit):
        await cancel_quietly(broker, request_id)
        raise


async def cancel_quietly(broker: RedisBroker, request_id: str) -> None:
    try:
        await broker.cancel(request_id)
    except BrokerError as error:
        log.warning("request %s could not be cancelled after its client left: %s", request_id, error)
