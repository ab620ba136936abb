"""Deadlines are kept or refused: admission by the predicted wait."""

from __future__ import annotations

import asyncio
import itertools
import math

import pytest

from broker.errors import QueueFull, TooLate
from broker.redis_broker import RedisBroker
from broker.terms import Forecast, Limits, Terms
from tests.broker.helpers import NO_LIMITS, api_job, completed, live_job, receive_now

# One request takes 10 ms of the workers; it runs for 100 ms alone and for 300 ms in a batch of ten.
FORECAST = Forecast(work_ms=10, alone_ms=100, full_ms=300, num_slots=10)
TERMS = Terms(forecast=FORECAST)
SAFETY = 1.15


async def fill(broker: RedisBroker, num_running: int, num_queued: int, terms: Terms = TERMS) -> None:
    for _ in range(num_running + num_queued):
        await broker.submit(api_job(owner="other"), NO_LIMITS, terms)
    while num_running:
        num_running -= len(await receive_now(broker, "filler", num_running))


async def test_an_empty_service_starts_at_once(broker: RedisBroker) -> None:
    submitted = await broker.submit(api_job(deadline_ms=140), NO_LIMITS, TERMS)
    assert (submitted.position, submitted.start_ms) == (0, 0)


async def test_a_deadline_below_the_time_to_draw_is_refused(broker: RedisBroker) -> None:
    with pytest.raises(TooLate) as caught:
        await broker.submit(api_job(deadline_ms=110), NO_LIMITS, TERMS)
    assert (caught.value.finish_ms, caught.value.deadline_ms) == (138, 110)  # one of ten slots: a tenth of the way
    assert await broker.depths(["small"]) == {"small": {"queued": 0, "running": 0}}


async def test_what_waits_delays_the_start(broker: RedisBroker) -> None:
    await fill(broker, num_running=10, num_queued=20)
    with pytest.raises(TooLate) as caught:
        await broker.submit(api_job(owner="other", deadline_ms=500), NO_LIMITS, TERMS)
    assert caught.value.finish_ms == math.ceil((21 * 10 + 300) * SAFETY)
    submitted = await broker.submit(api_job("r", owner="other", deadline_ms=590), NO_LIMITS, TERMS)
    assert (submitted.position, submitted.start_ms) == (20, 210)
    assert (await broker.status("r")).start_ms == 210


async def test_another_callers_first_is_predicted_by_its_turn(broker: RedisBroker) -> None:
    """The queue is long, but not for everybody."""
    await fill(broker, num_running=10, num_queued=500)
    submitted = await broker.submit(api_job(deadline_ms=1000), NO_LIMITS, TERMS)
    assert submitted.start_ms <= 22 * 10  # the ready stream, and one turn


async def test_free_slots_shorten_the_wait(broker: RedisBroker) -> None:
    await fill(broker, num_running=4, num_queued=5)
    assert (await broker.submit(api_job(owner="other"), NO_LIMITS, TERMS)).start_ms == 0
    assert (await broker.submit(api_job(owner="other"), NO_LIMITS, TERMS)).start_ms == 10


async def test_costly_work_ahead_takes_longer(broker: RedisBroker) -> None:
    await fill(broker, num_running=10, num_queued=0)
    costly = Terms(forecast=Forecast(work_ms=90, num_slots=10))
    for i in range(10):
        await broker.submit(api_job(f"costly-{i}", owner="other"), NO_LIMITS, costly)
    assert (await broker.submit(api_job(owner="other"), NO_LIMITS, TERMS)).start_ms == 11 * 90
    for i in range(10):
        await broker.cancel(f"costly-{i}")
    assert (await broker.submit(api_job(owner="other"), NO_LIMITS, TERMS)).start_ms < 90


async def test_who_finds_the_queue_full_comes_back_when_a_part_of_it_is_done(broker: RedisBroker) -> None:
    await fill(broker, 0, 40)
    with pytest.raises(QueueFull) as caught:
        await broker.submit(api_job(), Limits(max_depth=40), TERMS)
    assert caught.value.wait_ms == 40 * 10 / 4


async def test_those_refused_together_come_back_one_after_the_other(broker: RedisBroker) -> None:
    """Each is told when there is room for it, not all for the first."""
    await fill(broker, num_running=10, num_queued=20)
    waits: list[int] = []
    for _ in range(5):
        with pytest.raises(TooLate) as caught:
            await broker.submit(api_job(owner="other", deadline_ms=500), NO_LIMITS, TERMS)
        waits.append(caught.value.wait_ms)
    assert waits[0] == math.ceil((21 * 10 + 300) * SAFETY - 500)
    assert all(6 <= later - earlier <= 10 for earlier, later in itertools.pairwise(waits))


async def test_a_live_prompt_takes_over_a_place_whatever_the_queue_is(broker: RedisBroker) -> None:
    """What the session has waiting stands before it already: a newer prompt isn't a new place."""
    await fill(broker, 10, 50)
    with pytest.raises(TooLate):
        await broker.submit(live_job("refused", deadline_ms=200), NO_LIMITS, TERMS)
    await broker.submit(live_job("waits"), NO_LIMITS, TERMS)
    await broker.submit(live_job("newer", deadline_ms=200), NO_LIMITS, TERMS)
    assert (await broker.status("waits")).state == "superseded"


async def test_workers_slower_than_their_tables_are_seen_to_be(broker: RedisBroker) -> None:
    """The queue moves on by one request every 40 ms at least, and the tables say 10."""
    await fill(broker, num_running=10, num_queued=60)
    before = (await broker.submit(api_job(owner="other"), NO_LIMITS, TERMS)).start_ms
    for _ in range(40):
        await asyncio.sleep(0.04)
        [delivery] = await receive_now(broker, "slow")
        await broker.finish("slow", completed(delivery.job.request_id))
    after = (await broker.submit(api_job(owner="other"), NO_LIMITS, TERMS)).start_ms
    assert before == 61 * 10
    assert after > 22 * 10 * 1.7


async def test_idle_time_says_nothing_of_the_pace(broker: RedisBroker) -> None:
    """A queue that empties without a picture, by people who leave, must not make the workers look slow for ever."""
    await fill(broker, num_running=10, num_queued=0)
    for i in range(5):
        await broker.submit(api_job(f"left-{i}"), NO_LIMITS, TERMS)
    for i in range(5):
        await broker.cancel(f"left-{i}")
    await asyncio.sleep(0.5)
    await broker.submit(api_job("r"), NO_LIMITS, TERMS)
    finished: list[str] = []
    while "r" not in finished:
        for delivery in await receive_now(broker, "next", 10):
            finished.append(delivery.job.request_id)
            await broker.finish("next", completed(delivery.job.request_id))
    submitted = await broker.submit(api_job(owner="other"), NO_LIMITS, TERMS)
    assert submitted.start_ms <= (submitted.position + 1) * 10 * 1.2
