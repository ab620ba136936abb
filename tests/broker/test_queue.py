"""Order, admission and endings of plain requests."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from broker.errors import QueueFull, RequestNotFound, ResultStoreFull
from broker.messages import Accepted, Cancelled, Completed, Expired, Failed, JobError, LoggedEvent, Preview, Started
from broker.redis_broker import RedisBroker
from broker.terms import Limits, Terms
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


async def test_one_request_from_submit_to_result(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    job = api_job("r")
    submitted = await broker.submit(job, NO_LIMITS)
    assert (submitted.request_id, submitted.position, submitted.depth) == ("r", 0, 1)

    [delivery] = await receive_now(broker)
    assert delivery.job == job
    assert (delivery.attempt, delivery.is_last_attempt) == (1, False)
    assert 0 < delivery.waited_ms < 5000
    assert await broker.publish("worker", preview("r"))
    assert await broker.finish("worker", completed("r"))

    after, events = await broker.read_replies("gateway", "0")
    assert events == [
        LoggedEvent(3, preview("r")),
        LoggedEvent(4, completed("r")),
    ]
    assert await broker.read_replies("gateway", after, block_ms=0) == (after, [])
    status = await broker.status("r")
    assert (status.job, status.state, status.attempt, status.position) == (job, "completed", 1, 0)
    assert status.log == (  # the final picture replaced the preview
        LoggedEvent(1, Accepted("r")),
        LoggedEvent(2, Started("r", "worker", 1)),
        LoggedEvent(4, completed("r")),
    )
    await assert_nothing_left(broker, redis, prefix)


async def test_the_same_submit_twice_gives_one_job(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("before"))
    first = await broker.submit(api_job("r"), NO_LIMITS)
    await submit_all(broker, api_job("after"))
    assert await broker.submit(api_job("r"), NO_LIMITS) == first
    assert (first.position, first.depth) == (1, 2)
    assert await run_all(broker) == ["before", "r", "after"]


async def test_one_callers_many_dont_hold_up_anothers_first(broker: RedisBroker) -> None:
    await submit_all(broker, *(api_job(f"bob-{i}", owner="bob") for i in range(300)))
    submitted = await broker.submit(api_job("ann", owner="ann"), NO_LIMITS)
    assert submitted.position <= 5  # the short ready stream and one turn of bob's

    order = [request_id for _ in range(10) for request_id in ids(await receive_now(broker))]
    assert "ann" in order[:6]


async def test_callers_take_turns(broker: RedisBroker) -> None:
    await submit_all(broker, *(api_job(f"{owner}{i}", owner=owner) for owner in "abc" for i in range(6)))
    order = await run_all(broker)
    rest = [request_id[0] for request_id in order[4:10]]  # the first four went ahead before the others came
    assert sorted(rest[:3]) == ["a", "b", "c"]
    assert rest[:3] * 2 == rest


async def test_a_heavier_owner_gets_more_places(broker: RedisBroker) -> None:
    await submit_all(broker, *(api_job(f"x{i}", owner="x") for i in range(4)))  # fill the ready stream
    for i in range(12):
        await broker.submit(api_job(f"a{i}", owner="a"), NO_LIMITS, Terms(weight=3))
        await broker.submit(api_job(f"b{i}", owner="b"), NO_LIMITS)
    order = "".join(request_id[0] for request_id in await run_all(broker))[4:]
    assert all(order[i : i + 4].count("a") == 3 for i in range(9))


async def test_live_goes_first_but_every_fifth_slot_is_the_api_lanes(broker: RedisBroker) -> None:
    await submit_all(broker, *(api_job(f"x{i}", owner="x") for i in range(4)))
    await submit_all(broker, *(api_job(f"api{i}") for i in range(10)))
    await submit_all(broker, *(live_job(f"live{i}", session=f"s{i}") for i in range(16)))
    lanes = [request_id.rstrip("0123456789") for request_id in await run_all(broker)][4:]
    assert lanes[:20].count("api") == 4
    assert all("api" in lanes[i : i + 5] for i in range(15))
    assert set(lanes[20:]) == {"api"}


async def test_the_ready_stream_stays_short_and_follows_the_batch_size(
    broker: RedisBroker, redis: Redis, prefix: str
) -> None:
    await submit_all(broker, *(api_job() for _ in range(50)))
    assert await redis.xlen(f"{prefix}:ready:{MODEL}") == 4
    assert len(await receive_now(broker, count=32)) == 8
    assert await redis.xlen(f"{prefix}:ready:{MODEL}") == 8 + 8
    assert len(await receive_now(broker, count=24)) == 8


async def test_depth_counts_and_limits(broker: RedisBroker) -> None:
    limits = Limits(max_depth=2)
    await broker.submit(api_job("a"), limits)
    await broker.submit(api_job("b"), limits)
    with pytest.raises(QueueFull) as caught:
        await broker.submit(api_job("c"), limits)
    assert (caught.value.model, caught.value.depth, caught.value.max_depth) == (MODEL, 2, 2)
    await broker.submit(api_job("other", model="other"), limits)  # each model has a queue of its own
    [delivery] = await receive_now(broker)
    assert await broker.depths([MODEL, "other", "none"]) == {
        MODEL: {"queued": 1, "running": 1},
        "other": {"queued": 1, "running": 0},
        "none": {"queued": 0, "running": 0},
    }
    with pytest.raises(QueueFull):
        await broker.submit(api_job("c"), limits)
    await broker.finish("worker", completed(delivery.job.request_id))
    assert (await broker.submit(api_job("c"), limits)).depth == 2


async def test_position_tells_who_stands_before(broker: RedisBroker) -> None:
    positions = [(await broker.submit(api_job(f"r{i}"), NO_LIMITS)).position for i in range(6)]
    assert positions == [0, 1, 2, 3, 4, 5]
    assert [(await broker.status(f"r{i}")).position for i in range(6)] == positions
    await receive_now(broker, count=2)
    assert [(await broker.status(f"r{i}")).position for i in range(6)] == [0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("num_before", [0, 10])
async def test_cancel_while_queued_ends_at_once(
    broker: RedisBroker, redis: Redis, prefix: str, num_before: int
) -> None:
    """In the ready stream, and in the line behind it."""
    await submit_all(broker, *(api_job(f"b{i}") for i in range(num_before)), api_job("r", owner="bob"))
    assert await broker.cancel("r") == "cancelled"
    assert await broker.cancel("r") == "cancelled"
    assert await event_types(broker, "r") == ["accepted", "cancelled"]
    assert not await redis.exists(f"{prefix}:line:api:{MODEL}:bob")
    assert await redis.zrange(f"{prefix}:ring:api:{MODEL}", 0, -1) == [b"ann"] * (num_before > 0)
    assert (await broker.depths([MODEL]))[MODEL]["queued"] == num_before
    assert await run_all(broker) == [f"b{i}" for i in range(num_before)]
    assert [kind for request_id, kind in await replies(broker) if request_id == "r"] == ["cancelled"]
    await assert_nothing_left(broker, redis, prefix)


async def test_cancel_while_running_tells_the_worker(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("r"))
    await receive_now(broker)
    assert await broker.cancel("r") == "running"
    after, [abort] = await broker.read_aborts("worker", "0")
    assert (abort.request_id, abort.reason) == ("r", "cancelled")
    assert await broker.read_aborts("worker", after, block_ms=0) == (after, [])
    assert await broker.finish("worker", Cancelled("r"))
    assert await broker.cancel("r") == "cancelled"
    assert await event_types(broker, "r") == ["accepted", "started", "cancelled"]


async def test_cancel_after_the_end_changes_nothing(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("r"))
    await run_all(broker)
    assert await broker.cancel("r") == "completed"
    assert (await broker.status("r")).state == "completed"


async def test_unknown_requests(broker: RedisBroker) -> None:
    for call in (broker.cancel("nobody"), broker.status("nobody"), broker.attach("nobody", "gateway")):
        with pytest.raises(RequestNotFound):
            await call
    assert not await broker.finish("worker", completed("nobody"))
    assert not await broker.publish("worker", preview("nobody"))


async def test_work_past_its_deadline_never_runs(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    """Wherever it stands: first in the ready stream, or far back in the line."""
    await submit_all(broker, api_job("ready", deadline_ms=20))
    await submit_all(broker, *(api_job(f"r{i}") for i in range(6)), api_job("line", deadline_ms=20))
    await submit_all(broker, api_job("in time", deadline_ms=60_000))
    await asyncio.sleep(0.03)
    assert await run_all(broker) == [f"r{i}" for i in range(6)] + ["in time"]
    for request_id in ("ready", "line"):
        assert (await broker.status(request_id)).log[-1].event == Expired(request_id)
    await assert_nothing_left(broker, redis, prefix)


async def test_expired_work_frees_its_place_without_a_worker(broker: RedisBroker) -> None:
    limits = Limits(max_depth=1)
    await broker.submit(api_job("r", deadline_ms=10), limits)
    await asyncio.sleep(0.02)
    await broker.submit(api_job("next"), limits)
    assert (await broker.status("r")).state == "expired"


async def test_a_failure_reaches_the_caller(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("r"))
    await receive_now(broker)
    failed = Failed("r", JobError("out_of_memory", "too big", is_retryable=True))
    assert await broker.finish("worker", failed)
    assert (await broker.status("r")).log[-1].event == failed


async def test_a_second_finish_changes_nothing(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("r"))
    await receive_now(broker)
    assert await broker.finish("worker", completed("r", b"first"))
    assert await broker.finish("worker", completed("r", b"second"))  # asked again: it was ours, and it is done
    assert not await broker.finish("worker", Cancelled("r"))
    assert not await broker.finish("somebody else", completed("r"))
    assert [kind for _, kind in await replies(broker)] == ["completed"]
    [*_, last] = (await broker.status("r")).log
    assert last.event == completed("r", b"first")


async def test_only_the_newest_preview_is_kept(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("r"))
    await receive_now(broker)
    for step in (1, 2, 2, 3):
        assert await broker.publish("worker", preview("r", step, data=b"%d" % step))
    assert not await broker.publish("somebody else", preview("r", 4))
    log = (await broker.status("r")).log
    assert [(logged.seq, logged.event.type) for logged in log] == [(1, "accepted"), (2, "started"), (5, "preview")]
    assert isinstance(log[-1].event, Preview)
    assert log[-1].event.picture.data == b"3"
    assert [kind for _, kind in await replies(broker)] == ["preview"] * 3  # one per step, the repeated call not


async def test_a_second_gateway_gets_the_log_and_then_the_events(
    broker: RedisBroker, other_broker: RedisBroker
) -> None:
    await submit_all(broker, api_job("r"))
    await receive_now(broker)
    await broker.publish("worker", preview("r"))
    log = await other_broker.attach("r", "second")
    assert [logged.event.type for logged in log] == ["accepted", "started", "preview"]
    assert await other_broker.attach("r", "second") == log  # attached twice is attached once
    await broker.finish("worker", completed("r"))
    _, events = await other_broker.read_replies("second", "0")
    assert events == [LoggedEvent(4, completed("r"))]
    assert [kind for _, kind in await replies(broker)][-1] == "completed"
    assert (await other_broker.attach("r", "third"))[-1] == LoggedEvent(4, completed("r"))


async def test_only_who_attached_hears_of_mere_progress(broker: RedisBroker) -> None:
    """A gateway that waits for a picture isn't woken for less."""
    await submit_all(broker, api_job("r"))
    assert [logged.event.type for logged in await broker.attach("r", "follower")] == ["accepted"]
    await receive_now(broker)
    await broker.finish("worker", completed("r"))
    assert await replies(broker, "follower") == [("r", "started"), ("r", "completed")]
    assert await replies(broker, "gateway") == [("r", "completed")]


