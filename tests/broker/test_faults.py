"""Lost replies, a Redis that dies, a Redis that isn't there."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from redis.asyncio import Redis

from broker.connections import check_version, connect_for_commands, translated_errors
from broker.embedded import EmbeddedRedis
from broker.errors import BrokerUnavailable, RedisTooOld
from broker.messages import Failed
from broker.redis_broker import RedisBroker
from broker.scripts import load_script
from tests.broker.fault_proxy import FaultProxy
from tests.broker.helpers import (
    MODEL,
    NO_LIMITS,
    api_job,
    assert_nothing_left,
    completed,
    event_types,
    ids,
    live_job,
    preview,
    receive_now,
    replies,
    run_all,
    submit_all,
)


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(unquote(urlparse(redis_url).path)) as proxy:
        yield proxy


@pytest.fixture
async def shaky(proxy: FaultProxy, prefix: str) -> AsyncIterator[RedisBroker]:
    """A broker behind the proxy."""
    async with RedisBroker(proxy.url, prefix=prefix) as broker:
        yield broker


async def test_a_submit_whose_reply_is_lost_gives_one_job(
    shaky: RedisBroker, proxy: FaultProxy, broker: RedisBroker
) -> None:
    await submit_all(shaky, api_job("before"))
    proxy.lose_reply_to(load_script("submit").sha)
    submitted = await shaky.submit(api_job("r"), NO_LIMITS)
    assert proxy.num_lost == 1
    assert (submitted.request_id, submitted.position, submitted.depth) == ("r", 1, 2)
    assert await event_types(broker, "r") == ["accepted"]
    assert await run_all(broker) == ["before", "r"]


async def test_a_submit_that_fails_for_good_may_be_repeated(
    shaky: RedisBroker, proxy: FaultProxy, broker: RedisBroker
) -> None:
    await submit_all(shaky, api_job("before"))
    proxy.lose_reply_to(load_script("submit").sha, times=3)
    with pytest.raises(BrokerUnavailable):
        await shaky.submit(api_job("r"), NO_LIMITS)
    assert (await shaky.submit(api_job("r"), NO_LIMITS)).depth == 2
    assert await run_all(broker) == ["before", "r"]


@pytest.mark.parametrize("fault", ["XREADGROUP", "take"])
async def test_what_a_lost_read_delivered_comes_with_the_next(
    shaky: RedisBroker, proxy: FaultProxy, broker: RedisBroker, fault: str
) -> None:
    await submit_all(broker, *(api_job(f"r{i}") for i in range(4)))
    [running] = ids(await receive_now(shaky))
    if fault == "take":
        proxy.lose_reply_to(load_script("take").sha, times=3)
    else:
        proxy.lose_reply_to("XREADGROUP")
    with pytest.raises(BrokerUnavailable):
        await receive_now(shaky, count=2)
    recovered = await receive_now(shaky, count=2)
    assert ids(recovered) == ["r1", "r2"]  # and not what it runs already
    assert {delivery.attempt for delivery in recovered} == {1}
    assert ids(await receive_now(shaky, count=2)) == ["r3"]
    for request_id in ("r0", "r1", "r2", "r3"):
        assert await shaky.finish("worker", completed(request_id))
        assert await event_types(broker, request_id) == ["accepted", "started", "completed"]
    assert running == "r0"


async def test_a_cancelled_read_loses_nothing(broker: RedisBroker, other_broker: RedisBroker) -> None:
    await submit_all(broker, *(api_job(f"r{i}") for i in range(30)))
    seen: list[str] = []
    for i in range(40):
        reading = asyncio.create_task(other_broker.receive("worker", MODEL, 1, block_ms=100))
        await asyncio.sleep(0.0003 * (i % 8))
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            seen += ids(await reading)
    while deliveries := await receive_now(other_broker, count=4):
        seen += ids(deliveries)
    assert sorted(seen) == sorted(f"r{i}" for i in range(30))
    assert (await broker.depths([MODEL]))[MODEL] == {"queued": 0, "running": 30}


async def test_a_loop_of_reads_can_be_cancelled_at_any_moment(broker: RedisBroker) -> None:
    async def read() -> None:
        after = "0"
        while True:
            after, _ = await broker.read_replies("gateway", after, block_ms=0)

    for num_turns in range(60):
        reading = asyncio.create_task(read())
        for _ in range(num_turns):
            await asyncio.sleep(0)
        reading.cancel()
        _, unfinished = await asyncio.wait({reading}, timeout=2)
        assert not unfinished


async def test_a_finish_whose_reply_is_lost_is_still_ours(
    shaky: RedisBroker, proxy: FaultProxy, broker: RedisBroker, redis: Redis, prefix: str
) -> None:
    await submit_all(shaky, api_job("r"))
    await receive_now(shaky)
    proxy.lose_reply_to(load_script("finish").sha)
    assert await shaky.finish("worker", completed("r"))
    assert proxy.num_lost == 1
    assert [kind for _, kind in await replies(broker)] == ["completed"]
    await assert_nothing_left(broker, redis, prefix)


async def test_a_preview_whose_reply_is_lost_is_shown_once(
    shaky: RedisBroker, proxy: FaultProxy, broker: RedisBroker
) -> None:
    await submit_all(shaky, api_job("r"))
    await receive_now(shaky)
    await shaky.publish("worker", preview("r", 1))
    proxy.lose_reply_to(load_script("publish").sha)
    assert await shaky.publish("worker", preview("r", 2))
    assert [kind for _, kind in await replies(broker)] == ["preview", "preview"]


async def test_what_a_lost_reclaim_took_over_comes_with_the_next_read(
    shaky: RedisBroker, proxy: FaultProxy, broker: RedisBroker
) -> None:
    await submit_all(broker, api_job("r"))
    await receive_now(broker, "dead")
    await receive_now(shaky, "worker")
    await asyncio.sleep(0.03)
    await shaky.reclaim("worker", "other", 10, 4)  # Redis knows the script now
    proxy.lose_reply_to(load_script("reclaim").sha)
    with pytest.raises(BrokerUnavailable):
        await shaky.reclaim("worker", MODEL, 0.02, 4)
    [delivery] = await receive_now(shaky, "worker")
    assert (delivery.job.request_id, delivery.attempt) == ("r", 2)


async def test_replies_whose_read_is_lost_are_read_again(
    shaky: RedisBroker, proxy: FaultProxy, broker: RedisBroker
) -> None:
    await submit_all(broker, api_job("a"))
    await broker.cancel("a")
    after, _ = await shaky.read_replies("gateway", "0")
    await submit_all(broker, api_job("b"))
    await broker.cancel("b")
    proxy.lose_reply_to("XREAD")
    with pytest.raises(BrokerUnavailable):
        await shaky.read_replies("gateway", after)
    _, events = await shaky.read_replies("gateway", after)
    assert [logged.event.request_id for logged in events] == ["b"]


async def test_accepted_work_survives_a_killed_redis(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    try:
        async with RedisBroker(server.url) as broker, connect_for_commands(server.url) as redis:
            await submit_all(broker, *(api_job(f"r{i}") for i in range(8)), live_job("live"))
            running = ids(await receive_now(broker, count=3))
            await broker.finish("worker", completed(running[0]))
            await broker.cancel("r7")
            await asyncio.sleep(1.1)  # the append-only file is written every second
            waiting = asyncio.create_task(broker.receive("idle", "other", 1, block_ms=5000))
            await asyncio.sleep(0.05)
            server.kill()
            with pytest.raises(BrokerUnavailable):
                await waiting
            with pytest.raises(BrokerUnavailable):
                await broker.submit(api_job(), NO_LIMITS)
            server.start()

            assert await broker.receive("idle", "other", 1, block_ms=0) == []
            assert (await broker.status(running[0])).state == "completed"
            for request_id in running[1:]:
                assert await broker.finish("worker", completed(request_id))
            finished = await run_all(broker)
            assert sorted([*running, *finished]) == sorted([*(f"r{i}" for i in range(7)), "live"])
            assert (await broker.status("r7")).state == "cancelled"
            await assert_nothing_left(broker, redis, "fewstep")
    finally:
        server.stop()


async def test_a_redis_that_comes_back_empty_is_set_up_again(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    try:
        async with RedisBroker(server.url) as broker:
            await submit_all(broker, api_job("lost"))
            await receive_now(broker)
            server.kill()
            for data in list(tmp_path.glob("appendonly*")):  # noqa: ASYNC240 (a folder since Redis 7)
                shutil.rmtree(data) if data.is_dir() else data.unlink()
            server.start()
            with pytest.raises(BrokerUnavailable):
                await receive_now(broker)
            assert await receive_now(broker) == []
            assert not await broker.finish("worker", completed("lost"))
            await submit_all(broker, api_job("r"))
            assert await run_all(broker) == ["r"]
    finally:
        server.stop()


async def test_a_job_of_another_version_fails_and_blocks_nobody(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, api_job("strange"), api_job("r"))
    await redis.hset(f"{prefix}:job:strange", "job", '{"schema_version": 99}')
    assert ids(await receive_now(broker, count=2)) == ["r"]
    assert await broker.finish("worker", completed("r"))
    _, events = await broker.read_replies("gateway", "0")
    [failed] = [logged.event for logged in events if isinstance(logged.event, Failed)]
    assert (failed.request_id, failed.error.code) == ("strange", "unreadable_job")
    await assert_nothing_left(broker, redis, prefix)


async def test_an_event_of_another_version_hides_no_other(
    broker: RedisBroker, redis: Redis, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    await submit_all(broker, api_job("a"), api_job("b"))
    await broker.cancel("a")
    await redis.xadd(f"{prefix}:replies:gateway", {"seq": 1, "event": '{"type": "new"}'})
    await broker.cancel("b")
    assert await replies(broker) == [("a", "cancelled"), ("b", "cancelled")]
    assert "can't be read" in caplog.text


async def test_no_redis_at_all(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/nobody.sock"
    with pytest.raises(BrokerUnavailable, match="can't be reached"):
        async with RedisBroker(url):
            pass
    broker = RedisBroker(url)
    for call in (broker.ping(), receive_now(broker), broker.read_replies("gateway", "0"), broker.workers()):
        with pytest.raises(BrokerUnavailable):
            await call
    await broker.close()


async def test_a_full_server_takes_nothing_new_and_finishes_the_rest(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        async with RedisBroker(server.url) as broker, connect_for_commands(server.url) as redis:
            await submit_all(broker, api_job("a"), api_job("b"), api_job("c"))
            await redis.config_set("maxmemory", "1")
            with pytest.raises(BrokerUnavailable, match="refuses for now"):
                await broker.submit(api_job(), NO_LIMITS)
            await broker.cancel("a")  # what frees memory goes on
            assert await run_all(broker) == ["b", "c"]
            await assert_nothing_left(broker, redis, "fewstep")


async def test_other_errors_of_redis_stay_what_they_are(redis: Redis) -> None:
    with pytest.raises(Exception, match="unknown command"), translated_errors():
        await redis.execute_command("NONSENSE")  # type: ignore[no-untyped-call]


async def test_an_old_server_is_refused(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    async def info(_section: str) -> dict[str, str]:
        return {"redis_version": "6.0.16"}

    monkeypatch.setattr(redis, "info", info)
    with pytest.raises(RedisTooOld, match=r"6\.2 or newer is needed, this server is 6\.0\.16"):
        await check_version(redis)
