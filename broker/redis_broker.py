"""The queue between gateways and workers, on Redis Streams.

Every decision that touches more than one key is a Lua script (`scripts/`), so that it happens whole or not at all, and
may be asked for twice. What is promised: an accepted request runs at least once, its result is published at most once,
and it reaches exactly one terminal event.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from broker.connections import (
    Entry,
    call,
    check_version,
    connect_for_blocking,
    connect_for_commands,
    entries_of,
    translated_errors,
)
from broker.keys import GROUP, Keys
from broker.messages import (
    Abort,
    Cancelled,
    Completed,
    Delivery,
    Expired,
    Failed,
    Job,
    JobError,
    LoggedEvent,
    Preview,
    State,
    Superseded,
    TerminalEvent,
    WorkerInfo,
    decode_event,
    decode_worker_info,
    encode_event,
    encode_worker_info,
)
from broker.scripts import Scripts, Taken
from broker.terms import Limits, Submitted, Terms

log = logging.getLogger(__name__)

_STATES: dict[type[TerminalEvent], State] = {
    Completed: "completed",
    Failed: "failed",
    Superseded: "superseded",
    Cancelled: "cancelled",
    Expired: "expired",
}


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """A request as Redis knows it now. `log` holds its events: states, the newest preview until there is a final
    picture, the ending; pictures as long as they are kept. Numbers may have gaps: replaced previews are gone."""

    job: Job
    state: State
    created_at: float  # seconds since the epoch, by Redis' clock
    attempt: int
    position: int  # 0 unless queued
    start_ms: int  # the predicted wait; 0 unless queued
    log: tuple[LoggedEvent, ...]


class RedisBroker:
    """The queue, for both sides.

    Every method raises BrokerUnavailable when Redis can't be reached, and may then be called again: nothing happens
    twice. A worker's id must be new for every process, since attempts are counted by change of owner. The blocking
    reads (`receive`, `read_replies`, `read_aborts`) each keep a connection of their own; `block_ms=0` doesn't wait.
    """

    def __init__(self, url: str, *, prefix: str = "fewstep") -> None:
        self._url = url
        self._keys = Keys(prefix)
        self._client = connect_for_commands(url)
        self._scripts = Scripts(self._client, prefix)
        self._readers: dict[tuple[str, ...], tuple[int, Redis]] = {}
        # What each worker was given and hasn't finished: request_id -> attempt.
        self._held: defaultdict[str, dict[str, int]] = defaultdict(dict)
        # Streams whose own pending list is known to hold nothing but held work. After any error: not known.
        self._clean: set[tuple[str, str]] = set()
        self._unsure: set[tuple[str, str]] = set()  # a reclaim under way, or without an answer
        self._recovery = asyncio.Lock()

    async def __aenter__(self) -> Self:
        try:
            await check_version(self._client)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        readers = [client for _, client in self._readers.values()]
        self._readers.clear()
        for client in (*readers, self._client):
            await client.aclose()

    async def ping(self) -> None:
        await call(self._client, "PING")

    # The gateway's side

    async def submit(self, job: Job, limits: Limits, terms: Terms | None = None) -> Submitted:
        """Admits a request, or finds the older one that answers it. Called again for a request, it repeats its answer.

        Raises QueueFull, ResultStoreFull, TooLate or IdempotencyConflict.
        """
        return await self._scripts.submit(job, limits, terms or Terms())

    async def cancel(self, request_id: str, claim: str = "") -> State:
        """Cancels a request for all who share it; with a claim only if that was the last one.

        A claim is the request id with which a caller submitted. Returns the state after it. A queued request ends at
        once; a running one stays `running` until its worker stops.
        """
        return await self._scripts.cancel(request_id, claim)

    async def cancel_session(self, session: str) -> None:
        """Cancels what a closed connection has running and waiting."""
        await self._scripts.cancel_session(session)

    async def status(self, request_id: str) -> RequestStatus:
        return RequestStatus(*await self._scripts.status(request_id))

    async def attach(self, request_id: str, gateway_id: str) -> tuple[LoggedEvent, ...]:
        """Subscribes a gateway and returns the log so far: what follows arrives on its reply stream, without a gap."""
        return await self._scripts.attach(request_id, gateway_id)

    async def read_replies(self, gateway_id: str, after: str, block_ms: int = 1000) -> tuple[str, list[LoggedEvent]]:
        """Waits for the next events of a gateway's requests. `after` is "0" first, then what the last call returned;
        what lies before it counts as handled and is deleted."""
        entries = await self._read_stream("replies", self._keys.replies(gateway_id), after, block_ms)
        return (entries[-1][0] if entries else after), list(_readable_events(entries))

    async def keep_gateway(self, gateway_id: str, ttl_s: float = 60) -> None:
        """Keeps unread replies for so long. To be called more often than that."""
        await call(self._client, "PEXPIRE", self._keys.replies(gateway_id), round(ttl_s * 1000))

    async def drop_gateway(self, gateway_id: str) -> None:
        await call(self._client, "DEL", self._keys.replies(gateway_id))

    async def depths(self, models: Sequence[str]) -> dict[str, dict[str, int]]:
        """Unfinished requests per model: {model: {"queued": n, "running": n}}."""
        with translated_errors():
            pipeline = self._client.pipeline(transaction=False)
            for model in models:
                pipeline.hmget(self._keys.depth(model), ["queued", "running"])
            counts: list[Any] = await pipeline.execute()
        return {
            model: {"queued": int(queued or 0), "running": int(running or 0)}
            for model, (queued, running) in zip(models, counts, strict=True)
        }

    async def workers(self) -> list[WorkerInfo]:
        """The live ones, as their last heartbeat described them; without those that another version wrote."""
        return list(_readable_workers(await self._scripts.workers()))

    async def shared_secret(self) -> bytes:
        """32 random bytes, the same for all gateways on this Redis and prefix: drawn by the first that asks."""
        await call(self._client, "SET", self._keys.secret(), secrets.token_bytes(32), "NX")
        return bytes(await call(self._client, "GET", self._keys.secret()))

    # The worker's side

    async def register(self, info: WorkerInfo, ttl_s: float = 15) -> None:
        """A heartbeat: the worker counts as live for so long."""
        await self._scripts.register(info.worker_id, encode_worker_info(info), ttl_s)

    async def unregister(self, worker_id: str) -> None:
        await self._scripts.unregister(worker_id)
        self._held.pop(worker_id, None)

    async def receive(self, worker_id: str, model: str, count: int, block_ms: int = 1000) -> list[Delivery]:
        """Waits for up to `count` requests and makes the worker their owner.

        What was cancelled, superseded or has expired is dropped on the way, so fewer may come than were read. After
        an error or a cancelled call, what got lost with it comes first, even beyond `count`. At most one call at a
        time per worker and model.
        """
        if count <= 0:
            return []
        recovered = await self._recover(worker_id, model, count, block_ms)
        if recovered:
            return recovered
        self._clean.discard((worker_id, model))
        entries = await self._read_group(worker_id, model, ">", count, block_ms)
        deliveries = await self._hold(worker_id, await self._scripts.take(worker_id, model, count, entries, {}))
        self._clean.add((worker_id, model))
        return deliveries

    async def publish(self, worker_id: str, event: Preview) -> bool:
        """Shows a preview. False: the request is no longer this worker's."""
        mark = f"{event.picture.index}:{event.step}"
        return await self._scripts.publish(worker_id, event.request_id, mark, encode_event(event))

    async def finish(self, worker_id: str, event: TerminalEvent) -> bool:
        """Ends a request: stores, publishes, acknowledges and deletes in one. False: it is no longer this worker's.

        A repeated call with the same kind of ending is True again and changes nothing.
        """
        is_ours = await self._scripts.finish(worker_id, event.request_id, _STATES[type(event)], encode_event(event))
        self._held[worker_id].pop(event.request_id, None)
        return is_ours

    async def hand_back(self, worker_id: str, request_ids: Sequence[str]) -> None:
        """Returns unfinished requests to the front of their lines; the attempt doesn't count."""
        await self._scripts.hand_back(worker_id, request_ids)
        for request_id in request_ids:
            self._held[worker_id].pop(request_id, None)

    def forget(self, worker_id: str, request_id: str) -> None:
        """The worker has heard that it lost this request, and holds it no more."""
        self._held[worker_id].pop(request_id, None)

    async def reclaim(self, worker_id: str, model: str, lease_s: float, count: int) -> list[Delivery]:
        """Takes over up to `count` requests that other workers haven't renewed for a lease.

        What can't be tried again (live work, a third attempt, something cancelled or expired) ends here.
        """
        async with self._recovery:
            self._unsure.add((worker_id, model))
            client = await self._reader(("reclaim", worker_id), 0)
            held = self._held[worker_id]
            taken = await self._scripts.reclaim(client, worker_id, model, lease_s, count, held)
            deliveries = await self._hold(worker_id, taken)
            self._unsure.discard((worker_id, model))
            return deliveries

    async def read_aborts(self, worker_id: str, after: str, block_ms: int = 1000) -> tuple[str, list[Abort]]:
        """Waits for what this worker should stop. `after` as in `read_replies`."""
        entries = await self._read_stream("control", self._keys.control(worker_id), after, block_ms)
        return (entries[-1][0] if entries else after), [_abort(fields) for _, fields in entries]

    # Reading

    async def _recover(self, worker_id: str, model: str, count: int, block_ms: int) -> list[Delivery]:
        """What this worker owns in Redis but never heard of, unless the last read went well.

        A reply that got lost leaves its entries in the worker's own pending list, where no `>` ever finds them.
        """
        if (worker_id, model) in self._clean - self._unsure:
            return []
        async with self._recovery:
            entries = await self._read_group(worker_id, model, "0", 1000, block_ms)
            taken = await self._scripts.take(worker_id, model, count, entries, self._held[worker_id])
            deliveries = await self._hold(worker_id, taken)
            self._unsure.discard((worker_id, model))
            return deliveries

    async def _hold(self, worker_id: str, taken: Taken) -> list[Delivery]:
        for request_id in taken.unreadable:
            error = JobError("unreadable_job", "the request was written by another version of fewstep")
            await self.finish(worker_id, Failed(request_id, error))
        self._held[worker_id].update({delivery.job.request_id: delivery.attempt for delivery in taken.deliveries})
        return taken.deliveries

    async def _read_group(self, worker_id: str, model: str, after: str, count: int, block_ms: int) -> list[Entry]:
        client = await self._reader(("receive", worker_id, model), block_ms)
        block = ("BLOCK", block_ms) if block_ms > 0 else ()
        command = ("XREADGROUP", "GROUP", GROUP, worker_id, "COUNT", count, *block)
        try:
            return entries_of(await call(client, *command, "STREAMS", self._keys.ready(model), after))
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
        return []  # A Redis without our group: new, or restarted empty. The take that follows makes it.

    async def _read_stream(self, kind: str, stream: str, after: str, block_ms: int) -> list[Entry]:
        client = await self._reader((kind, stream), block_ms)
        with translated_errors():
            pipeline = client.pipeline(transaction=False)
            if after != "0":
                pipeline.xtrim(stream, minid=after, approximate=True)
            pipeline.xread({stream: after}, count=256, block=block_ms if block_ms > 0 else None)
            return entries_of((await pipeline.execute())[-1])

    async def _reader(self, name: tuple[str, ...], block_ms: int) -> Redis:
        """The connection of one blocking read. Its socket waits longer than the read."""
        longest_ms, client = self._readers.get(name, (0, None))
        if client is not None and block_ms <= longest_ms:
            return client
        if client is not None:
            await client.aclose()
        client = connect_for_blocking(self._url, block_ms / 1000)
        self._readers[name] = (block_ms, client)
        return client


def _readable_events(entries: Sequence[Entry]) -> Iterator[LoggedEvent]:
    """One event that another version wrote must not stop all those behind it."""
    for entry_id, fields in entries:
        try:
            yield LoggedEvent(int(fields[b"seq"]), decode_event(fields))
        except (KeyError, ValidationError):
            log.exception("reply %s can't be read", entry_id)


def _readable_workers(infos: Sequence[bytes]) -> Iterator[WorkerInfo]:
    for info in infos:
        try:
            yield decode_worker_info(info)
        except ValidationError:
            log.warning("a worker can't be read; is it of another version? %.200s", info)


def _abort(fields: dict[bytes, bytes]) -> Abort:
    reason = fields[b"reason"].decode()
    since = fields[b"ms_since_final"]
    return Abort(fields[b"request_id"].decode(), reason, float(since) if since else None)  # type: ignore[arg-type]
