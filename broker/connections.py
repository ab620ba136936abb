"""How this package talks to Redis: two kinds of client, one border where foreign errors are translated."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.driver_info import DriverInfo

from broker.errors import BrokerUnavailable, RedisTooOld

MIN_VERSION = (6, 2)

# One for all: by itself redis-py looks its own version up on disk for every connection, while everything else waits.
DRIVER = DriverInfo(lib_version=redis.__version__)

# What makes a server refuse for now, though it answers: it loads, is a replica, is out of memory, or is busy.
_PASSING_ERRORS = (
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "OOM",
    "MISCONF",
    "BUSY ",
    "NOREPLICAS",
    "CLUSTERDOWN",
    "UNBLOCKED",
)

Arg = str | bytes | int | float
Entry = tuple[str, dict[bytes, bytes]]


def connect_for_commands(url: str) -> Redis:
    """Short commands, retried: every one of them is idempotent."""
    return _connect(url, num_connections=16, timeout_s=2.5, retry=Retry(ExponentialBackoff(cap=0.3, base=0.03), 2))


def connect_for_blocking(url: str, block_s: float) -> Redis:
    """One reader that waits inside Redis. No retry: after a lost reply its caller must look before it reads on."""
    return _connect(url, num_connections=1, timeout_s=block_s + 3.0, retry=Retry(NoBackoff(), 0))


def connect_from_thread(url: str, timeout_s: float) -> redis.Redis:
    """A synchronous client for a thread of its own."""
    return redis.Redis.from_url(
        url,
        protocol=3,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=redis.retry.Retry(NoBackoff(), 1),
        driver_info=DRIVER,
    )


def _connect(url: str, *, num_connections: int, timeout_s: float, retry: Retry) -> Redis:
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=num_connections,
        timeout=3,
        protocol=3,
        socket_timeout=timeout_s,
        socket_connect_timeout=2.0,
        retry=retry,
        driver_info=DRIVER,
    )
    return Redis.from_pool(pool)


async def call(client: Redis, *command: Arg) -> Any:
    """One command, its errors translated."""
    with translated_errors():
        return await client.execute_command(*command)  # type: ignore[no-untyped-call]


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turns what redis-py raises when Redis can't serve into BrokerUnavailable. A script's own fault stays as it is."""
    num_cancels = _count_cancels()
    try:
        yield
        # redis-py sends through asyncio.wait_for, which up to Python 3.11 may swallow a cancellation. A loop of reads
        # would then never end.
        if _count_cancels() > num_cancels:
            raise asyncio.CancelledError
    except (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, OSError) as error:
        if _count_cancels() > num_cancels:
            raise asyncio.CancelledError from error
        raise BrokerUnavailable(f"Redis can't be reached: {error}") from error
    except exceptions.ResponseError as error:
        if isinstance(error, exceptions.OutOfMemoryError) or is_passing(error):
            raise BrokerUnavailable(f"Redis refuses for now: {error}") from error
        raise


def _count_cancels() -> int:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # a thread without a loop
        return 0
    return task.cancelling() if task else 0


def is_passing(error: exceptions.ResponseError) -> bool:
    return any(word in str(error) for word in _PASSING_ERRORS)


async def check_version(client: Redis) -> None:
    """RedisTooOld below 6.2."""
    with translated_errors():
        info: Mapping[str, Any] = await client.info("server")
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        raise RedisTooOld(version)


def entries_of(reply: object) -> list[Entry]:
    """The entries of an XREAD or XREADGROUP reply over one stream, in RESP3's shape as redis-py gives it."""
    if not isinstance(reply, Mapping):
        return []
    return [as_entry(entry) for batches in reply.values() for batch in batches for entry in batch]


def as_entry(entry: Sequence[Any]) -> Entry:
    """An entry as XREAD (a mapping) or a script (a flat list, or nothing when the entry is gone) returns it."""
    entry_id, fields = entry
    if isinstance(fields, Mapping):
        return entry_id.decode(), dict(fields)
    fields = fields or []
    return entry_id.decode(), dict(zip(fields[::2], fields[1::2], strict=True))