async def test_a_gateway_that_waits_may_attach_too(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("r"))
    await broker.attach("r", "gateway")
    await run_all(broker)
    assert await replies(broker, "gateway") == [("r", "started"), ("r", "completed")]


async def test_keep_0_keeps_states_without_pictures(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, api_job("r", keep_s=0))
    await receive_now(broker)
    await broker.publish("worker", preview("r"))
    await broker.finish("worker", completed("r"))
    log = (await broker.status("r")).log
    assert [logged.event.type for logged in log] == ["accepted", "started", "completed"]
    assert isinstance(log[-1].event, Completed)
    assert log[-1].event.pictures[0].data == b""
    assert 50_000 < await redis.pttl(f"{prefix}:events:r") <= 60_000
    _, events = await broker.read_replies("gateway", "0")
    assert [logged.event for logged in events] == [preview("r"), completed("r")]


async def test_results_are_kept_for_their_time_and_within_the_budget(
    broker: RedisBroker, redis: Redis, prefix: str
) -> None:
    limits = Limits(max_result_bytes=150_000)
    for request_id in ("a", "b"):
        await broker.submit(api_job(request_id, keep_s=0.4), limits)
        await receive_now(broker)
        await broker.finish("worker", completed(request_id, b"x" * 80_000))
    with pytest.raises(ResultStoreFull, match="150000 are allowed"):
        await broker.submit(api_job("c"), limits)
    await broker.submit(live_job("live"), limits)  # keeps nothing, so the budget doesn't concern it
    await asyncio.sleep(0.45)
    await broker.submit(api_job("c"), limits)
    with pytest.raises(RequestNotFound):
        await broker.status("a")
    assert await redis.get(f"{prefix}:kept_bytes") is None


