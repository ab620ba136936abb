"""The live workers as the gateway knows them, and what their measured costs say of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from broker.messages import SamplingParams, WarmModel, WorkerInfo, cost_at
from broker.redis_broker import RedisBroker
from broker.terms import Forecast
from models.catalog import ModelSpec

WORKERS_CACHE_S = 1.0
UNDER_WAY = {
    "waiting": "has yet to load it",
    "loading": "loads it",
    "warming": "warms it",
    "warm": "is about to serve it",  # else it would be found warm
}
ModelState = Literal["warm", "loading", "failed", "cold"]


class Fleet:
    """The live workers, asked for at most once a second however many requests come."""

    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker
        self._lock = asyncio.Lock()
        self._workers: list[WorkerInfo] = []
        self._fresh_until = 0.0

    async def workers(self) -> list[WorkerInfo]:
        async with self._lock:
            if time.monotonic() >= self._fresh_until:
                self._workers = await self._broker.workers()
                self._fresh_until = time.monotonic() + WORKERS_CACHE_S
            return self._workers


def find_warm(workers: Iterable[WorkerInfo], model: str) -> list[tuple[WorkerInfo, WarmModel]]:
    """The ready workers that hold `model` warm."""
    return [
        (worker, warm)
        for worker in workers
        if worker.state == "ready"
        for warm in worker.warm_models
        if warm.model == model
    ]


def draw_alike(workers: Iterable[WorkerInfo], spec: ModelSpec) -> bool:
    """Whether all that hold the model warm go by this very entry: who has yet to read it draws other pictures."""
    return all(warm.fingerprint == spec.fingerprint for _, warm in find_warm(workers, spec.name))


@dataclass(frozen=True, slots=True)
class Standing:
    """How a model stands with all workers together; `detail` says which worker does what, or why none does."""

    state: ModelState
    detail: str


def find_standing(workers: Sequence[WorkerInfo], model: str) -> Standing:
    """Warm where any worker keeps it so, else loading where any is about to, else failed where any tried."""
    if warm := find_warm(workers, model):
        return Standing("warm", f"on {', '.join(worker.worker_id for worker, _ in warm)}")
    told = [(worker, status) for worker in workers for status in worker.models if status.model == model]
    under_way = [(w, status) for w, status in told if w.state != "draining" and status.state in UNDER_WAY]
    if under_way:
        return Standing("loading", "; ".join(f"{w.worker_id} {UNDER_WAY[s.state]}" for w, s in under_way))
    if failed := [(worker, status) for worker, status in told if status.state == "failed"]:
        return Standing("failed", "; ".join(f"{w.worker_id} failed to load it: {s.detail}" for w, s in failed))
    if draining := [worker.worker_id for worker, status in told if worker.state == "draining"]:
        return Standing("cold", f"{', '.join(draining)} is ending")
    return Standing("cold", "no worker has it in its FEWSTEP_MODELS" if workers else "no worker is running")


def make_forecast(workers: Iterable[WorkerInfo], params: SamplingParams, spec: ModelSpec) -> Forecast:
    """From the workers' cost tables, for the request's own size, steps, guidance and pictures.

    Work adds up over the workers by their speeds; how long it runs is their mean, weighted by how much each of them
    takes. `spec` must be warm on one of them.
    """
    costs = [_cost_on(warm, params, spec) for _, warm in find_warm(workers, spec.name)]
    speeds = [1 / cost.work_ms for cost in costs]
    return Forecast(
        work_ms=1 / sum(speeds),
        alone_ms=sum(speed * cost.alone_ms for speed, cost in zip(speeds, costs, strict=True)) / sum(speeds),
        full_ms=sum(speed * cost.full_ms for speed, cost in zip(speeds, costs, strict=True)) / sum(speeds),
        num_slots=sum(cost.num_slots for cost in costs),
    )


def _cost_on(warm: WarmModel, params: SamplingParams, spec: ModelSpec) -> Forecast:
    """The same for one worker.

    In a full batch a request pays for its own rows only. But it runs for as long as all that the worker holds costs
    together (Little's law), since the others' text and decoding stand between its steps, too.
    """
    costs = warm.find_costs(params.width, params.height)
    num_rows = spec.num_rows(params.num_images, params.guidance_scale)
    full = max(costs.max_rows, num_rows)

    def run_ms(rows: int, images: int) -> float:
        steps_ms = params.num_inference_steps * cost_at(costs.step_ms, rows)
        check_ms = cost_at(costs.check_ms, images) if costs.check_ms else 0.0
        return warm.text_ms + steps_ms + cost_at(costs.decode_ms, images) + check_ms

    batch_ms = run_ms(full, max(costs.max_rows, params.num_images))
    work_ms = max(0.01, warm.text_ms + (batch_ms - warm.text_ms) * num_rows / full)
    num_slots = max(1, costs.max_rows // num_rows)
    return Forecast(
        work_ms=work_ms,
        alone_ms=run_ms(num_rows, params.num_images),
        full_ms=max(batch_ms, num_slots * work_ms),
        num_slots=num_slots,
    )
