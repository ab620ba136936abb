from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest

from app.replies import Replies, Subscription
from app.tasks import running
from broker.embedded import EmbeddedRedis
from broker.messages import Accepted, Completed, Failed, LoggedEvent, Picture, Preview, Started, Timings
from tests.app.conftest import StartApi
from tests.app.live.test_session import go_live
from tests.app.test_generations import until, until_state

TIMINGS = Timings(0, 0, 0, 0, 0, 0)


def accepted(seq: int = 1) -> LoggedEvent:
    return LoggedEvent(seq, Accepted("r"))


def started(seq: int = 2) -> LoggedEvent:
    return LoggedEvent(seq, Started("r", "w", 1))


def preview(seq: int, step: int, index: int = 0) -> LoggedEvent:
    return LoggedEvent(seq, Preview("r", step, 4, Picture(index, 0, "jpeg", 8, 8, b"x")))


def completed(seq: int) -> LoggedEvent:
    return LoggedEvent(seq, Completed("r", (), TIMINGS, "1"))


async def read(subscription: Subscription) -> list[int]:
    return [logged.seq async for logged in subscription]


async def test_log_and_stream_together_give_each_event_once_in_order() -> None:
    subscription = Subscription("r")
    for logged in (preview(4, 2), accepted(), started(), preview(4, 2), completed(5), accepted()):
        subscription.put(logged)
    assert await read(subscription) == [1, 2, 4, 5]


async def test_a_slow_waiter_keeps_the_newest_preview_of_every_image() -> None:
    subscription = Subscription("r")
    subscription.put(accepted())
    for step in range(1, 4):
        for index in range(2):
            subscription.put(preview(2 * step + index, step, index))
    subscription.put(completed(20))
    assert await read(subscription) == [1, 6, 7, 20]


async def test_it_starts_after_a_number() -> None:
    subscription = Subscription("r", after=2)
    for logged in (accepted(), started(), completed(3)):
        subscription.put(logged)
    assert await read(subscription) == [3]


async def test_a_waiter_wakes_up() -> None:
    subscription = Subscription("r")
    waiting = asyncio.create_task(subscription.wait_for_ending())
    await asyncio.sleep(0)
    subscription.put(accepted())
    await asyncio.sleep(0)
    subscription.put(completed(2))
    assert isinstance(await waiting, Completed)


async def test_many_waiters_leave_nothing_behind(start_api: StartApi) -> None:
    async with start_api() as api:
        answers = await asyncio.gather(*(api.http.post("/v1/generations", json={"prompt": "x"}) for _ in range(30)))
        assert {answer.status_code for answer in answers} == {200}
        assert not api.gateway.replies._subscriptions
        assert not api.gateway.metrics._submitted


async def test_redis_goes_and_comes_back_under_a_request(start_api: StartApi, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        async with start_api(redis_url=redis.url) as api, go_live(api) as live:
            api.painter.gate.clear()
            waiting = asyncio.create_task(api.http.post("/v1/generations", json={"prompt": "a red apple"}))
            await until(lambda: bool(api.painter.deliveries))
            location = f"/v1/generations/{api.painter.deliveries[0].job.request_id}"
            redis.kill()
            refused = await api.http.get(location)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_unavailable")
            assert (await api.http.get("/readyz")).status_code == 503
            assert (await api.http.get("/livez")).status_code == 200
            assert "fewstep_redis_up 0.0" in (await api.http.get("/metrics")).text
            await live.generate(1)
            assert (await live.until_message("error"))["error"]["code"] == "queue_unavailable"
            redis.start()
            api.painter.gate.set()
            answer = await waiting
            assert (answer.status_code, answer.json()["state"]) == (200, "completed")
            await until_state(api, location, "completed")
            await live.generate(2)
            await live.until_final(2)


async def test_what_redis_lost_ends_with_an_error(
    start_api: StartApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noticed at once when the reader's connection breaks, else when the subscription has heard nothing for long."""
    monkeypatch.setattr("app.replies.KEEP_INTERVAL_S", 0.5)
    with EmbeddedRedis(tmp_path / "redis") as redis:
        async with start_api(redis_url=redis.url) as api:
            api.painter.gate.clear()
            waiting = asyncio.create_task(api.http.post("/v1/generations", json={"prompt": "a red apple"}))
            await until(lambda: bool(api.painter.deliveries))
            redis.kill()
            for file in (tmp_path / "redis").glob("*.aof*"):
                file.unlink()
            redis.start()
            answer = await waiting
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "request_lost")
            assert answer.headers["x-should-retry"] == "true"
            api.painter.gate.set()


async def test_a_subscription_that_hears_nothing_is_attached_again(
    start_api: StartApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a reply stream that was trimmed before it was read: here the reader doesn't run at all."""
    monkeypatch.setattr("app.replies.KEEP_INTERVAL_S", 0.05)
    async with start_api() as api:
        done = (await api.http.post("/v1/generations", json={"prompt": "x"})).json()
        deaf = Replies(api.gateway.broker, f"gateway-{uuid4().hex}", print)
        with deaf.follow(done["id"]) as subscription, deaf.follow("unknown") as lost:
            async with running(deaf.keep_alive_forever()), asyncio.timeout(10):
                assert isinstance(await subscription.wait_for_ending(), Completed)
                assert isinstance(await lost.wait_for_ending(), Failed)
