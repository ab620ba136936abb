"""Sessions: the newest prompt wins, and nobody starves."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from broker.errors import QueueFull
from broker.messages import Abort, Cancelled, Completed, Expired, Failed, LoggedEvent, Superseded
from broker.redis_broker import RedisBroker
from broker.terms import Limits
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


async def last_event(broker: RedisBroker, request_id: str) -> object:
    return (await broker.status(request_id)).log[-1].event


@pytest.mark.parametrize("num_before", [0, 6], ids=["in ready", "in line"])
async def test_a_newer_prompt_takes_over_the_waiting_place(
    broker: RedisBroker, redis: Redis, prefix: str, num_before: int
) -> None:
    before = [live_job(f"b{i}", session=f"s{i}") for i in range(num_before)]
    await submit_all(broker, *before, live_job("old"))
    await submit_all(broker, live_job("later", session="other session"))
    await submit_all(broker, live_job("new"))
    assert await last_event(broker, "old") == Superseded("old", by="new")
    assert (await broker.depths([MODEL]))[MODEL]["queued"] == num_before + 2
    order = await run_all(broker)
    assert order[-2:] == ["new", "later"]
    assert ("old", "superseded") in await replies(broker)
    await assert_nothing_left(broker, redis, prefix)


async def test_long_typing_holds_one_place_only(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, *(live_job(f"r{i}") for i in range(40)))
    assert await redis.xlen(f"{prefix}:ready:{MODEL}") == 1
    assert (await broker.depths([MODEL]))[MODEL] == {"queued": 1, "running": 0}
    assert ids(await receive_now(broker, count=10)) == ["r39"]
    await submit_all(broker, *(live_job(f"r{i}") for i in range(40, 80)))
    assert await redis.xlen(f"{prefix}:ready:{MODEL}") == 1  # the running one
    assert (await broker.depths([MODEL]))[MODEL] == {"queued": 1, "running": 1}
    assert await receive_now(broker, count=10) == []  # parked behind the running one
    await broker.finish("worker", completed("r39"))
    assert ids(await receive_now(broker, count=10)) == ["r79"]
    await broker.finish("worker", completed("r79"))
    assert await redis.pttl(f"{prefix}:session:session") > 0
    await submit_all(broker, live_job("after a pause"))
    assert await redis.pttl(f"{prefix}:session:session") == -1
    await run_all(broker)
    await assert_nothing_left(broker, redis, prefix)


async def test_a_running_one_is_told_of_the_newer_prompt(broker: RedisBroker) -> None:
    await submit_all(broker, live_job("a"))
    await receive_now(broker)
    await submit_all(broker, live_job("b"))
    after, aborts = await broker.read_aborts("worker", "0")
    assert aborts == [Abort("a", "newer", None)]
    await broker.finish("worker", completed("a"))
    await receive_now(broker)
    await asyncio.sleep(0.02)
    await submit_all(broker, live_job("c"))
    _, [abort] = await broker.read_aborts("worker", after)
    assert (abort.request_id, abort.reason) == ("b", "newer")
    assert abort.ms_since_final is not None
    assert 20 <= abort.ms_since_final < 5000


async def test_a_stopped_one_ends_superseded_by_the_newest(broker: RedisBroker) -> None:
    await submit_all(broker, live_job("a"))
    await receive_now(broker)
    await submit_all(broker, live_job("b"), live_job("c"))
    assert await broker.finish("worker", Superseded("a"))
    assert await last_event(broker, "a") == Superseded("a", by="c")
    assert await last_event(broker, "b") == Superseded("b", by="c")
    assert await run_all(broker) == ["c"]


async def test_sessions_of_one_owner_take_turns(broker: RedisBroker) -> None:
    """Someone who never stops typing has a newer prompt parked at every ending; the others' come first then."""
    await submit_all(broker, *(live_job(f"{session}0", session=session) for session in "abcdefgh"))
    order = []
    for i in range(1, 17):
        [request_id] = ids(await receive_now(broker))
        order.append(request_id[0])
        await submit_all(broker, live_job(f"{request_id[0]}{i}", session=request_id[0]))
        await broker.finish("worker", completed(request_id))
    assert "".join(order) == "abcdefgh" * 2


async def test_pictures_of_sessions_travel_on_the_reply_stream_only(broker: RedisBroker) -> None:
    await submit_all(broker, live_job("r", keep_s=60))
    await receive_now(broker)
    await broker.publish("worker", preview("r"))
    await broker.finish("worker", completed("r"))
    _, events = await broker.read_replies("gateway", "0")
    assert [logged.event for logged in events] == [preview("r"), completed("r")]
    log = (await broker.status("r")).log
    assert [logged.event.type for logged in log] == ["accepted", "started", "completed"]
    assert isinstance(log[-1].event, Completed)
    assert log[-1].event.pictures[0].data == b""


async def test_superseding_needs_no_room(broker: RedisBroker) -> None:
    limits = Limits(max_depth=1)
    await broker.submit(live_job("a"), limits)
    assert (await broker.submit(live_job("b"), limits)).depth == 1
    with pytest.raises(QueueFull):
        await broker.submit(live_job("c", session="other"), limits)
    assert await last_event(broker, "b") != Superseded("b")  # who is refused supersedes nobody
    await receive_now(broker)
    with pytest.raises(QueueFull):
        await broker.submit(live_job("d"), limits)


