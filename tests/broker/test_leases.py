"""Workers that die, pause, hang or leave."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from broker.messages import Abort, Failed, WorkerInfo
from broker.redis_broker import RedisBroker
from broker.renewal import LeaseRenewer
from broker.terms import Forecast, Terms
from tests.broker.helpers import (
    MODEL,
    NO_LIMITS,
    api_job,
    assert_nothing_left,
    completed,
    event_types,
    ids,
    preview,
    receive_now,
    replies,
    run_all,
    submit_all,
)
from tests.jobs import make_warm

LEASE_S = 0.03


async def reclaim_late(broker: RedisBroker, worker_id: str) -> list[tuple[str, int, bool]]:
    """What a worker takes over after the others have been silent for a lease."""
    await asyncio.sleep(LEASE_S * 1.5)
    deliveries = await broker.reclaim(worker_id, MODEL, LEASE_S, 8)
    return [(delivery.job.request_id, delivery.attempt, delivery.is_last_attempt) for delivery in deliveries]


async def test_lost_work_goes_to_another_worker(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, api_job("r"))
    await receive_now(broker, "first")
    assert await broker.reclaim("second", MODEL, 10, 8) == []  # not yet
    assert await reclaim_late(broker, "second") == [("r", 2, False)]
    assert await broker.read_aborts("first", "0", block_ms=0) != ("0", [])
    assert await event_types(broker, "r") == ["accepted", "started", "started"]
    assert await broker.finish("second", completed("r"))
    await assert_nothing_left(broker, redis, prefix)


async def test_a_zombie_changes_nothing(
    broker: RedisBroker, other_broker: RedisBroker, redis_url: str, prefix: str
) -> None:
    await submit_all(broker, api_job("r"))
    await receive_now(broker, "zombie")
    await reclaim_late(other_broker, "owner")

    heard: list[Abort] = []
    renewer = LeaseRenewer(redis_url, prefix, "zombie", LEASE_S, lambda: ["r"], heard.append)
    renewer.renew_once()  # must not steal the entry back
    renewer.stop()
    assert heard == [Abort("r", "lost")]
    assert not await broker.publish("zombie", preview("r"))
    assert not await broker.finish("zombie", completed("r", b"the zombie's"))
    await broker.hand_back("zombie", ["r"])
    _, aborts = await broker.read_aborts("zombie", "0")
    assert aborts == [Abort("r", "lost")]

    assert await other_broker.finish("owner", completed("r", b"the owner's"))
    assert (await broker.status("r")).log[-1].event == completed("r", b"the owner's")
    assert [kind for _, kind in await replies(broker)].count("completed") == 1


async def test_a_third_lost_worker_is_the_last(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await submit_all(broker, api_job("poison"))
    await receive_now(broker, "first")
    assert await reclaim_late(broker, "second") == [("poison", 2, False)]
    assert await reclaim_late(broker, "third") == [("poison", 3, True)]
    assert await reclaim_late(broker, "fourth") == []
    failed = (await broker.status("poison")).log[-1].event
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.is_retryable) == ("attempts_exhausted", False)
    entries: Any = await redis.xrange(f"{prefix}:dead")
    [(_, dead)] = entries
    assert dead[b"request_id"] == b"poison"
    await assert_nothing_left(broker, redis, prefix)


async def test_an_attempt_counts_only_when_the_owner_changes(broker: RedisBroker, redis_url: str, prefix: str) -> None:
    """Reading the own pending list raises Redis' delivery count, so that one isn't used."""
    await submit_all(broker, api_job("r"))
    await receive_now(broker)
    for _ in range(5):
        async with RedisBroker(redis_url, prefix=prefix) as again:
            [delivery] = await receive_now(again)
            assert (delivery.job.request_id, delivery.attempt) == ("r", 1)
    assert await event_types(broker, "r") == ["accepted", "started"]


async def test_handed_back_work_comes_first_and_its_attempt_doesnt_count(broker: RedisBroker) -> None:
    await submit_all(broker, *(api_job(f"r{i}") for i in range(8)))
    received = ids(await receive_now(broker, "draining", count=2))
    await broker.hand_back("draining", received)
    await broker.hand_back("draining", received)
    assert await broker.depths([MODEL]) == {MODEL: {"queued": 8, "running": 0}}
    assert (await broker.status("r0")).state == "queued"
    assert not await broker.finish("draining", completed("r0"))
    first = [delivery for _ in range(8) for delivery in await receive_now(broker)]
    assert {delivery.attempt for delivery in first} == {1}
    # Behind the few that the ready stream already held, before those in the line.
    assert ids(first) == ["r2", "r3", "r4", "r5", "r0", "r1", "r6", "r7"]


async def test_a_cancelled_request_ends_when_its_worker_is_dead_or_leaves(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("a"), api_job("b"))
    await receive_now(broker, "dead")
    await receive_now(broker, "leaving")
    for request_id in "ab":
        assert await broker.cancel(request_id) == "running"
    await broker.hand_back("leaving", ["b"])
    assert await reclaim_late(broker, "worker") == []
    for request_id in "ab":
        assert await event_types(broker, request_id) == ["accepted", "started", "cancelled"]


async def test_lost_work_past_its_deadline_isnt_tried_again(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("r", deadline_ms=20))
    await receive_now(broker, "dead")
    assert await reclaim_late(broker, "worker") == []
    assert (await broker.status("r")).state == "expired"


async def test_entries_read_but_never_taken_are_reclaimed(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    """The worker died between its read and the take that follows it."""
    await submit_all(broker, api_job("r"))
    await redis.xreadgroup("workers", "dead", {f"{prefix}:ready:{MODEL}": ">"})
    assert await reclaim_late(broker, "worker") == [("r", 1, False)]
    assert await broker.finish("worker", completed("r"))


async def test_a_worker_doesnt_reclaim_what_it_holds(broker: RedisBroker) -> None:
    await submit_all(broker, api_job("r"))
    await receive_now(broker, "slow")
    assert await reclaim_late(broker, "slow") == []
    assert await broker.finish("slow", completed("r"))


async def test_a_worker_reclaims_its_own_that_it_never_heard_of(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    await receive_now(broker)
    await submit_all(broker, api_job("r"))
    await redis.xreadgroup("workers", "worker", {f"{prefix}:ready:{MODEL}": ">"})
    assert await receive_now(broker) == []
    assert await reclaim_late(broker, "worker") == [("r", 1, False)]


async def test_renewal_keeps_the_lease_as_long_as_there_is_progress(
    broker: RedisBroker, redis_url: str, prefix: str
) -> None:
    lease_s = 0.3
    await submit_all(broker, api_job("r"))
    await receive_now(broker, "owner")
    running = ["r"]
    heard: list[Abort] = []
    renewer = LeaseRenewer(redis_url, prefix, "owner", lease_s, lambda: tuple(running), heard.append)
    renewer.start()
    for _ in range(8):
        await asyncio.sleep(0.1)
        assert await broker.reclaim("other", MODEL, lease_s, 8) == []
    await broker.cancel("r")
    await asyncio.sleep(0.15)
    assert heard[-1] == Abort("r", "cancelled")
    running.clear()  # the engine hangs
    await asyncio.sleep(0.35)
    await broker.reclaim("other", MODEL, lease_s, 8)
    assert (await broker.status("r")).state == "cancelled"
    renewer.stop()


async def test_consumers_go_only_without_pending_entries(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    ready = f"{prefix}:ready:{MODEL}"
    await submit_all(broker, api_job("r"))
    await receive_now(broker, "busy")
    await receive_now(broker, "idle")
    await broker.unregister("busy")
    await broker.unregister("idle")
    assert [info["name"] for info in await redis.xinfo_consumers(ready, "workers")] == [b"busy"]
    assert await reclaim_late(broker, "worker") == [("r", 2, False)]
    await asyncio.sleep(10 * LEASE_S)
    await broker.reclaim("worker", MODEL, LEASE_S, 8)
    assert [info["name"] for info in await redis.xinfo_consumers(ready, "workers")] == [b"worker"]


async def test_workers_are_listed_as_long_as_their_hearts_beat(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    warm = make_warm(MODEL)
    short = WorkerInfo("short", "starting", "cpu", "float32")
    long = WorkerInfo("long", "ready", "cuda:0", "float16", (warm,), num_running=3, detail="H200")
    await broker.register(short, ttl_s=0.1)
    await broker.register(long, ttl_s=5)
    assert await broker.workers() == [short, long]
    await asyncio.sleep(0.12)
    assert await broker.workers() == [long]
    await broker.register(long, ttl_s=5)
    assert 0 < await redis.pttl(f"{prefix}:workers") <= 6000
    await broker.unregister("long")
    assert await broker.workers() == []


# Real processes

WORKER = """
import asyncio, sys
from broker.redis_broker import RedisBroker
from broker.renewal import LeaseRenewer
from broker.terms import Forecast, Terms
from tests.broker.helpers import MODEL, completed

