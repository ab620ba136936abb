"""One request for several callers: idempotency keys, the result cache, and who may end it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from broker.errors import IdempotencyConflict, RequestNotFound, ResultStoreFull, TooLate
from broker.messages import Cancelled
from broker.redis_broker import RedisBroker
from broker.terms import Forecast, Limits, Submitted, Terms
from tests.broker.helpers import NO_LIMITS, api_job, assert_nothing_left, completed, event_types, receive_now

KEYED = Terms(idempotency_key="k", fingerprint="f")
CACHED = Terms(cache_key="apple", cache_s=60)


async def finish_next(broker: RedisBroker, data: bytes = b"bytes of a picture") -> str:
    [delivery] = await receive_now(broker)
    assert await broker.finish("worker", completed(delivery.job.request_id, data))
    return delivery.job.request_id


async def submit(broker: RedisBroker, request_id: str, terms: Terms, **changes: Any) -> Submitted:
    return await broker.submit(api_job(request_id, **changes), NO_LIMITS, terms)


@pytest.mark.parametrize("state", ["queued", "running", "completed"])
async def test_a_key_used_again_is_the_same_request(broker: RedisBroker, state: str) -> None:
    first = await submit(broker, "r", KEYED)
    if state == "completed":
        await finish_next(broker)
    elif state == "running":
        await receive_now(broker)
    again = await submit(broker, "again", KEYED)
    assert (again.request_id, again.origin, again.depth) == ("r", "repeated", first.depth)
    with pytest.raises(RequestNotFound):
        await broker.status("again")


async def test_a_key_with_another_body_is_a_conflict(broker: RedisBroker) -> None:
    await submit(broker, "r", KEYED)
    with pytest.raises(IdempotencyConflict):
        await submit(broker, "other", replace(KEYED, fingerprint="g"))
    assert (await submit(broker, "bobs", replace(KEYED, fingerprint="g"), owner="bob")).origin == "new"


async def test_a_key_is_free_again_after_an_ending_without_a_picture(broker: RedisBroker) -> None:
    await submit(broker, "r", KEYED)
    await broker.cancel("r")
    assert (await submit(broker, "second", replace(KEYED, fingerprint="g"))).origin == "new"
    [delivery] = await receive_now(broker, count=10)
    await broker.cancel("second")
    assert (await submit(broker, "third", KEYED)).origin == "new", "a request about to be stopped is no answer"
    await broker.finish("worker", Cancelled("second"))
    assert (await submit(broker, "fourth", KEYED)).request_id == "third", "the ending took only its own pointer away"
    assert delivery.job.request_id == "second"


async def test_the_same_picture_is_drawn_once(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    assert (await submit(broker, "r", CACHED)).origin == "new"
    joined = await submit(broker, "while-queued", CACHED)
    assert (joined.request_id, joined.origin) == ("r", "joined")
    await finish_next(broker)
    cached = await submit(broker, "later", CACHED)
    assert (cached.request_id, cached.origin) == ("r", "cached")
    assert await receive_now(broker) == []
    assert (await submit(broker, "other", replace(CACHED, cache_key="pear"))).origin == "new"
    await finish_next(broker)
    await assert_nothing_left(broker, redis, prefix)


async def test_a_cached_answer_takes_an_idempotency_key(broker: RedisBroker) -> None:
    await submit(broker, "r", CACHED)
    await finish_next(broker)
    await submit(broker, "hit", replace(CACHED, idempotency_key="k", fingerprint="f"))
    assert (await submit(broker, "retry", KEYED)).origin == "repeated"


async def test_a_failed_picture_is_drawn_anew(broker: RedisBroker) -> None:
    await submit(broker, "r", CACHED)
    await broker.cancel("r")
    assert (await submit(broker, "again", CACHED)).origin == "new"


async def test_a_request_is_cancelled_with_its_last_caller(broker: RedisBroker) -> None:
    await submit(broker, "r", CACHED)
    await submit(broker, "second", CACHED)
    await submit(broker, "third", CACHED)
    assert await broker.cancel("r", claim="third") == "queued"
    assert await broker.cancel("r", claim="third") == "queued", "a claim is given up once"
    assert await broker.cancel("r", claim="r") == "queued"
    assert await broker.cancel("r", claim="second") == "cancelled"
    assert await event_types(broker, "r") == ["accepted", "cancelled"]


async def test_a_cancellation_without_a_claim_is_for_all(broker: RedisBroker) -> None:
    await submit(broker, "r", CACHED)
    await submit(broker, "second", CACHED)
    assert await broker.cancel("r") == "cancelled"


async def test_keys_on_a_finished_result_end_with_its_time(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    """They are no part of the request's record, which would grow with each."""
    await submit(broker, "r", CACHED)
    await finish_next(broker)
    for i in range(20):
        await submit(broker, f"hit-{i}", replace(CACHED, idempotency_key=f"k{i}", fingerprint="f"))
        assert 0 < await redis.pttl(f"{prefix}:idempotency:ann:k{i}") <= 60_000
    pointers: Any = await redis.hget(f"{prefix}:job:r", "pointers")
    assert pointers.decode().split() == [f"{prefix}:same:apple"]
    assert (await submit(broker, "retry", replace(KEYED, idempotency_key="k3"))).origin == "repeated"