async def test_replies_to_a_dead_gateway_expire(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, api_job("r", gateway_id="dead"))
    await broker.drop_gateway("dead")
    await run_all(broker)
    assert 0 < await redis.pttl(f"{prefix}:replies:dead") <= 60_000
    await broker.keep_gateway("dead", ttl_s=90)
    assert await redis.pttl(f"{prefix}:replies:dead") > 60_000


async def test_read_replies_are_deleted(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    after = "0"
    for i in range(30):
        await submit_all(broker, api_job(f"r{i}"))
        await run_all(broker)
        after, events = await broker.read_replies("gateway", after)
        assert len(events) == 1
    await broker.read_replies("gateway", after, block_ms=0)
    assert await redis.xlen(f"{prefix}:replies:gateway") <= 100  # whole nodes are cut off, not single entries
    assert isinstance(events[-1].event, Completed)


async def test_a_request_nobody_waits_for(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, api_job("r", gateway_id=None))
    await run_all(broker)
    assert [key async for key in redis.scan_iter(match=f"{prefix}:replies:*")] == []
    assert await event_types(broker, "r") == ["accepted", "started", "completed"]


async def test_reading_waits_for_what_comes(broker: RedisBroker, other_broker: RedisBroker) -> None:
    waiting = asyncio.create_task(other_broker.receive("worker", MODEL, 4, block_ms=5000))
    listening = asyncio.create_task(broker.read_replies("gateway", "0", block_ms=5000))
    await asyncio.sleep(0.05)
    await submit_all(broker, api_job("r"))
    assert ids(await asyncio.wait_for(waiting, 2)) == ["r"]
    await other_broker.finish("worker", completed("r"))
    _, events = await asyncio.wait_for(listening, 2)
    assert events == [LoggedEvent(3, completed("r"))]


async def test_nothing_is_received_without_a_free_slot(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("r"))
    assert await broker.receive("worker", MODEL, 0) == []
