"""Who gets in: a job gets a place in the queue, or an error that says why not and when to come back."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import replace

from app.access.callers import Caller
from app.access.rates import Rates
from app.errors import (
    DeadlineTooShort,
    Forbidden,
    ModelNotReady,
    Overloaded,
    PromptBlocked,
    PromptCheckFailed,
    RateExceeded,
    raises,
)
from app.fleet import Fleet, find_standing, find_warm, make_forecast
from app.metrics import Metrics
from app.policy import PromptPolicy
from broker.errors import BrokerError, BrokerUnavailable, IdempotencyConflict, QueueFull, ResultStoreFull, TooLate
from broker.messages import Job, Lane, WorkerInfo
from broker.redis_broker import RedisBroker
from broker.terms import Forecast, Limits, Submitted, Terms
from models.catalog import ModelSpec, UnknownModelError, get_spec

NOT_READY_RETRY_MS = 5_000
MIN_RETRY_MS, MAX_RETRY_MS = 10, 60_000


def new_request_id() -> str:
    """Unguessable: whoever knows it may read the generation."""
    return uuid.uuid4().hex


class Admission:
    """Puts jobs into the queue, or says why not and when to come back."""

    def __init__(
        self,
        broker: RedisBroker,
        fleet: Fleet,
        catalog: Mapping[str, ModelSpec],
        limits: Limits,
        metrics: Metrics,
        policy: PromptPolicy,
        rates: Rates,
    ) -> None:
        self._broker, self._fleet, self._catalog = broker, fleet, catalog
        self._limits, self._metrics, self._policy, self._rates = limits, metrics, policy, rates

    @raises(UnknownModelError, Forbidden)
    def find_model(self, name: str, caller: Caller) -> ModelSpec:
        """Raises UnknownModelError or Forbidden; both list the models that the caller may use."""
        allowed = self.models_of(caller)
        if name in self._catalog and name not in allowed:
            message = f"this key may not use the model {name!r}; it may use: {', '.join(allowed) or 'none'}"
            raise Forbidden(message, param="model", code="model_not_allowed")
        return get_spec(allowed, name[:100])

    def models_of(self, caller: Caller) -> dict[str, ModelSpec]:
        return {name: spec for name, spec in self._catalog.items() if caller.models is None or name in caller.models}

    def default_model(self, caller: Caller, preferred: str) -> str:
        """`preferred` where the caller may use it, else the first that it may."""
        allowed = self.models_of(caller)
        return preferred if preferred in allowed else next(iter(allowed), preferred)

    @raises(
        *(UnknownModelError, Forbidden, ModelNotReady, RateExceeded, PromptBlocked, PromptCheckFailed),
        DeadlineTooShort,
        *(Overloaded, IdempotencyConflict, BrokerUnavailable, BrokerError),
    )
    async def submit(self, job: Job, caller: Caller, terms: Terms | None = None) -> Submitted:
        """Raises UnknownModelError, Forbidden, ModelNotReady, DeadlineTooShort, RateExceeded, PromptBlocked,
        PromptCheckFailed, Overloaded, IdempotencyConflict or BrokerUnavailable.

        The answer may be an older request; `terms` say when. Weight and forecast are filled in here.
        """
        check_lane(job.lane, caller)
        spec = get_spec(self._catalog, job.model)
        workers = await self._check_ready(job.model, caller)
        check_loras_held(job, workers)
        forecast = make_forecast(workers, job.params, spec)
        check_deadline(job.deadline_ms, forecast)
        await self._rates.take(job, caller)
        await self._policy.review(job, spec)
        terms = replace(terms or Terms(), weight=caller.weight, forecast=forecast)
        self._metrics.submitted(job)
        is_new = False
        try:
            submitted = await self._broker.submit(job, self._limits, terms)
            is_new = submitted.origin == "new"
        except (QueueFull, ResultStoreFull, TooLate) as error:
            raise _overloaded(error) from error
        finally:
            if not is_new:
                self._metrics.forget(job.request_id)
        self._metrics.admitted.labels(job.model, submitted.origin).inc()
        return submitted

    async def _check_ready(self, model: str, caller: Caller) -> list[WorkerInfo]:
        """The live workers, one of which holds the model warm."""
        workers = await self._fleet.workers()
        standing = find_standing(workers, model)
        if standing.state == "warm":
            return workers
        others = [name for name in self.models_of(caller) if find_warm(workers, name)]
        message = f"no worker keeps {model} warm: {standing.detail}; warm now: {', '.join(others) or 'none'}"
        raise ModelNotReady(message, param="model", retry_after_ms=NOT_READY_RETRY_MS)


def check_lane(lane: Lane, caller: Caller) -> None:
    if lane not in caller.lanes:
        allowed = ", ".join(sorted(caller.lanes))
        raise Forbidden(f"this key may not use the {lane} lane; it may use: {allowed}", code="lane_not_allowed")


def check_loras_held(job: Job, workers: list[WorkerInfo]) -> None:
    """By one worker together: a worker may have yet to take over what the gateway's catalog has."""
    wanted = {lora.name for lora in job.params.loras}
    if wanted and not any(wanted.issubset(warm.loras) for _, warm in find_warm(workers, job.model)):
        message = (
            f"no worker that keeps {job.model} warm has taken over the LoRAs {', '.join(sorted(wanted))}: "
            f"it must read the catalog again (SIGHUP) or, if its log says so, be started anew"
        )
        raise ModelNotReady(message, param="loras", retry_after_ms=NOT_READY_RETRY_MS)


def check_deadline(deadline_ms: int | None, forecast: Forecast) -> None:
    """Generously: the costs may have been measured while others used the machine, too."""
    if deadline_ms is not None and deadline_ms < forecast.alone_ms / 2:
        message = f"deadline_ms: {deadline_ms} is too short: this takes about {math.ceil(forecast.alone_ms)} ms"
        raise DeadlineTooShort(message, param="deadline_ms")


def _overloaded(error: QueueFull | ResultStoreFull | TooLate) -> Overloaded:
    match error:
        case QueueFull():
            code, param = "queue_full", None
        case ResultStoreFull():
            code, param = "result_store_full", None
        case TooLate():
            code, param = "deadline_unreachable", "deadline_ms"
    retry_ms = min(MAX_RETRY_MS, max(MIN_RETRY_MS, error.wait_ms))
    return Overloaded(str(error), code=code, param=param, retry_after_ms=retry_ms)