async def test_nobody_joins_a_request_that_comes_too_late_for_it(broker: RedisBroker) -> None:
    forecast = Forecast(work_ms=10, alone_ms=100, full_ms=300, num_slots=10)
    for i in range(60):
        await broker.submit(api_job(f"queued-{i}"), NO_LIMITS, Terms(forecast=forecast))
    await submit(broker, "r", replace(CACHED, forecast=forecast))
    assert (await submit(broker, "patient", replace(CACHED, forecast=forecast), deadline_ms=9000)).origin == "joined"
    with pytest.raises(TooLate):
        await submit(broker, "hasty", replace(CACHED, forecast=forecast), deadline_ms=400)


@pytest.mark.parametrize(
    ("first_ms", "second_ms", "origin"),
    [(None, None, "joined"), (None, 50_000, "joined"), (50_000, 40_000, "joined"), (50_000, None, "new")],
)
async def test_nobody_joins_a_request_that_may_end_too_early(
    broker: RedisBroker, first_ms: int | None, second_ms: int | None, origin: str
) -> None:
    await submit(broker, "r", CACHED, deadline_ms=first_ms)
    assert (await submit(broker, "second", CACHED, deadline_ms=second_ms)).origin == origin


async def test_who_joins_keeps_the_result_as_long_as_promised(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    terms = replace(CACHED, cache_s=0)
    await submit(broker, "r", terms, keep_s=10)
    await submit(broker, "long", terms, keep_s=100)
    await finish_next(broker)
    assert 90_000 < await redis.pttl(f"{prefix}:job:r") <= 100_000
    await submit(broker, "longer", terms, keep_s=1000)
    for key in ("job:r", "events:r", "same:apple"):
        assert 990_000 < await redis.pttl(f"{prefix}:{key}") <= 1_000_000


async def test_the_cache_makes_room_and_a_promise_does_not(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    """Results outlive their promise only while nobody needs their bytes; the longest unused goes first."""
    limits = Limits(max_result_bytes=3500)

    async def draw(name: str) -> Submitted:
        submitted = await broker.submit(api_job(keep_s=0.02), limits, Terms(cache_key=name, cache_s=60))
        if submitted.origin == "new":
            await finish_next(broker, b"x" * 1000)
        return submitted

    await draw("a")
    second = await draw("b")
    await asyncio.sleep(0.03)
    assert (await draw("a")).origin == "cached"
    await draw("c")
    await asyncio.sleep(0.03)
    await draw("d")
    assert [await redis.exists(f"{prefix}:same:{name}") for name in "abcd"] == [1, 0, 1, 1]
    assert not await redis.exists(f"{prefix}:job:{second.request_id}", f"{prefix}:events:{second.request_id}")
    await broker.submit(api_job("kept", keep_s=60), limits)
    await finish_next(broker, b"x" * 4000)
    with pytest.raises(ResultStoreFull) as caught:
        await broker.submit(api_job("refused"), limits)
    assert 50_000 < caught.value.wait_ms <= 60_000
    assert (await broker.status("kept")).state == "completed"
