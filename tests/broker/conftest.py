"""A real Redis for the whole run, and a prefix of its own for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from broker.connections import connect_for_commands
from broker.embedded import EmbeddedRedis
from broker.redis_broker import RedisBroker


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """An embedded server for all tests of this process."""
    with EmbeddedRedis() as server:
        yield server.url


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid4().hex}"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A plain client, to look behind the broker."""
    async with connect_for_commands(redis_url) as client:
        yield client


@pytest.fixture
async def broker(redis_url: str, prefix: str) -> AsyncIterator[RedisBroker]:
    """The gateway's broker, and the worker's where one process is enough."""
    async with RedisBroker(redis_url, prefix=prefix) as broker:
        yield broker


@pytest.fixture
async def other_broker(redis_url: str, prefix: str) -> AsyncIterator[RedisBroker]:
    """Another process's."""
    async with RedisBroker(redis_url, prefix=prefix) as broker:
        yield broker
