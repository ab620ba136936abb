"""The Lua scripts: every multi-key decision of the queue, and a typed function for each.

The decisions and their reasons stand in `scripts/*.lua`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import redis
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from broker.connections import Arg, Entry, as_entry, call, translated_errors
from broker.errors import IdempotencyConflict, QueueFull, RequestNotFound, ResultStoreFull, TooLate
from broker.keys import lua_key_functions
from broker.messages import Delivery, Job, LoggedEvent, State, decode_event, decode_job, encode_job
from broker.terms import Limits, Submitted, Terms

_FOLDER = Path(__file__).parent / "scripts"
_SHARED = ("_records", "_events", "_results", "_lines", "_requests")


@dataclass(frozen=True, slots=True)
class Script:
    """One decision: the shared functions and the body of one file, and how Redis calls it once it knows it."""

    text: str
    sha: str


@cache
def load_script(name: str) -> Script:
    """The script of `scripts/<name>.lua`, with the key functions and what all share in front of it."""
    text = "\n".join([lua_key_functions(), *((_FOLDER / f"{part}.lua").read_text() for part in (*_SHARED, name))])
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class Taken:
    """What a worker owns from now on. `unreadable` are requests whose job this version can't decode."""

    deliveries: list[Delivery]
    unreadable: list[str]


def renew(client: redis.Redis, prefix: str, worker_id: str, request_ids: Sequence[str]) -> dict[str, str]:
    """What became of each lease: `renewed`, `cancelled` (renewed, but to be stopped) or `lost`. Synchronous."""
    script = load_script("renew")
    with translated_errors():
        try:
            verdicts: Any = client.evalsha(script.sha, 1, prefix, worker_id, *request_ids)
        except NoScriptError:
            verdicts = client.eval(script.text, 1, prefix, worker_id, *request_ids)
    return {request_id.decode(): verdict.decode() for request_id, verdict in verdicts}


class Scripts:
    """The scripts under one prefix. Redis forgets them when it restarts; the next call then sends the text again."""

    def __init__(self, client: Redis, prefix: str) -> None:
        self._client, self._prefix = client, prefix

    async def submit(self, job: Job, limits: Limits, terms: Terms) -> Submitted:
        """Raises QueueFull, ResultStoreFull, TooLate or IdempotencyConflict."""
        outcome, *rest = await self._run("submit", encode_job(job), json.dumps(_ask(job, limits, terms)))
        match outcome:
            case b"full":
                raise QueueFull(job.model, int(rest[0]), limits.max_depth, wait_ms=int(rest[1]))
            case b"store_full":
                raise ResultStoreFull(int(rest[0]), limits.max_result_bytes, wait_ms=int(rest[1]))
            case b"late":
                raise TooLate(int(rest[0]), job.deadline_ms or 0, wait_ms=int(rest[1]))
            case b"conflict":
                raise IdempotencyConflict
        request_id, position, depth, start_ms = rest
        return Submitted(request_id.decode(), int(position), int(depth), int(start_ms), outcome.decode())

    async def take(
        self, worker_id: str, model: str, count: int, entries: Iterable[Entry], held: Mapping[str, int]
    ) -> Taken:
        read = [part for entry_id, fields in entries for part in (entry_id, fields.get(b"place", b""))]
        return _taken(await self._run("take", worker_id, model, count, _held_lines(held), *read))

    async def reclaim(
        self, client: Redis, worker_id: str, model: str, lease_s: float, count: int, held: Mapping[str, int]
    ) -> Taken:
        """On a client without retries: a second call wouldn't return what the first one took over."""
        args = (worker_id, model, round(lease_s * 1000), count, _held_lines(held))
        return _taken(await self._run("reclaim", *args, client=client))

    async def publish(self, worker_id: str, request_id: str, mark: str, fields: Mapping[bytes, bytes]) -> bool:
        return bool(await self._run("publish", worker_id, request_id, mark, *_flatten(fields)))

    async def finish(self, worker_id: str, request_id: str, state: State, fields: Mapping[bytes, bytes]) -> bool:
        return bool(await self._run("finish", worker_id, request_id, state, *_flatten(fields)))

    async def hand_back(self, worker_id: str, request_ids: Sequence[str]) -> None:
        await self._run("hand_back", worker_id, *request_ids)

    async def cancel(self, request_id: str, claim: str) -> State:
        state: bytes = _found(request_id, await self._run("cancel", request_id, claim))
        return state.decode()  # type: ignore[return-value]

    async def cancel_session(self, session: str) -> None:
        await self._run("cancel_session", session)

    async def status(self, request_id: str) -> tuple[Job, State, float, int, int, int, tuple[LoggedEvent, ...]]:
        """(job, state, created_at, attempt, position, start_ms, log)."""
        reply = _found(request_id, await self._run("status", request_id))
        job, state, created_us, *numbers, log = reply
        attempt, position, start_ms = (int(number) for number in numbers)
        return decode_job(job), state.decode(), int(created_us) / 1e6, attempt, position, start_ms, _log(log)

    async def attach(self, request_id: str, gateway_id: str) -> tuple[LoggedEvent, ...]:
        return _log(_found(request_id, await self._run("attach", request_id, gateway_id)))

    async def register(self, worker_id: str, info: bytes, ttl_s: float) -> None:
        await self._run("register", worker_id, info, round(ttl_s * 1000))

    async def unregister(self, worker_id: str) -> None:
        await self._run("unregister", worker_id)

    async def workers(self) -> list[bytes]:
        infos: list[bytes] = await self._run("workers")
        return infos

    async def _run(self, name: str, *args: Arg, client: Redis | None = None) -> Any:
        client = client or self._client
        script = load_script(name)
        try:
            return await call(client, "EVALSHA", script.sha, 1, self._prefix, *args)
        except NoScriptError:
            return await call(client, "EVAL", script.text, 1, self._prefix, *args)