@pytest.mark.parametrize("num_before", [0, 6], ids=["in ready", "in line"])
async def test_a_session_that_changes_its_model_changes_its_place(
    broker: RedisBroker, redis: Redis, prefix: str, num_before: int
) -> None:
    """Entries of two streams may have the same id, if they were written in the same millisecond."""
    for model in (MODEL, "other"):
        await submit_all(broker, *(api_job(f"{model}{i}", model=model) for i in range(num_before)))
    await submit_all(broker, live_job("a"), live_job("b", model="other"), live_job("c"), live_job("d", model="other"))
    assert [await event_types(broker, request_id) for request_id in "abc"] == [["accepted", "superseded"]] * 3
    assert not await redis.exists(f"{prefix}:line:live:{MODEL}:ann")
    assert "c" not in await run_all(broker)
    received = [request_id for _ in range(8) for request_id in ids(await broker.receive("w", "other", 1, block_ms=0))]
    assert received.count("d") == 1
    for request_id in received:
        await broker.finish("w", completed(request_id))
    await submit_all(broker, live_job("e"))
    assert await run_all(broker) == ["e"]
    await assert_nothing_left(broker, redis, prefix)


@pytest.mark.parametrize("num_before", [0, 6], ids=["in ready", "in line"])
async def test_cancel_while_waiting(broker: RedisBroker, redis: Redis, prefix: str, num_before: int) -> None:
    before = [live_job(f"b{i}", session=f"s{i}") for i in range(num_before)]
    await submit_all(broker, *before, live_job("r"))
    assert await broker.cancel("r") == "cancelled"
    await submit_all(broker, live_job("next"))  # the session goes on
    assert (await run_all(broker))[-1] == "next"
    assert await event_types(broker, "r") == ["accepted", "cancelled"]
    await assert_nothing_left(broker, redis, prefix)


async def test_cancel_of_a_parked_one(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, live_job("running"))
    await receive_now(broker)
    await submit_all(broker, live_job("parked"))
    assert await broker.cancel("parked") == "cancelled"
    await broker.finish("worker", completed("running"))
    assert await run_all(broker) == []
    await assert_nothing_left(broker, redis, prefix)


async def test_a_closed_socket_cancels_both(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, live_job("running"))
    await receive_now(broker)
    await submit_all(broker, live_job("waiting"), api_job("unrelated"))
    await broker.cancel_session("session")
    await broker.cancel_session("never seen")
    assert (await broker.status("waiting")).state == "cancelled"
    _, aborts = await broker.read_aborts("worker", "0")
    assert aborts[-1] == Abort("running", "cancelled", None)
    assert await broker.finish("worker", Cancelled("running"))
    assert await run_all(broker) == ["unrelated"]
    await assert_nothing_left(broker, redis, prefix)


async def test_an_expired_one_makes_way(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, live_job("r", deadline_ms=10))
    await asyncio.sleep(0.02)
    assert await receive_now(broker) == []
    assert await last_event(broker, "r") == Expired("r")
    await submit_all(broker, live_job("next"))
    assert await run_all(broker) == ["next"]
    await assert_nothing_left(broker, redis, prefix)


async def test_a_lost_worker_fails_live_work_and_frees_the_session(
    broker: RedisBroker, redis: Redis, prefix: str
) -> None:
    await submit_all(broker, live_job("r"))
    await receive_now(broker, "dead")
    await submit_all(broker, live_job("parked"))
    await asyncio.sleep(0.03)
    assert await broker.reclaim("worker", MODEL, 0.02, 4) == []
    failed = await last_event(broker, "r")
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.is_retryable) == ("worker_lost", True)
    assert not await broker.finish("dead", completed("r"))
    assert await run_all(broker) == ["parked"]
    await assert_nothing_left(broker, redis, prefix)


async def test_handed_back_live_work_yields_to_a_newer_prompt(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, live_job("a", session="1"), live_job("b", session="2"))
    await receive_now(broker, "draining", count=2)
    await submit_all(broker, live_job("newer", session="2"))
    await broker.hand_back("draining", ["a", "b"])
    assert await last_event(broker, "b") == Superseded("b", by="newer")
    assert sorted(await run_all(broker)) == ["a", "newer"]
    await assert_nothing_left(broker, redis, prefix)


async def test_a_sessions_events_come_in_order(broker: RedisBroker) -> None:
    await submit_all(broker, live_job("a"), live_job("b"))
    await run_all(broker)
    assert await broker.submit(live_job("b"), NO_LIMITS) is not None  # a repeated submit starts nothing again
    assert await receive_now(broker) == []
    _, events = await broker.read_replies("gateway", "0")
    assert [(logged.seq, logged.event.request_id, logged.event.type) for logged in events] == [
        (2, "a", "superseded"),
        (3, "b", "completed"),
    ]
    assert all(isinstance(logged, LoggedEvent) for logged in events)
