"""Who gets what share, simulated on the real scripts: workers that take one batch after another from a busy queue."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from broker.redis_broker import RedisBroker
from broker.terms import Forecast, Terms
from tests.broker.helpers import NO_LIMITS, api_job, completed, live_job, receive_now

BATCH = 4


@dataclass(frozen=True, slots=True)
class Owner:
    """A caller that always has `backlog` requests waiting, each costing `cost_ms` of the workers."""

    name: str
    weight: int = 1
    cost_ms: float = 1.0
    backlog: int = 30


class Simulation:
    """Counts the milliseconds of work that each owner was served."""

    def __init__(self, broker: RedisBroker) -> None:
        self.broker = broker
        self.served: Counter[str] = Counter()
        self.order: list[str] = []
        self._waiting: Counter[str] = Counter()
        self._costs: dict[str, float] = {}
        self._num_submitted = 0

    async def offer(self, owner: Owner) -> None:
        while self._waiting[owner.name] < owner.backlog:
            self._num_submitted += 1
            request_id = f"{owner.name}-{self._num_submitted}"
            self._costs[request_id] = owner.cost_ms
            self._waiting[owner.name] += 1
            terms = Terms(weight=owner.weight, forecast=Forecast(work_ms=owner.cost_ms))
            await self.broker.submit(api_job(request_id, owner=owner.name), NO_LIMITS, terms)

    async def serve(self) -> None:
        for delivery in await receive_now(self.broker, count=BATCH):
            owner, request_id = delivery.job.owner, delivery.job.request_id
            self.order.append(owner)
            self._waiting[owner] -= 1
            self.served[owner] += self._costs[request_id]  # type: ignore[assignment]
            await self.broker.finish("worker", completed(request_id))

    def share(self, name: str) -> float:
        return self.served[name] / self.served.total()


async def simulate(broker: RedisBroker, owners: list[Owner], num_batches: int = 60) -> Simulation:
    simulation = Simulation(broker)
    for _ in range(num_batches):
        for owner in owners:
            await simulation.offer(owner)
        await simulation.serve()
    return simulation


async def test_equal_callers_get_equal_shares(broker: RedisBroker) -> None:
    simulation = await simulate(broker, [Owner("a", backlog=200), Owner("b", backlog=20), Owner("c", backlog=20)])
    for name in "abc":
        assert simulation.share(name) == pytest.approx(1 / 3, abs=0.05)


async def test_shares_follow_the_weights(broker: RedisBroker) -> None:
    simulation = await simulate(broker, [Owner("a", weight=1), Owner("b", weight=2), Owner("c", weight=5)])
    assert [simulation.share(name) for name in "abc"] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.05)


async def test_shares_are_of_work_and_not_of_requests(broker: RedisBroker) -> None:
    """Nine pictures of 20 steps are not one turn like a single picture of one step."""
    simulation = await simulate(broker, [Owner("big", cost_ms=10), Owner("small", cost_ms=1)], num_batches=100)
    assert simulation.share("big") == pytest.approx(0.5, abs=0.08)
    assert simulation.order.count("small") > 6 * simulation.order.count("big")


async def test_ten_thousand_of_one_caller_dont_hold_up_anothers_first(broker: RedisBroker) -> None:
    """Whenever it comes, it is served within the ready stream and one turn."""
    simulation = Simulation(broker)
    await simulation.offer(Owner("flood", backlog=10_000))
    for _ in range(5):
        await simulation.serve()
        await simulation.offer(Owner("first", backlog=1))
        before = len(simulation.order)
        while "first" not in simulation.order[before:]:
            await simulation.serve()
        assert len(simulation.order) - before <= 4 * BATCH
    assert simulation.order.count("first") == 5


async def test_who_was_away_saves_up_no_turns(broker: RedisBroker) -> None:
    simulation = await simulate(broker, [Owner("busy"), Owner("steady")], num_batches=30)
    simulation.served.clear()
    for _ in range(30):
        for owner in (Owner("busy"), Owner("steady"), Owner("late")):
            await simulation.offer(owner)
        await simulation.serve()
    assert simulation.share("late") == pytest.approx(1 / 3, abs=0.06)


async def test_the_api_lane_keeps_its_share_under_a_flood_of_live_work(broker: RedisBroker) -> None:
    """Every fifth place, whatever happens; the live lane has the rest."""
    randomness = random.Random(5)
    lanes: list[str] = []
    num_live = 0
    for i in range(200):
        await broker.submit(api_job(f"api-{i}"), NO_LIMITS)
    for _ in range(40):
        for _ in range(randomness.randint(4, 8)):
            num_live += 1
            await broker.submit(live_job(f"live-{num_live}", session=f"session-{num_live}"), NO_LIMITS)
        for delivery in await receive_now(broker, count=BATCH):
            lanes.append(delivery.job.lane)
            await broker.finish("worker", completed(delivery.job.request_id))
    busy = lanes[3 * BATCH :]  # what was ready before the flood came
    assert busy.count("api") / len(busy) == pytest.approx(1 / 5, abs=0.03)
    assert all("api" in busy[i : i + 5] for i in range(len(busy) - 5))