def _ask(job: Job, limits: Limits, terms: Terms) -> dict[str, object]:
    """What `submit.lua` reads of a job and its terms; what is None is left out."""
    forecast = terms.forecast
    ask = {
        "request_id": job.request_id,
        "model": job.model,
        "lane": job.lane,
        "owner": job.owner,
        "weight": terms.weight,
        "gateway_id": job.gateway_id,
        "session": job.session,
        "keep_ms": round(job.keep_s * 1000),
        "promise_ms": round(min(job.keep_s, terms.promise_s) * 1000),
        "deadline_ms": job.deadline_ms,
        "max_depth": limits.max_depth,
        "max_result_bytes": limits.max_result_bytes,
        "cost_us": max(1, round(forecast.work_ms * 1000)),
        "alone_ms": forecast.alone_ms,
        "full_ms": forecast.full_ms,
        "num_slots": forecast.num_slots,
        "idempotency_key": terms.idempotency_key,
        "fingerprint": terms.fingerprint,
        "cache_key": terms.cache_key,
        "cache_ms": round(terms.cache_s * 1000),
    }
    return {name: value for name, value in ask.items() if value is not None}


def _found(request_id: str, reply: Any) -> Any:
    if reply is None:
        raise RequestNotFound(request_id)
    return reply


def _held_lines(held: Mapping[str, int]) -> str:
    return "\n".join(f"{request_id} {attempt}" for request_id, attempt in held.items())


def _flatten(fields: Mapping[bytes, bytes]) -> list[bytes]:
    return [part for field in fields.items() for part in field]


def _taken(reply: Sequence[Sequence[Any]]) -> Taken:
    taken = Taken([], [])
    for request_id, job, attempt, waited_ms, is_last in reply:
        try:
            delivery = Delivery(decode_job(job), int(attempt), float(waited_ms), bool(is_last))
        except ValidationError:
            taken.unreadable.append(request_id.decode())
        else:
            taken.deliveries.append(delivery)
    return taken


def _log(entries: Sequence[Sequence[Any]]) -> tuple[LoggedEvent, ...]:
    decoded = (as_entry(entry) for entry in entries)
    return tuple(LoggedEvent(int(entry_id.split("-")[0]), decode_event(fields)) for entry_id, fields in decoded)
