"""The secret that gateways share."""

from __future__ import annotations

import asyncio

from broker.redis_broker import RedisBroker


async def test_all_who_ask_at_once_get_the_same_secret(redis_url: str, broker: RedisBroker, prefix: str) -> None:
    async with RedisBroker(redis_url, prefix=prefix) as other:
        secrets = await asyncio.gather(*(asker.shared_secret() for asker in (broker, other) * 5))
    assert len(set(secrets)) == 1
    assert len(secrets[0]) == 32


async def test_another_installation_has_another_secret(redis_url: str, broker: RedisBroker, prefix: str) -> None:
    async with RedisBroker(redis_url, prefix=f"{prefix}-other") as other:
        assert await other.shared_secret() != await broker.shared_secret()