async def main(url, prefix, worker_id, lease_s, work_s):
    held = []
    renewer = LeaseRenewer(url, prefix, worker_id, lease_s, lambda: tuple(held))
    renewer.start()
    async with RedisBroker(url, prefix=prefix) as broker:
        [delivery] = await broker.receive(worker_id, MODEL, 1, block_ms=5000)
        held.append(delivery.job.request_id)
        print("received", flush=True)
        await asyncio.sleep(work_s)
        print(await broker.finish(worker_id, completed(delivery.job.request_id, b"late")), flush=True)
    renewer.stop()

url, prefix, worker_id, lease_s, work_s = sys.argv[1:]
asyncio.run(main(url, prefix, worker_id, float(lease_s), float(work_s)))
"""


class WorkerProcess:
    """A worker that receives one request and finishes it after a while."""

    def __init__(self, url: str, prefix: str, worker_id: str, lease_s: float, work_s: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, url, prefix, worker_id, str(lease_s), str(work_s)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    async def next_line(self) -> str:
        assert self._process.stdout is not None
        return (await asyncio.to_thread(self._process.stdout.readline)).strip()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def worker_process(redis_url: str, prefix: str) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(redis_url, prefix, "process", lease_s=0.4, work_s=1.0)
    yield worker
    worker.end()


async def reclaim_until_there(broker: RedisBroker, lease_s: float) -> tuple[int, float]:
    """(attempt, seconds until it came)."""
    start = time.monotonic()
    while time.monotonic() < start + 10:
        if deliveries := await broker.reclaim("survivor", MODEL, lease_s, 4):
            return deliveries[0].attempt, time.monotonic() - start
        await asyncio.sleep(0.05)
    raise AssertionError("never reclaimed")


async def test_work_of_a_killed_worker_is_finished_by_another(
    broker: RedisBroker, redis: Redis, prefix: str, worker_process: WorkerProcess
) -> None:
    await submit_all(broker, api_job("r"))
    assert await worker_process.next_line() == "received"
    worker_process.signal(signal.SIGKILL)
    attempt, seconds = await reclaim_until_there(broker, 0.4)
    assert attempt == 2
    assert seconds < 5
    assert await broker.finish("survivor", completed("r"))
    assert await event_types(broker, "r") == ["accepted", "started", "started", "completed"]
    await assert_nothing_left(broker, redis, prefix)


async def test_a_paused_worker_neither_finishes_nor_steals_back(
    broker: RedisBroker, worker_process: WorkerProcess
) -> None:
    await submit_all(broker, api_job("r"))
    assert await worker_process.next_line() == "received"
    worker_process.signal(signal.SIGSTOP)
    await reclaim_until_there(broker, 0.4)
    worker_process.signal(signal.SIGCONT)
    assert await worker_process.next_line() == "False"  # its finish; it went on renewing until then
    assert (await broker.status("r")).state == "running"
    assert await broker.finish("survivor", completed("r", b"the survivor's"))
    assert (await broker.status("r")).log[-1].event == completed("r", b"the survivor's")
    assert await run_all(broker) == []


async def test_a_worker_of_another_version_is_left_out(broker: RedisBroker) -> None:
    known = WorkerInfo("known", "ready", "cpu", "float32", (make_warm(MODEL),))
    await broker.register(known, ttl_s=5)
    await broker._scripts.register("strange", b'{"worker_id": "strange", "warm_models": [{"step_ms": {}}]}', 5)
    assert await broker.workers() == [known]


async def test_what_is_handed_back_was_not_charged(broker: RedisBroker) -> None:
    """A restart of a worker doesn't send its costly requests to the end of the fair order."""
    await submit_all(broker, *(api_job(f"x{i}", owner="x") for i in range(4)))  # fill the ready stream
    costly, cheap = (Terms(forecast=Forecast(work_ms=cost)) for cost in (1000, 100))
    for i in range(2):
        await broker.submit(api_job(f"ann-{i}", owner="ann"), NO_LIMITS, costly)
    for i in range(40):
        await broker.submit(api_job(f"bob-{i}", owner="bob"), NO_LIMITS, cheap)
    while "ann-0" not in (taken := ids(await receive_now(broker, "leaves"))):
        for request_id in taken:
            await broker.finish("leaves", completed(request_id))
    await broker.hand_back("leaves", ["ann-0"])
    order = await run_all(broker)
    assert order.index("ann-0") <= 6  # what was ready, and it


async def test_work_past_its_deadline_is_not_handed_back(broker: RedisBroker) -> None:
    await broker.submit(api_job("r", deadline_ms=60), NO_LIMITS, Terms(forecast=Forecast(num_slots=9)))
    assert ids(await receive_now(broker, "leaves")) == ["r"]
    await asyncio.sleep(0.08)
    await submit_all(broker, api_job("other", model="other"))  # every submit looks for expired work
    await broker.hand_back("leaves", ["r"])
    assert (await broker.status("r")).state == "expired"
    assert (await broker.depths([MODEL]))[MODEL] == {"queued": 0, "running": 0}
