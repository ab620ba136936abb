"""Beside the shared fixtures: a look behind the broker, and a second one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from broker.connections import connect_for_commands
from broker.redis_broker import RedisBroker


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A plain client, to look behind the broker."""
    async with connect_for_commands(redis_url) as client:
        yield client


@pytest.fixture
async def other_broker(redis_url: str, prefix: str) -> AsyncIterator[RedisBroker]:
    """Another process's."""
    async with RedisBroker(redis_url, prefix=prefix) as broker:
        yield broker
