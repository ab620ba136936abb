"""Getting in, and waiting for a picture on behalf of a client that may leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.requests import Request

from app.access.callers import Caller
from app.errors import ClientGone
from app.gateway import Gateway
from app.replies import Subscription
from broker.errors import BrokerError
from broker.messages import Expired, Job, LoggedEvent, TerminalEvent
from broker.redis_broker import RedisBroker, RequestStatus
from broker.terms import Submitted, Terms

LAST_SEQ = 2**62  # after all numbers of a log

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that got in. `job` is the generation that answers it: an older one, with its `status` at that moment,
    where `submitted.origin` isn't "new". `claim` is what this caller gives up when it leaves."""

    job: Job
    claim: str
    submitted: Submitted
    subscription: Subscription
    status: RequestStatus | None = None


@asynccontextmanager
async def enter(gateway: Gateway, job: Job, caller: Caller, terms: Terms) -> AsyncIterator[Entry]:
    """Submits, and follows what answers it. Its events end at the request's own deadline at the latest.

    Raises what `Admission.submit` does.
    """
    with gateway.replies.follow(job.request_id) as subscription:
        submitted = await gateway.admission.submit(job, caller, terms)
        if submitted.origin == "new":
            with _expiring(subscription, job.deadline_ms):
                yield Entry(job, job.request_id, submitted, subscription)
            return
    async with _following(gateway, submitted.request_id, job) as (status, subscription):
        yield Entry(status.job, job.request_id, submitted, subscription, status)


@asynccontextmanager
async def _following(gateway: Gateway, request_id: str, job: Job) -> AsyncIterator[tuple[RequestStatus, Subscription]]:
    """The request that `job` has joined. At its own deadline, or where it can't be followed, `job` gives it up."""
    is_given_up = True
    try:
        status = await gateway.broker.status(request_id)
        async with gateway.replies.attach(request_id) as subscription:
            with _expiring(subscription, job.deadline_ms):
                is_given_up = False
                try:
                    yield status, subscription
                finally:
                    is_given_up = subscription.last_seq == LAST_SEQ
    finally:
        if is_given_up:
            await cancel_quietly(gateway.broker, request_id, job.request_id)


@contextmanager
def _expiring(subscription: Subscription, deadline_ms: int | None) -> Iterator[None]:
    """The queue and the worker keep the deadline, too; but what is shared has another one, and either may be away."""
    if deadline_ms is None:
        yield
        return
    expired = LoggedEvent(LAST_SEQ, Expired(subscription.request_id))
    timer = asyncio.get_running_loop().call_later(deadline_ms / 1000, subscription.put, expired)
    try:
        yield
    finally:
        timer.cancel()


async def wait_for_ending(subscription: Subscription, request: Request) -> TerminalEvent:
    """Raises ClientGone as soon as the client has left."""
    ending = asyncio.ensure_future(subscription.wait_for_ending())
    gone = asyncio.ensure_future(wait_until_gone(request))
    try:
        await asyncio.wait((ending, gone), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            return ending.result()
        raise ClientGone("the client has left")
    finally:
        await _stop(ending)
        await _stop(gone)


async def wait_at_most(subscription: Subscription, request: Request, timeout_s: float) -> TerminalEvent | None:
    """The same, or None after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await wait_for_ending(subscription, request)
    except TimeoutError:
        return None


async def wait_until_gone(request: Request) -> None:
    """Returns once the client has closed its connection. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stop(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait((task,))


@asynccontextmanager
async def given_up_if_left(broker: RedisBroker, entry: Entry) -> AsyncIterator[None]:
    """Gives the request up when its caller leaves before its end, or when the gateway shuts down under it: it is
    cancelled unless others wait for it, too."""
    try:
        yield
    except (ClientGone, asyncio.CancelledError, GeneratorExit):
        with anyio.CancelScope(shield=True):  # a streaming response is cancelled again at every await
            await cancel_quietly(broker, entry.job.request_id, entry.claim)
        raise


async def cancel_quietly(broker: RedisBroker, request_id: str, claim: str) -> None:
    try:
        await broker.cancel(request_id, claim)
    except BrokerError as error:
        log.warning("request %s could not be cancelled after its client left: %s", request_id, error)
