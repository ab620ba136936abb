"""The conductor: one call of `step` advances one batch by one denoising step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import torch

from broker.messages import Abort, Delivery
from workers.engine.checking import withhold_blocked
from workers.engine.outputs import Aborted, EngineOutput, GenerationFailed
from workers.engine.request import RequestState
from workers.engine.runner import Decoding, ModelRunner
from workers.engine.scheduler import Batch, Scheduler

logger = logging.getLogger(__name__)

NEWER_WITHIN_MS = 300
POLL_S = 0.0005


class Engine:
    """Runs requests of several warm models. Not thread-safe: it belongs to the thread that owns the device.

    `observe_step(model, num_rows, seconds)` hears of every batch that took a step. `scheduler_class` is there for
    benchmarks, which compare ours with others.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        observe_step: Callable[[str, int, float], None] = lambda *_: None,
        scheduler_class: type[Scheduler[RequestState]] = Scheduler,
    ) -> None:
        self.runners = dict(runners)
        self._observe_step = observe_step
        self._scheduler = scheduler_class(
            lambda request: self.runners[request.model].max_rows(request.size),
            lambda model: self.runners[model].switch_s,
        )
        self._decodings: list[Decoding] = []

    def add(self, delivery: Delivery) -> None:
        """Queues a request; it joins its group's batch at the next step with room."""
        runner = self.runners[delivery.job.model]
        loras = runner.fetch_loras(delivery.job.params.loras)
        self._scheduler.add(RequestState(delivery, runner.pipeline.spec, loras, is_alone=delivery.is_last_attempt))

    def abort(self, abort: Abort, asked_s: float | None = None) -> None:
        """Stops a request at the next step boundary; `asked_s` is when somebody wished so. Unknown requests are
        ignored: they have just ended."""
        for request in self._scheduler.requests:
            if request.request_id == abort.request_id and (
                abort.reason != "newer" or _is_worth_stopping(request, abort)
            ):
                request.stop(abort, time.perf_counter() if asked_s is None else asked_s)

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.requests or self._decodings)

    @torch.inference_mode()
    def step(self) -> list[EngineOutput]:
        """Stops what nobody wants any more, runs one step of the next batch, hands out the pictures that are ready."""
        outputs = self._stop_unwanted()
        batch = self._scheduler.schedule()
        if batch is not None:
            try:
                self._run(batch)
            except Exception as error:  # noqa: BLE001 - whatever one request's computation raises, the others go on
                outputs += self._isolate(batch, error)
        return outputs + self._collect(may_wait=batch is None)

    def _run(self, batch: Batch[RequestState]) -> None:
        runner = self.runners[batch.requests[0].model]
        runner.expect(batch.requests)
        runner.use_loras(batch.requests[0].loras)
        started_s = time.perf_counter()
        if batch.admitted:
            runner.prepare(batch.admitted)
        prepared_s = time.perf_counter()
        previews = runner.step(batch.requests)
        num_rows = sum(request.num_rows for request in batch.requests)
        self._observe_step(batch.requests[0].model, num_rows, time.perf_counter() - prepared_s)
        finished = [request for request in batch.requests if request.is_finished]
        self._decodings += previews + runner.decode(finished)
        for request in finished:
            self._scheduler.remove(request)
        self._scheduler.charge(batch, time.perf_counter() - started_s)

    def _collect(self, *, may_wait: bool) -> list[EngineOutput]:
        """The pictures that are ready. With nothing else to do it waits for them, or for a LoRA's file, a little and no
        longer: a new request may come meanwhile."""
        ready = [decoding for decoding in self._decodings if decoding.is_ready()]
        for decoding in ready:
            self._decodings.remove(decoding)
        if may_wait and self.has_work and not ready:
            time.sleep(POLL_S)
        return withhold_blocked(self.runners, [decoding.output() for decoding in ready])

    def _stop_unwanted(self) -> list[EngineOutput]:
        now_s = time.perf_counter()
        outputs: list[EngineOutput] = []
        for request in self._scheduler.requests:
            if request.abort is not None:
                outputs.append(Aborted(request, request.abort.reason))
            elif now_s >= request.expires_s:
                request.asked_to_stop_s = request.expires_s
                outputs.append(Aborted(request, "expired"))
        for output in outputs:
            self._scheduler.remove(output.request)
        return outputs

    def _isolate(self, batch: Batch[RequestState], error: Exception) -> list[EngineOutput]:
        """A failed batch doesn't tell who is to blame: each request runs again by itself; who fails alone failed."""
        if len(batch.requests) == 1:
            request = batch.requests[0]
            self._scheduler.remove(request)
            self.runners[request.model].ensure_device()
            logger.error("request %s failed: %s", request.request_id, repr(error))  # a kept record keeps no tensors
            return [GenerationFailed(request, error)]
        logger.warning("a batch of %d failed (%s): its requests run again one by one", len(batch.requests), repr(error))
        for request in batch.requests:
            request.restart()
            request.is_alone = True
            self._scheduler.put_back(request)
        return []


def _is_worth_stopping(request: RequestState, abort: Abort) -> bool:
    """A newer prompt stops a running one only early in its work, and only for someone who saw a picture just now."""
    if abort.ms_since_final is None or abort.ms_since_final >= NEWER_WITHIN_MS:
        return False
    return request.step_index * 2 < request.params.num_inference_steps


def run_until_done(engine: Engine) -> list[EngineOutput]:
    """Steps until no work is left; for warm-up and for use without a queue."""
    outputs: list[EngineOutput] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs
