"""Random histories of the queue against a small model in plain Python.

Submit, receive, show, finish, cancel, crash, reclaim and hand back in any order, by workers that may not know that
they lost a request. Whatever happens: the queue and the model agree, every accepted request reaches exactly one
terminal event, and nothing is left when all is done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ResponseError

from broker.connections import connect_for_commands
from broker.messages import TERMINAL_STATES, Cancelled, Delivery
from broker.redis_broker import RedisBroker
from broker.terms import Forecast, Terms
from tests.broker.helpers import (
    MODEL,
    NO_LIMITS,
    api_job,
    assert_nothing_left,
    completed,
    live_job,
    preview,
    receive_now,
)

NUM_WORKERS = 3
MODELS = [MODEL, "other"]
IN_TIME = Terms(forecast=Forecast(num_slots=10**6))  # even a deadline of 0 ms is not refused
slots = st.integers(0, NUM_WORKERS - 1)
models = st.sampled_from(MODELS)


@dataclass
class Request:
    """What the model knows of a request."""

    request_id: str
    session: str | None
    model: str
    state: str = "queued"
    worker_id: str = ""
    attempt: int = 0
    is_flagged: bool = False
    is_overdue: bool = False

    @property
    def can_be_joined(self) -> bool:
        is_under_way = self.state in ("queued", "running") and not self.is_flagged and not self.is_overdue
        return is_under_way or self.state == "completed"


class QueueMachine(RuleBasedStateMachine):
    """Requests, the workers' ids, and what each worker believes that it runs."""

    redis_url: str

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"test-{uuid4().hex}"
        self.loop = asyncio.new_event_loop()
        self.broker = RedisBroker(self.redis_url, prefix=self.prefix)
        self.redis = connect_for_commands(self.redis_url)
        self.requests: dict[str, Request] = {}
        self.newest: dict[str, str] = {}
        self.num_submits = 0
        self.worker_ids: list[str] = []
        self.believed: dict[str, list[str]] = {}

    def run(self, call: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(call)

    def in_state(self, *states: str) -> list[Request]:
        return [request for request in self.requests.values() if request.state in states]

    def of_session(self, session: str | None, state: str) -> list[Request]:
        return [request for request in self.in_state(state) if session is not None and request.session == session]

    def new_worker(self, slot: int) -> None:
        self.worker_ids[slot] = f"worker-{slot}-{uuid4().hex[:6]}"
        self.believed[self.worker_ids[slot]] = []

    @initialize()
    def start_workers(self) -> None:
        self.worker_ids = [""] * NUM_WORKERS
        for slot in range(NUM_WORKERS):
            self.new_worker(slot)

    # What callers do

    @rule(
        model=models,
        owner=st.sampled_from("ab"),
        deadline_ms=st.sampled_from([None, None, None, 0]),
        picture=st.sampled_from([None, None, "apple", "pear"]),
    )
    def submit(self, model: str, owner: str, deadline_ms: int | None, picture: str | None) -> None:
        """Requests for the same picture share one request while that may still be an answer."""
        self.expire_in_model()
        request = Request(f"r{self.num_submits}", None, model, is_overdue=deadline_ms == 0)
        self.num_submits += 1
        cache_key = picture and f"{picture} of {owner} by {model}"
        twin = self.requests.get(self.newest.get(cache_key or "", ""))
        job = api_job(request.request_id, model=model, owner=owner, deadline_ms=deadline_ms)
        submitted = self.run(self.broker.submit(job, NO_LIMITS, replace(IN_TIME, cache_key=cache_key)))
        if twin and twin.can_be_joined:
            assert (submitted.request_id, submitted.origin != "new") == (twin.request_id, True)
            return
        assert (submitted.request_id, submitted.origin) == (request.request_id, "new")
        self.requests[request.request_id] = request
        if cache_key:
            self.newest[cache_key] = request.request_id

    @rule(
        model=models,
        session=st.sampled_from("xyz"),
        owner=st.sampled_from("ab"),
        deadline_ms=st.sampled_from([None, None, 0]),
    )
    def submit_live(self, model: str, session: str, owner: str, deadline_ms: int | None) -> None:
        self.expire_in_model()
        request = Request(f"r{self.num_submits}", session, model, is_overdue=deadline_ms == 0)
        self.num_submits += 1
        for older in self.of_session(session, "queued"):
            older.state = "superseded"
        self.requests[request.request_id] = request
        job = live_job(request.request_id, session=session, model=model, owner=owner, deadline_ms=deadline_ms)
        self.run(self.broker.submit(job, NO_LIMITS, IN_TIME))

    def expire_in_model(self) -> None:
        for request in self.in_state("queued"):
            if request.is_overdue:
                request.state = "expired"

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.requests.values())))
        make = live_job if request.session else api_job
        self.run(self.broker.submit(make(request.request_id), NO_LIMITS))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.requests.values())))
        self.cancel_in_model(request)
        assert self.run(self.broker.cancel(request.request_id)) == request.state

    @rule(session=st.sampled_from("xyz"))
    def close_session(self, session: str) -> None:
        for request in self.of_session(session, "queued") + self.of_session(session, "running"):
            self.cancel_in_model(request)
        self.run(self.broker.cancel_session(session))

    def cancel_in_model(self, request: Request) -> None:
        if request.state == "queued":
            request.state = "cancelled"
        elif request.state == "running":
            request.is_flagged = True

    # What workers do

    @rule(slot=slots, count=st.integers(1, 4), model=models)
    def receive(self, slot: int, count: int, model: str) -> None:
        self.expire_in_model()
        worker_id = self.worker_ids[slot]
        for delivery in self.run(receive_now(self.broker, worker_id, count, model)):
            self.start(delivery, worker_id)

    @rule(slot=slots, count=st.integers(1, 4), model=models)
    def lose_a_read(self, slot: int, count: int, model: str) -> None:
        """Redis delivers, and the worker never hears of it."""
        worker_id = self.worker_ids[slot]
        ready = f"{self.prefix}:ready:{model}"
        with contextlib.suppress(ResponseError):  # nothing was ever submitted: no group
            self.run(self.redis.xreadgroup("workers", worker_id, {ready: ">"}, count=count))
        self.broker._clean.discard((worker_id, model))

    def start(self, delivery: Delivery, worker_id: str) -> None:
        request = self.requests[delivery.job.request_id]
        assert request.state == "queued"
        assert not self.of_session(request.session, "running")
        self.own(request, worker_id)
        assert delivery.attempt == request.attempt

    def own(self, request: Request, worker_id: str) -> None:
        request.state, request.worker_id, request.attempt = "running", worker_id, request.attempt + 1
        self.believed[worker_id].append(request.request_id)

    @rule(data=st.data(), slot=slots, is_stopped=st.booleans())
    def finish(self, data: st.DataObject, slot: int, is_stopped: bool) -> None:
        worker_id = self.worker_ids[slot]
        if not self.believed[worker_id]:
            return
        request = self.requests[data.draw(st.sampled_from(self.believed[worker_id]))]
        state = "cancelled" if is_stopped else "completed"
        event = Cancelled(request.request_id) if is_stopped else completed(request.request_id)
        is_ours = request.worker_id == worker_id and request.state in ("running", state)
        assert self.run(self.broker.finish(worker_id, event)) == is_ours
        if is_ours:
            request.state = state

    @rule(data=st.data(), slot=slots, step=st.integers(1, 4))
    def show(self, data: st.DataObject, slot: int, step: int) -> None:
        worker_id = self.worker_ids[slot]
        if not self.believed[worker_id]:
            return
        request = self.requests[data.draw(st.sampled_from(self.believed[worker_id]))]
        is_ours = request.worker_id == worker_id and request.state == "running"
        assert self.run(self.broker.publish(worker_id, preview(request.request_id, step))) == is_ours

    @rule(slot=slots)
    def hand_back(self, slot: int) -> None:
        worker_id = self.worker_ids[slot]
        believed, self.believed[worker_id] = self.believed[worker_id], []
        self.run(self.broker.hand_back(worker_id, believed))
        for request in (self.requests[request_id] for request_id in believed):
            if request.worker_id != worker_id or request.state != "running":
                continue
            has_newer = bool(self.of_session(request.session, "queued"))
            request.state = "cancelled" if request.is_flagged else "superseded" if has_newer else "queued"
            request.worker_id, request.attempt = "", request.attempt - 1

    @rule(slot=slots)
    def crash(self, slot: int) -> None:
        self.new_worker(slot)

    @rule(slot=slots, model=models)
    def reclaim(self, slot: int, model: str) -> None:
        """With a lease of nothing: every other worker has lost all it runs, and those alive don't know yet."""
        self.expire_in_model()
        worker_id = self.worker_ids[slot]
        deliveries = self.run(self.broker.reclaim(worker_id, model, 0, 1000))
        taken = {delivery.job.request_id: delivery for delivery in deliveries}
        for request in self.in_state("running"):
            if request.worker_id == worker_id or request.model != model:
                continue
            if request.is_flagged:
                request.state = "cancelled"
            elif request.session or request.attempt >= 3:
                request.state = "failed"
            else:
                self.own(request, worker_id)
                delivery = taken.pop(request.request_id)
                assert (delivery.attempt, delivery.is_last_attempt) == (request.attempt, request.attempt == 3)
        for delivery in taken.values():  # read, but never taken
            self.start(delivery, worker_id)

    # What always holds

    @invariant()
    def depth_is_right(self) -> None:
        counts = Counter((request.model, request.state) for request in self.requests.values())
        expected = {model: {state: counts[model, state] for state in ("queued", "running")} for model in MODELS}
        assert self.run(self.broker.depths(MODELS)) == expected

    def teardown(self) -> None:
        try:
            self.run(self.check_the_end())
        finally:
            self.run(self.broker.close())
            self.run(self.redis.aclose())
            self.loop.close()

    async def take_all(self) -> list[Delivery]:
        reclaimed = [await self.broker.reclaim("last", model, 0, 1000) for model in MODELS]
        received = [await receive_now(self.broker, "last", 1000, model) for model in MODELS]
        return [delivery for deliveries in reclaimed + received for delivery in deliveries]

    async def check_the_end(self) -> None:
        self.expire_in_model()
        for request in self.requests.values():
            assert (await self.broker.status(request.request_id)).state == request.state, request
        while any(sum(counts.values()) for counts in (await self.broker.depths(MODELS)).values()):
            for delivery in await self.take_all():
                await self.broker.finish("last", completed(delivery.job.request_id))
        for _ in range(2):  # what is left stands for nothing: read by nobody yet, or by a worker that is gone
            assert await self.take_all() == []
        if not self.requests:
            return
        _, events = await self.broker.read_replies("gateway", "0", block_ms=0)
        replied = Counter(logged.event.request_id for logged in events if logged.event.type in TERMINAL_STATES)
        for request_id in self.requests:
            status = await self.broker.status(request_id)
            endings = [logged.event.type for logged in status.log if logged.event.type in TERMINAL_STATES]
            assert endings == [status.state]
            assert status.log[-1].event.type == status.state
            assert replied[request_id] == 1 or len(events) >= 256
        await assert_nothing_left(self.broker, self.redis, self.prefix)


def test_random_histories(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueueMachine, "redis_url", redis_url, raising=False)
    bounds = settings(max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(QueueMachine, settings=bounds)
